"""Test that hostile tars and lists raise one error at once, in little memory."""

import json
import tarfile
import time
from pathlib import Path

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import MAX_NAME_BYTES


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header with any bytes in its size field."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -(2**40)])
def test_a_member_of_negative_size_ends_the_tar(tmp_path: Path, size: int) -> None:
    """A negative size once made the reader read all following bytes as the image, above every
    limit. The size -512 caused an endless loop."""
    field = (size & (2**96 - 1)).to_bytes(12, "big")
    path = tmp_path / "a.tar"
    path.write_bytes(header("good.png", b"%011o\0" % 0) + header("a.png", field) + bytes(5_000))
    good, bad = find_items([str(path)])
    assert (good.id, good.error) == ("a.tar/good.png", None)
    assert bad.error is not None
    assert bad.error[0] == "truncated"
    assert str(size) in bad.error[1]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_giant_header_is_not_read(tmp_path: Path, kind: bytes) -> None:
    """A sparse file of a few kB once made the listing take 3 GB of memory."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header("long", b"%011o\0" % (2**32), kind))
        file.truncate(2**32)
    begin = time.process_time()
    [item] = find_items([str(path)])
    assert time.process_time() - begin < 1
    assert item.error is not None
    assert f"more than {MAX_NAME_BYTES} bytes" in item.error[1]


def test_a_chain_of_5_000_headers_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes((header("pax", b"%011o\0" % 0, tarfile.XHDTYPE)) * 5_000 + bytes(1024))
    [item] = find_items([str(path)])
    assert item.error is not None
    assert item.error[0] == "truncated"


def test_long_names_of_a_path_s_length_are_read(tmp_path: Path) -> None:
    path, name = tmp_path / "a.tar", "folder/" * 400 + "a.png"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert [item.id for item in find_items([str(path)])] == [f"a.tar/{name}"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_list_with_a_very_long_line_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list{suffix}"
    good = "a.png" if suffix == ".txt" else json.dumps({"path": "a.png"})
    with path.open("wb") as file:
        file.write(good.encode() + b"\n")
        file.truncate(3 * 10**8)
    with pytest.raises(ExportError, match=f"line 2 has more than {MAX_NAME_BYTES} bytes"):
        list(find_items([str(path)]))
