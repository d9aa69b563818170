"""Append and hash the rows of a feature file, and write its header at the end."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from qwen_vit.common.atomic_file import AtomicFile, atomic_file, cannot_write
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.errors import ExportError, display_name, plural
from qwen_vit.feature_files.schema import (
    EMBEDS,
    FILE_FACTS,
    METADATA_KEY,
    SCHEMA_VERSION,
    ItemFacts,
)

__all__ = [
    "FILE_EACH",
    "FLOATS",
    "FeatureWriter",
    "RowTensor",
    "build_head",
    "bytes_of",
    "rows_sha256",
]

STORED_AS = {  # safetensors' own names
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
FLOATS = set(STORED_AS) - {torch.int64}
FLUSH_BYTES = 2**25  # of rows, before asking the system to write them to the disk
COPY_BYTES = 2**18  # fits in a CPU cache
# In the writing thread, hashing would add 0.45 s to each second of writing (docs/decisions).
HASH_THREADS = 4
FILE_EACH = "write one file for each model and output"


class RowTensor(NamedTuple):
    """Describe a tensor of rows in a file: `image_embeds` or a layer."""

    name: str
    width: int
    dtype: torch.dtype


class FeatureWriter:
    """Write a feature file of unknown length. Append rows, then write the header at the end.

    >>> tensors = [RowTensor("image_embeds", 192, torch.float32)]
    >>> with FeatureWriter(path, tensors, 2**16) as writer:  # doctest: +SKIP
    ...     rows = {"image_embeds": torch.ones(6, 192)}
    ...     writer.add(rows, [ItemFacts("a.jpg", (1, 4, 6), n_rows=6)])
    ...     writer.save(encoder.metadata())

    The header contains all lengths, so the writer reserves `head_bytes` for it, and moves the rows
    if the header is larger. Each layer grows in its own hidden file, which `save` appends to the
    embeddings. The file's bytes depend on `head_bytes`. The file gets its name only when it is
    complete. Without `save`, the writer discards the file when the block ends.
    """

    def __init__(self, path: Path, tensors: Sequence[RowTensor], head_bytes: int) -> None:
        self.path, self.tensors = path, tuple(tensors)
        self.items: list[ItemFacts] = []
        self._digests: list[dict[str, str]] = []
        self._head_bytes = min(head_bytes + -head_bytes % 8, MAX_HEADER_BYTES)
        self._hashers = ThreadPoolExecutor(HASH_THREADS, "qwen-vit-hash")
        self._growing: list[_GrowingRows] = []
        try:
            for place in range(len(self.tensors)):
                begin = self._head_bytes if place == 0 else 0
                self._growing.append(_GrowingRows(path, begin))
        except ExportError:
            self.discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Remove an unsaved file. A saved file remains."""
        self._hashers.shutdown()
        for growing in self._growing:
            growing.atomic.discard()

    def add(self, rows: Mapping[str, Tensor], items: Sequence[ItemFacts]) -> None:
        """Append images: the rows (n, width) of each tensor, in the order of the images."""
        stored = [self._check(tensor, rows[tensor.name], items) for tensor in self.tensors]
        parts = list(self._rows_of_each(stored, items))
        # one job per thread, because each start and end of a job waits for the GIL
        jobs = [
            self._hashers.submit(_digests_of, parts[thread::HASH_THREADS])
            for thread in range(min(HASH_THREADS, len(parts)))
        ]
        try:
            for growing, part in zip(self._growing, stored, strict=True):
                growing.write(part)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        finally:
            digests: list[dict[str, str]] = [{} for _ in parts]
            for thread, job in enumerate(jobs):  # afterwards the caller may free its memory
                digests[thread::HASH_THREADS] = job.result()
            self._digests += digests
        self.items += items

    def last_digests(self) -> Mapping[str, str]:
        return self._digests[-1]

    def drop_behind(self, n_items: int) -> None:
        self.items, self._digests = self.items[:n_items], self._digests[:n_items]
        try:
            for growing, tensor in zip(self._growing, self.tensors, strict=True):
                n_rows = sum(item.rows_of(tensor.name) for item in self.items)
                growing.truncate(n_rows * tensor.width * tensor.dtype.itemsize)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def save(self, facts: Mapping[str, Any], path: Path | None = None) -> None:
        """Write the header with these `facts`, and rename the temporary file to `path`.

        `path` must be in the folder of `self.path`. The default is `self.path`.
        """
        path = path or self.path
        head = build_head(
            path, self.items, self._digests, self.tensors, facts, at_least=self._head_bytes
        )
        main, *others = (growing.atomic for growing in self._growing)
        try:
            for other in others:
                _copy(other.file, 0, main.file)
            if len(head) <= self._head_bytes:
                main.file.seek(0)
                main.file.write(head)
                main.commit(path)
            else:
                with atomic_file(path) as file:
                    file.write(head)
                    _copy(main.file, self._head_bytes, file)
        except OSError as error:
            raise cannot_write(path, error) from None
        self.discard()

    def _rows_of_each(
        self, stored: Sequence[Tensor], items: Sequence[ItemFacts]
    ) -> Iterator[dict[str, Tensor]]:
        names = [tensor.name for tensor in self.tensors]
        parts = [
            rows.split([item.rows_of(name) for item in items])
            for name, rows in zip(names, stored, strict=True)
        ]
        for of_item in zip(*parts, strict=True):
            yield dict(zip(names, of_item, strict=True))

    def _check(self, tensor: RowTensor, rows: Tensor, items: Sequence[ItemFacts]) -> Tensor:
        n_rows = sum(item.rows_of(tensor.name) for item in items)
        if rows.shape != (n_rows, tensor.width):
            raise ExportError(
                f"the {'embeddings' if tensor.name == EMBEDS else tensor.name} of "
                f"{plural(len(items), 'image')} from {display_name(items[0].id)} on have the shape "
                f"{tuple(rows.shape)}",
                name=str(self.path),
                expected=f"({n_rows}, {tensor.width})",
                remedy=FILE_EACH,
            )
        return rows.detach().to("cpu", tensor.dtype).contiguous()


class _GrowingRows:
    """Append the rows of one tensor to a hidden file, after `begin` bytes."""

    def __init__(self, path: Path, begin: int) -> None:
        self.atomic = AtomicFile(path)
        self._begin = self._end = self._flushed = begin
        self.atomic.file.seek(begin)

    def write(self, rows: Tensor) -> None:
        """Append rows, and regularly start to flush them, so that the final flush is short."""
        self._end += self.atomic.file.write(bytes_of(rows))
        if self._end - self._flushed < FLUSH_BYTES:
            return
        if hasattr(os, "posix_fadvise"):  # Linux then starts to write and returns at once
            length = self._end - self._flushed
            os.posix_fadvise(
                self.atomic.file.fileno(), self._flushed, length, os.POSIX_FADV_DONTNEED
            )
        self._flushed = self._end

    def truncate(self, n_bytes: int) -> None:
        self._end = self._begin + n_bytes
        self._flushed = min(self._flushed, self._end)
        self.atomic.file.truncate(self._end)
        self.atomic.file.seek(self._end)


def _copy(source: BinaryIO, begin: int, target: BinaryIO) -> None:
    source.seek(begin)  # seeking writes the buffered bytes
    shutil.copyfileobj(source, target, COPY_BYTES)


def _digests_of(parts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, str]]:
    return [{name: rows_sha256(rows) for name, rows in each.items()} for each in parts]


def rows_sha256(rows: Tensor) -> str:
    """Return the digest of an image's stored rows, which hashlib reads without a copy."""
    return sha256(bytes_of(rows)).hexdigest()


def build_head(
    path: Path, items: Sequence[ItemFacts], digests: Sequence[Mapping[str, str]],
    tensors: Sequence[RowTensor], facts: Mapping[str, Any], *, at_least: int = 0,
) -> bytes:  # fmt: skip
    """Return all bytes of a feature file before its rows, padded to `at_least` with spaces."""
    facts = {
        **dict.fromkeys(FILE_FACTS),
        **facts,
        "schema_version": SCHEMA_VERSION,
        "ids": [item.id for item in items],
        "images": [item.to_json(each) for item, each in zip(items, digests, strict=True)],
    }
    try:
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"its metadata cannot be written as JSON ({error})",
            name=str(path),
            remedy="pass VisionEncoder.metadata()",
        ) from None
    grids = torch.tensor([item.grid_thw for item in items], dtype=torch.int64, device="cpu")
    lengths = [item.n_rows for item in items]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
    integers = bytes(bytes_of(grids)) + bytes(bytes_of(offsets))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    position = 0
    for name, stored, shape in (  # in safetensors' own order
        ("image_grid_thw", torch.int64, (len(items), 3)),
        ("image_token_offsets", torch.int64, offsets.shape),
        *((t.name, t.dtype, (sum(i.rows_of(t.name) for i in items), t.width)) for t in tensors),
    ):
        end = position + math.prod(shape) * stored.itemsize
        header[name] = {
            "dtype": STORED_AS[stored], "shape": list(shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # to align the tensors
    if len(raw) > MAX_HEADER_BYTES:
        raise ExportError(
            f"its header would have {len(raw)} bytes",
            name=str(path),
            expected=f"at most {MAX_HEADER_BYTES}, which is the limit of safetensors",
            remedy="put fewer images into a file",
        )
    raw = raw.ljust(at_least - 8 - len(integers))
    return len(raw).to_bytes(8, "little") + raw + integers


def bytes_of(tensor: Tensor) -> Any:
    """View a contiguous CPU tensor as a uint8 array, because NumPy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
