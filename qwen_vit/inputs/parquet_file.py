"""Open a Parquet file with pyarrow, and check the types of its columns."""

from typing import Any, BinaryIO

from qwen_vit.common.installation import install_command
from qwen_vit.errors import ExportError, ImageError, display_name
from qwen_vit.inputs.remote import open_input

__all__ = [
    "cannot_read", "check_images", "holds_images", "open_parquet_file", "parquet_file", "type_of",
]  # fmt: skip

MAX_LISTED = 100_000  # row groups or columns in a footer, each of which takes up to 1 kB
BUFFER_BYTES = 2**20  # of one column, read ahead; without it pyarrow reads whole row groups


def open_parquet_file(path: str, name: str, version: str | None = None) -> BinaryIO:
    return open_input(path, name, "a Parquet file", version=version)


def parquet_file(file: Any) -> Any:
    """Open a file in pyarrow as a stream. pyarrow then verifies the checksums of pages that have
    them."""
    try:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError:
        raise ExportError(
            "Parquet needs pyarrow, which is not installed",
            remedy=f"run {install_command('arrow')}",
        ) from None
    return pq.ParquetFile(
        file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True,
        thrift_container_size_limit=MAX_LISTED,
    )  # fmt: skip


def check_images(schema: Any, column: str, name: str) -> None:
    """Raise ExportError unless exactly one column has this name and contains bytes, or structs with
    a field `bytes`."""
    kind = type_of(schema, column, name)
    if holds_images(kind):
        return
    import pyarrow as pa

    remedy = "pass the name of a column of bytes, or of structs {bytes, path}"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        remedy = "download any images at addresses, and write the paths into a .txt list"
    elif pa.types.is_null(kind):
        remedy = "store images in it, because it has none"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        remedy = "write one image per row, for example with pandas' explode()"
    raise ExportError(
        f"column {display_name(column)} contains {kind}",
        name=name,
        expected="bytes of images, or structs {bytes, path}",
        remedy=remedy,
    )


def type_of(schema: Any, column: str, name: str) -> Any:
    """Return a column's type. Raises ExportError unless exactly one column has this name."""
    found = schema.get_all_field_indices(column)
    if len(found) == 1:
        return schema.field(found[0]).type
    held = ", ".join(map(display_name, schema.names[:20])) or "none"
    raise ExportError(
        f"{'no' if not found else 'more than one'} column {display_name(column)}",
        name=name,
        expected=f"one of its columns: {held}",
        remedy="pass one of these columns, and only files that contain it",
    )


def holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_binary(plain) or pa.types.is_large_binary(plain))


def cannot_read(name: str, error: Exception) -> ImageError:
    if "crypt" in str(error):  # pyarrow has no exception type for encryption
        return ImageError(
            "encrypted",
            name=name,
            expected="a Parquet file without encryption",
            remedy="write the file again without encryption",
            code="unreadable",
        )
    if not isinstance(error, OSError) or error.errno is None:  # pyarrow raised it for the content
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return ImageError(
            f"damaged Parquet ({reason})",
            name=name,
            remedy="download the file again",
            code="damaged",
        )
    return ImageError(
        f"its Parquet file cannot be read ({error.strerror})",
        name=name,
        remedy="check its permissions and disk",
        code="unreadable",
    )
