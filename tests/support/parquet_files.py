"""Make small Parquet files of images, and damaged files."""

import base64
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pyarrow.parquet.encryption as pe  # type: ignore[import-untyped]
import pytest

from qwen_vit.images.image import ImageLimits
from qwen_vit.inputs import parquet_rows as parquet_module
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.parquet_pages import page_header
from tests.support.export_stress import tiny_png

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return image structs like `datasets`, one image for each number."""
    return [{"bytes": tiny_png(number), "path": f"{number}.png"} for number in numbers]


def write_rows(
    path: str | Path, images: Sequence[Any], kind: Any = STRUCT, *, group: int = 10, **columns: Any
) -> None:
    """Write a file with a column `image`, this number of rows in a row group, and other columns."""
    table = pa.table({"image": pa.array(images, kind), **columns})
    pq.write_table(table, path, row_group_size=group, write_page_checksum=True, compression="none")


def claim_rows(path: Path, rows: int, claimed: int, *, in_groups: bool) -> None:
    """Change the footer of a file of `rows` rows to `claimed` rows, with `in_groups` also in the
    last row group.

    In Thrift's compact protocol, each number is a varint in zigzag code after its field's type.
    """
    data = path.read_bytes()
    [length] = struct.unpack_from("<I", data, len(data) - 8)
    body, footer = data[: -8 - length], data[-8 - length : -8]
    positions = [at for at in range(len(footer)) if footer.startswith(field_of(rows), at)]
    # The first occurrence is the number of the whole file, and the last one is of the row group.
    file, group = positions[0], positions[-1]
    for at in (group, file) if in_groups else (file,):
        footer = footer[:at] + field_of(claimed) + footer[at + len(field_of(rows)) :]
    path.write_bytes(body + footer + struct.pack("<I", len(footer)) + b"PAR1")


def field_of(number: int) -> bytes:
    """Return a 64-bit field of Thrift whose number follows the previous field's number."""
    return b"\x16" + varint(number)


def varint(number: int) -> bytes:
    """Return a nonnegative integer in Thrift's zigzag code."""
    return unsigned(2 * number)


def claim_page(
    path: str, column: int, *, uncompressed: int | None = None, compressed: int | None = None
) -> None:
    """Change the sizes in the first page header of a column. The new sizes must need as many bytes
    as the old sizes."""
    facts = pq.ParquetFile(path).metadata.row_group(0).column(column)
    start = facts.dictionary_page_offset if facts.has_dictionary_page else facts.data_page_offset
    data = Path(path).read_bytes()
    found = page_header(data[start : start + 1_000])
    assert found is not None
    old = b"\x15" + varint(found[1]) + b"\x15" + varint(found[2])
    claimed = b"\x15" + varint(uncompressed or found[1]) + b"\x15" + varint(compressed or found[2])
    assert len(claimed) == len(old)
    at = data.index(old, start)
    assert at < start + 4
    Path(path).write_bytes(data[:at] + claimed + data[at + len(old) :])


def unsigned(number: int) -> bytes:
    """Return a nonnegative integer as a varint without zigzag code."""
    rest, digits = number, []
    while rest > 127:
        digits.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*digits, rest])


def equal_lengths(number: int, length: int = 0, *, per_block: int = 2**20) -> bytes:
    """Return this number of equal lengths in DELTA_BINARY_PACKED, with two bytes for a block."""
    blocks = -(-(number - 1) // per_block)
    header = unsigned(per_block) + b"\x01" + unsigned(number) + varint(length)
    return header + bytes(2 * blocks)


def change_values(path: str, column: int, values: bytes) -> None:
    """Change the first values of the first data page in a column without compression."""
    facts = pq.ParquetFile(path).metadata.row_group(0).column(column)
    data = bytearray(Path(path).read_bytes())
    found = page_header(data[facts.data_page_offset :])
    assert found is not None
    at = facts.data_page_offset + found.n_bytes
    at += 4 + int.from_bytes(data[at : at + 4], "little")  # skip the levels
    data[at : at + len(values)] = values
    Path(path).write_bytes(data)


def tear_rows(path: Path, image: bytes) -> None:
    """Change one byte of an image, so that its page's checksum is wrong."""
    data = bytearray(path.read_bytes())
    data[data.index(image) + len(image) // 2] ^= 0xFF
    path.write_bytes(data)


class _Keys(pe.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    """Provide encryption keys without protection."""

    def __init__(self, _: Any) -> None:
        pe.KmsClient.__init__(self)

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


def write_encrypted(path: str | Path, images: Sequence[Any], *, plain_footer: bool) -> None:
    """Write a file with an encrypted column of images. `plain_footer` leaves the footer plain."""
    table = pa.table({"image": pa.array(images, STRUCT)})
    fields = ["image.bytes", "image.path"]
    settings = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": fields}, plaintext_footer=plain_footer
    )
    factory = pe.CryptoFactory(_Keys)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


IMAGE, LIMITS = ParquetColumns("image"), ImageLimits()


def items(*inputs: str, columns: ParquetColumns | None = IMAGE) -> list[Item]:
    return list(find_items(inputs, columns=columns))


def watch_row_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the row groups that readers begin to read."""
    begun: list[int] = []
    begin = parquet_module._Reader._begin_at

    def watched(self: Any, group: int) -> None:
        begun.append(group)
        begin(self, group)

    monkeypatch.setattr(parquet_module._Reader, "_begin_at", watched)
    return begun
