"""Test that damaged ancillary chunks never make a PNG fail, and that critical chunks do."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.load import load_image
from qwen_vit.images.png_chunks import without_needless_chunks

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", right)


def png(image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, "PNG", **options)
    return file.getvalue()


def before(extra: bytes, data: bytes | None = None) -> bytes:
    """Return a PNG with chunks after the header."""
    data = png() if data is None else data
    return data[:33] + extra + data[33:]


BIG = zlib.compress(b"x" * 2_000_000)
LARGE = {
    "zTXt": chunk(b"zTXt", b"note\0\0" + BIG),
    "iTXt": chunk(b"iTXt", b"note\0\1\0\0\0" + BIG),
    "tEXt": chunk(b"tEXt", b"note\0" + b"x" * 2_000_000),
    "iCCP": chunk(b"iCCP", b"p\0\0" + BIG),
    "many": b"".join(
        chunk(b"zTXt", b"n%d\0\0" % i + zlib.compress(b"x" * 1_000_000)) for i in range(70)
    ),
}
FAULTY = {
    "gAMA short": chunk(b"gAMA", b"\0"),
    "cHRM short": chunk(b"cHRM", b"\0" * 5),
    "pHYs short": chunk(b"pHYs", b"\0"),
    "sRGB empty": chunk(b"sRGB", b""),
    "iCCP empty": chunk(b"iCCP", b""),
    "iCCP method": chunk(b"iCCP", b"p\0\5" + zlib.compress(b"x")),
    "zTXt method": chunk(b"zTXt", b"note\0\5" + zlib.compress(b"x")),
    "zTXt noise": chunk(b"zTXt", b"note\0\0" + b"noise"),
    "tEXt checksum": chunk(b"tEXt", b"note\0x", 1),
    "tIME checksum": chunk(b"tIME", bytes(7), 1),
    "eXIf checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08", 1),
    "acTL empty": chunk(b"acTL", b"", 1),
    "unknown": chunk(b"quRk", b"anything", 1),
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("name", [*LARGE, *FAULTY])
def test_a_whole_picture_is_decoded(name: str, where: str) -> None:
    extra, data = (LARGE | FAULTY)[name], png()
    data = before(extra) if where == "before" else data[:-12] + extra + data[-12:]
    image = load_image(data)
    assert np.array_equal(image.pixels, PIXELS)
    if name in LARGE or "checksum" in name:
        assert any("passed over" in note for note in image.notes), image.notes


def test_notes_name_the_chunk() -> None:
    assert load_image(before(LARGE["zTXt"])).notes == ("large zTXt passed over",)
    assert load_image(before(FAULTY["tIME checksum"])).notes == ("faulty tIME passed over",)
    assert load_image(before(chunk(b"pHYs", bytes(9)))).notes == ()


def test_a_plain_file_is_not_copied() -> None:
    data = png()
    assert without_needless_chunks(data)[0] is data


def test_orientation_and_transparency_still_count() -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = load_image(before(LARGE["zTXt"], png(exif=exif)))
    assert turned.picture.size == (40, 60)
    palette = Image.fromarray(PIXELS[..., 0]).convert("P")
    clear = load_image(before(LARGE["iCCP"], png(palette, transparency=3)))
    assert "alpha composited on white" in clear.notes
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    kept = load_image(before(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)))
    assert kept.picture.size == (40, 60)


@pytest.mark.parametrize("kind", [b"tRNS", b"PLTE"])
def test_faults_in_critical_chunks_are_errors(kind: bytes) -> None:
    palette = png(Image.fromarray(PIXELS[..., 0]).convert("P"), transparency=3)
    at = palette.index(kind)
    [length] = struct.unpack_from(">I", palette, at - 4)
    faulty = bytearray(palette)
    faulty[at + 4 + length] ^= 0xFF  # a byte of its checksum
    with pytest.raises(ImageError) as caught:
        load_image(bytes(faulty))
    assert caught.value.code in ("damaged", "truncated")


def test_an_animation_with_a_faulty_part_gives_its_first_frame() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    data = bytearray(png(frames[0], save_all=True, append_images=frames[1:]))
    at = data.index(b"acTL")
    data[at + 12] ^= 0xFF
    image = load_image(bytes(data))
    assert np.array_equal(image.pixels, PIXELS)
    assert image.notes == ("faulty acTL passed over",)
