"""Test limits on small files that need much time or memory."""

import io
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.images import decode
from qwen_vit.images.image import ImageLimits, ImagePage
from qwen_vit.images.isolated import decode_in_child
from qwen_vit.images.load import load_image
from qwen_vit.images.memory import (
    DecodingMemory,
    available_bytes,
    decoding_memory,
    set_decoding_memory,
)
from qwen_vit.images.pages import split_pages
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits
from tests.support import IMAGES

PICTURES = IMAGES


def refused(data: bytes | ImagePage, limits: ImageLimits | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(data, name="a", limits=limits)
    assert str(caught.value).isprintable()
    return caught.value


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def test_a_gif_of_many_frames_is_not_counted() -> None:
    first = saved(Image.new("P", (1, 1)), "GIF")
    frame = b"," + bytes(4) + b"\1\0\1\0\0" + b"\2\2\x44\1\0"
    data = first[:-1] + frame * 300_000 + b";"
    assert "first of several frames" in load_image(data).notes
    assert seconds(lambda: load_image(data)) < 1


def gif_frame(width: int, height: int) -> bytes:
    """Return a frame with pixels of one colour in its first row. The next frame removes it."""
    control = b"!\xf9\4" + bytes([2 << 2, 1, 0, 0]) + b"\0"
    return control + b"," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\2\2\x44\1\0"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_frame_cannot_enlarge_the_canvas_of_a_gif_beyond_the_limit(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own limit is 178,956,970 pixels, for any first frame and any of our limits."""
    allocated = [0]

    def fill(mode: str, size: tuple[int, int], *colour: object) -> object:
        allocated.append(size[0] * size[1])
        return real(mode, size, *colour)

    core: Any = vars(Image)["core"]
    real = core.fill
    monkeypatch.setattr(core, "fill", fill)
    frames = [gif_frame(1, 1) for _ in range(4)]
    frames[place] = gif_frame(200, 200)
    data = saved(Image.new("P", (1, 1)), "GIF")[:13] + b"".join(frames) + b";"
    limits = ImageLimits(max_pixels=1_000)
    for source in (data, ImagePage(data, 4)) if place == 0 else (ImagePage(data, 4),):
        assert refused(source, limits).code == "too-many-pixels"
    with pytest.raises(ImageError) as caught:
        load_video(
            Video(data, name="a.gif"),
            ImageConfig.from_json({}),
            limits=VideoLimits(max_pixels=1_000),
        )
    assert caught.value.code == "too-many-pixels"
    assert max(allocated) <= 1_000
    with Image.open(io.BytesIO(data)) as image, pytest.raises(ImageError, match="200x200"):
        list(split_pages(image, "a", limits))


def test_a_tiff_of_many_directories_is_not_counted() -> None:
    data = bytearray(saved(Image.new("L", (4, 4)), "TIFF"))
    [start] = struct.unpack_from("<I", data, 4)
    [count] = struct.unpack_from("<H", data, start)
    at = start + 2 + 12 * count
    for _ in range(20_000):
        struct.pack_into("<I", data, at, len(data))
        data += struct.pack("<H", 0) + bytes(4)
        at = len(data) - 4
    assert "first of several frames" in load_image(bytes(data)).notes
    assert seconds(lambda: load_image(bytes(data))) < 1


def tags_that_share(n_bytes: int, entries: int) -> bytes:
    """Make a directory whose entries all refer to the same bytes."""
    body = b"".join(struct.pack("<HHII", 60_000 + i, 7, n_bytes, 0) for i in range(entries))
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + body + bytes(4)
    return data + bytes(n_bytes - len(data))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_whose_entries_share_their_bytes_is_ignored(kind: str) -> None:
    """Pillow copied 64 KB for each of 4,000 entries, which takes 250 MB for a file of 100 KB."""
    exif = b"Exif\0\0" + tags_that_share(60_000, 4_000)
    data = saved(Image.open(PICTURES / "rocket.jpg"), kind, exif=exif)
    image = load_image(data)
    assert "unreadable EXIF ignored" in image.notes
    assert image.width == 640


def test_exif_with_one_absurd_entry_still_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[274] = 6
    exif[37_510] = b"comment" * 10
    raw = exif.tobytes()
    absurd = raw.replace(struct.pack("<I", 70), struct.pack("<I", 2**31))
    assert absurd != raw
    data = saved(Image.open(PICTURES / "rocket.jpg"), "JPEG", exif=absurd)
    assert load_image(data).height == 640


def test_a_tiff_whose_tags_share_their_bytes_is_refused() -> None:
    data = tags_that_share(400_000, 4_000)
    assert seconds(lambda: refused(data)) < 1
    error = refused(data)
    assert error.code == "damaged"
    assert "tags" in error.fact


def test_a_thin_picture_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """qwen_vit once rejected a TIFF of 100 x 1,000,000 only after 6 s of decoding."""
    monkeypatch.setattr(decode, "_load", lambda *_: pytest.fail("it was decoded"))
    for size in ((3, 900), (900, 3)):
        error = refused(saved(Image.new("L", size), "TIFF"))
        assert error.code == "ratio"
        assert "Crop or pad the image" in str(error)


def slow_picture() -> bytes:
    """AVIF or PNG would need 30 x 30 million pixels. Scans of a progressive JPEG are cheaper."""
    return saved(Image.new("RGB", (3_000, 3_000)), "JPEG", progressive=True)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that a separate process decoded."""
    names: list[str] = []

    def record(data: bytes, name: str, *policy: Any) -> object:
        names.append(name)
        return decode_in_child(data, name, *policy)

    monkeypatch.setattr(decode, "decode_in_child", record)
    return names


def test_a_picture_that_may_take_long_is_decoded_in_a_separate_process(
    children: list[str],
) -> None:
    """The estimate assumes a slow core, so the decoder finishes most such images in time."""
    data = slow_picture()
    limits = ImageLimits(max_seconds=4.0)
    image = load_image(data, name="a.jpg", limits=limits)
    assert children == ["a.jpg"]
    here = load_image(data, name="a.jpg")
    assert children == ["a.jpg"]
    assert np.array_equal(image.pixels, here.pixels)
    assert (image.format, image.notes, image.name) == (here.format, here.notes, here.name)
    error = refused(data[:-30_000] + b"\xff\xd9", limits)
    assert error.code == "truncated"


def test_the_decoding_of_a_slow_picture_is_stopped(children: list[str]) -> None:
    begin = time.monotonic()
    error = refused(slow_picture(), ImageLimits(max_seconds=0.05))
    assert time.monotonic() - begin < 3
    assert (error.code, children) == ("slow", ["a"])
    assert "ImageLimits.max_seconds" in error.remedy


def test_a_picture_that_kills_its_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ImageError, match="ended with exit code 1") as caught:
        decode_in_child(b"", "a.jpg", ImageLimits())
    assert caught.value.code == "memory"


@pytest.mark.parametrize("value", [0, -1, True, "9", float("nan")])
def test_seconds_are_a_number_above_0(value: object) -> None:
    with pytest.raises(ArgumentError, match="max_seconds"):
        ImageLimits(max_seconds=value)  # type: ignore[arg-type]


def test_threads_share_one_budget_in_order() -> None:
    memory, peak, running, lock = DecodingMemory(100), [0], [0], threading.Lock()

    def work(n_bytes: int) -> None:
        with memory.hold(n_bytes):
            with lock:
                running[0] += n_bytes
                peak[0] = max(peak[0], running[0])
            time.sleep(0.002)
            with lock:
                running[0] -= n_bytes

    threads = [threading.Thread(target=work, args=(n,)) for n in (40, 60, 70, 30, 100, 5) * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 60 < peak[0] <= 100
    assert memory.held == 0


def test_an_image_larger_than_the_budget_is_decoded_alone() -> None:
    memory, admitted = DecodingMemory(10), threading.Event()

    def small() -> None:
        with memory.hold(1):
            admitted.set()

    waits = threading.Thread(target=small)
    with memory.hold(1_000):
        waits.start()
        assert not admitted.wait(0.05)
    assert admitted.wait(5)
    waits.join()


def test_the_budget_is_derived_and_can_be_set() -> None:
    try:
        set_decoding_memory(12_345)
        assert decoding_memory.total == 12_345
    finally:
        set_decoding_memory(None)
    assert 0 < decoding_memory.total <= available_bytes()
    with pytest.raises(ArgumentError, match="n_bytes"):
        set_decoding_memory(0)


@pytest.mark.parametrize(
    ("own", "root", "names"),
    [
        (
            "5:cpu:/a\n4:memory:/a/b\n0::/\n",
            "memory",
            ("limit_in_bytes", "usage_in_bytes", "total_"),
        ),
        ("0::/a/b\n", ".", ("max", "current", "")),
    ],
    ids=["v1", "v2"],
)
@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_a_control_group_limits_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, own: str, root: str,
    names: tuple[str, str, str],
) -> None:  # fmt: skip
    """The limits cover the group and each parent group. A container mounts its own group as the
    root."""
    monkeypatch.setattr("qwen_vit.images.memory.CGROUPS", tmp_path)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr("qwen_vit.images.memory.OWN_GROUPS", tmp_path / "own")
    group = tmp_path / root / place
    group.mkdir(parents=True, exist_ok=True)
    (group / f"memory.{names[0]}").write_text("5000000\n")
    (group / f"memory.{names[1]}").write_text("1000000\n")
    assert available_bytes() == 4_000_000
    (group / "memory.stat").write_text(
        f"{names[2]}inactive_file_x 7\n{names[2]}inactive_file 900\n"
    )
    assert available_bytes() == 4_000_900  # the system can reclaim the inactive file cache


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_of_the_process_limits_the_budget(kind: int) -> None:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (2**33, hard))
    try:
        left = available_bytes()
    finally:
        resource.setrlimit(kind, (soft, hard))
    assert 0 < left < 2**33 - 2**20


def test_decoding_holds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held, real = [], decode._load

    def load(*args: Any) -> tuple[str, ...]:
        held.append(decoding_memory.held)
        return real(*args)

    monkeypatch.setattr(decode, "_load", load)
    data = saved(Image.new("RGB", (30, 20)), "PNG")
    load_image(data)
    load_image(Image.open(io.BytesIO(data)))
    assert min(held) >= 30 * 20 * 8
    assert decoding_memory.held == 0


def test_transparent_pictures_take_few_copies() -> None:
    """An image of 13,377 x 13,377 pixels once took 4.3 GB, or 24 bytes per pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (1_500, 1_400, 4), np.uint8)
    picture = Image.fromarray(noise)
    pixels = load_image(picture).pixels
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    assert np.array_equal(pixels, np.asarray(Image.alpha_composite(white, picture).convert("RGB")))


def test_bytes_after_the_pixels_of_a_png_do_not_matter() -> None:
    data = saved(Image.new("L", (8, 8)), "PNG")
    packed = zlib.compress(bytes(50_000_000))
    chunk = struct.pack(">I", len(packed)) + b"IDAT" + packed
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    assert seconds(lambda: load_image(data[:-12] + chunk + data[-12:])) < 1


PEAK = """
import io, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from qwen_vit.images.load import load_image
from qwen_vit.images.memory import set_decoding_memory

file, threads = io.BytesIO(), int(sys.argv[1])
Image.new("RGBA", (4_000, 4_000)).save(file, "PNG", compress_level=1)
set_decoding_memory(2 * 10**8)  # one such picture takes 192 MB
with ThreadPoolExecutor(threads) as pool:
    list(pool.map(lambda _: load_image(file.getvalue()).width, range(2 * threads)))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
def test_the_peak_of_memory_does_not_follow_the_threads() -> None:
    """glibc once kept the memory of decoded images in each thread's arena, 30 bytes per pixel."""

    def peak(threads: int) -> int:
        command = [sys.executable, "-c", PEAK, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    one, eight = peak(1), peak(8)
    print(f"peaks: {one:,} kB with one thread, {eight:,} kB with eight")
    assert eight < 1.5 * one


@pytest.mark.parametrize("offset", [2**40, 2**63, 2**64 - 1])
def test_an_exif_directory_beyond_the_file_is_ignored(offset: int) -> None:
    """An offset of 2^63 or more once raised OverflowError, and ended an export."""
    tiff = b"II+\0\x08\0\0\0" + struct.pack("<Q", offset)
    file = io.BytesIO()
    Image.new("RGB", (56, 56)).save(file, "JPEG", exif=b"Exif\0\0" + tiff)
    assert load_image(file.getvalue()).width == 56
