"""Writing feature files: whole or not at all, the same bytes for the same features."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qwen_vit.common.atomic_file import (
    AtomicFile,
    atomic_file,
    cannot_write,
    check_utf8,
    refuse_link,
)
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ArgumentError, ExportError, display_name, plural
from qwen_vit.feature_files.schema import METADATA_KEY, SCHEMA_VERSION
from qwen_vit.features import FailedImage, ImageFeatures, check_features

__all__ = ["FeatureWriter", "write_features"]

STORED_AS = {  # safetensors' own names
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
FLOATS = set(STORED_AS) - {torch.int64}
OF_A_SHARD = {"ids", "images", "errors"}  # metadata that other images may have come with
FLUSH_BYTES = 2**25  # of rows, before the system is asked to write them to the disk
COPY_BYTES = 2**18  # fits a cache
FILE_EACH = "write one file for each model and output"
AS_ENCODED = "write what `encode` returned"


def write_features(
    path: str | Path,
    features: Iterable[ImageFeatures | FailedImage],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = True,
) -> Path:
    """Write a feature file whole or not at all; failed images are left out.

    >>> import tempfile
    >>> from qwen_vit import VisionEncoder, load_features
    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> encoded = encoder.encode(["tests/images/chelsea.png"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_features(folder + "/cat.safetensors", encoded, encoder.metadata())
    ...     load_features(path)["tests/images/chelsea.png"].grid_thw
    (1, 22, 32)

    `metadata` is what `VisionEncoder.metadata()` gives. The bytes depend on the arguments alone.
    Raises ExportError for a file that exists where `overwrite` is False, two images of one id,
    embeddings that are not rows of finite numbers, nothing to write, or a folder that cannot be
    written.
    """
    path = Path(path)
    check_utf8(path)
    refuse_link(path)
    features = check_features(features)
    if not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata is {metadata!r}", expected="a mapping", remedy="pass encoder.metadata()"
        )
    if not features:
        raise ExportError("features is empty", name=str(path), remedy="pass at least one image")
    good = [feature for feature in features if isinstance(feature, ImageFeatures)]
    if not good:
        raise ExportError(
            f"no image to write: all {len(features)} failed",
            name=str(path),
            remedy="fix the causes that their errors name",
        )
    ids = [feature.id for feature in good]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ExportError(
            f"two images have the id {twice!r}",
            name=str(path),
            remedy="give each one its own, for example by dataclasses.replace(features, id=...)",
        )
    embeds = [_rows(path, f.id, f.embeds) for f in good]
    widths = sorted({tuple(e.shape[1:]) for e in embeds})
    if len(widths) > 1:
        shapes = ", ".join(f"(n, {width[0]})" for width in widths)
        raise ExportError(
            f"embeddings of the shapes {shapes} do not fit into one file",
            name=str(path),
            remedy=FILE_EACH,
        )
    broken = [name for name, e in zip(ids, embeds, strict=True) if not all_finite(e)]
    if broken:
        raise ExportError(
            f"the embeddings of {broken[0]!r} ({len(broken)} of {plural(len(ids), 'image')}) "
            "contain NaN or infinity",
            name=str(path),
            remedy="check the checkpoint with `qwen-vit info`, and try float32",
        )
    facts = {name: value for name, value in metadata.items() if name not in OF_A_SHARD}
    facts["patches_per_row"] = _patches_per_row(path, good, metadata.get("output") == "mean")
    dtype = reduce(torch.promote_types, (e.dtype for e in embeds))
    grids = [feature.grid_thw for feature in good]
    head = _head(path, ids, grids, list(map(len, embeds)), widths[0][0], dtype, facts)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(head)
        for rows in embeds:
            file.write(_bytes_of(rows.to(dtype).contiguous()))
    return path


class FeatureWriter:
    """Writes a feature file of unknown length: rows as they come, the header at the end.

    >>> with FeatureWriter(path, 192, torch.float32, 2**16) as writer:  # doctest: +SKIP
    ...     writer.add(torch.ones(6, 192), [("a.jpg", (1, 4, 6), 6)])
    ...     writer.save(encoder.metadata())

    The header holds all lengths, so `head_bytes` are reserved for it; a larger header has the rows
    copied behind it. The file's bytes depend on `head_bytes`. The file appears under its name whole
    or not at all: without `save` it is discarded when the block ends. Raises ExportError where the
    system refuses to write.
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype, head_bytes: int) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self.ids: list[str] = []
        self._grids: list[tuple[int, int, int]] = []
        self._lengths: list[int] = []
        self._head_bytes = min(head_bytes + -head_bytes % 8, MAX_HEADER_BYTES)
        self._end = self._flushed = self._head_bytes  # end of the rows; of those flushed
        self._growing = AtomicFile(path)
        self._growing.file.seek(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Leave nothing of a file that was not saved; harmless when it was."""
        self._growing.discard()

    def add(self, rows: Tensor, images: Sequence[tuple[str, tuple[int, int, int], int]]) -> None:
        """Append images: their rows (n, width), and each one's id, grid and number of rows."""
        n_rows = sum(length for _, _, length in images)
        if rows.shape != (n_rows, self.width):
            raise ExportError(
                f"the embeddings of {plural(len(images), 'image')} from "
                f"{display_name(images[0][0])} on have the shape {tuple(rows.shape)}",
                name=str(self.path),
                expected=f"({n_rows}, {self.width})",
                remedy=FILE_EACH,
            )
        rows = rows.detach().to("cpu", self.dtype).contiguous()
        try:
            self._end += self._growing.file.write(_bytes_of(rows))
            if self._end - self._flushed >= FLUSH_BYTES:
                self._begin_flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None
        for name, grid, length in images:
            self.ids.append(name)
            self._grids.append(grid)
            self._lengths.append(length)

    def save(self, facts: Mapping[str, Any]) -> None:
        """Write the header and give the file its name; `facts` are JSON values for its metadata."""
        head = _head(
            self.path, self.ids, self._grids, self._lengths, self.width, self.dtype, facts,
            at_least=self._head_bytes,
        )  # fmt: skip
        if len(head) > self._head_bytes:
            self._copy_behind(head)
            return
        try:
            self._growing.file.seek(0)
            self._growing.file.write(head)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._growing.commit()

    def _copy_behind(self, head: bytes) -> None:
        with atomic_file(self.path) as file:
            file.write(head)
            self._growing.file.seek(self._head_bytes)  # seeking writes what is still buffered
            shutil.copyfileobj(self._growing.file, file, COPY_BYTES)
        self._growing.discard()

    def _begin_flush(self) -> None:
        """Start writing to the disk, so that the final flush is short."""
        if hasattr(os, "posix_fadvise"):  # Linux then starts to write and returns at once
            length = self._end - self._flushed
            os.posix_fadvise(
                self._growing.file.fileno(), self._flushed, length, os.POSIX_FADV_DONTNEED
            )
        self._flushed = self._end


def _head(
    path: Path, ids: Sequence[str], grids: Sequence[tuple[int, int, int]], lengths: Sequence[int],
    width: int, dtype: torch.dtype, facts: Mapping[str, Any], *, at_least: int = 0,
) -> bytes:  # fmt: skip
    """All of a feature file before its rows; spaces fill it up to `at_least` bytes."""
    facts = {**facts, "schema_version": SCHEMA_VERSION, "ids": ids}
    try:
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"its metadata cannot be written as JSON ({error})",
            name=str(path),
            remedy="pass VisionEncoder.metadata()",
        ) from None
    grid_rows = torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 3)
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    position = 0
    for name, stored, shape in (  # in the order in which safetensors itself would write them
        ("image_grid_thw", torch.int64, grid_rows.shape),
        ("image_token_offsets", torch.int64, offsets.shape),
        ("image_embeds", dtype, (sum(lengths), width)),
    ):
        end = position + math.prod(shape) * stored.itemsize
        header[name] = {
            "dtype": STORED_AS[stored], "shape": list(shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    integers = bytes(_bytes_of(grid_rows)) + bytes(_bytes_of(offsets))
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    if len(raw) > MAX_HEADER_BYTES:
        raise ExportError(
            f"its header would have {len(raw)} bytes",
            name=str(path),
            expected=f"at most {MAX_HEADER_BYTES}, the most that safetensors reads",
            remedy="put fewer images into a file",
        )
    raw = raw.ljust(at_least - 8 - len(integers))
    return len(raw).to_bytes(8, "little") + raw + integers


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _rows(path: Path, name: str, embeds: Tensor) -> Tensor:
    """An image's rows on the CPU. Raises ExportError for what a feature file cannot hold."""
    if not isinstance(embeds, Tensor) or embeds.layout is not torch.strided:
        raise ExportError(
            f"the embeddings of {name!r} are a {type(embeds).__name__}",
            name=str(path),
            expected="a dense torch tensor",
            remedy=AS_ENCODED,
        )
    if embeds.dim() != 2 or embeds.dtype not in FLOATS:
        raise ExportError(
            f"the embeddings of {name!r} are {embeds.dtype} of the shape {tuple(embeds.shape)}",
            name=str(path),
            expected="floating-point rows (n, width)",
            remedy=AS_ENCODED,
        )
    return embeds.cpu()


def _patches_per_row(path: Path, features: Sequence[ImageFeatures], is_mean: bool) -> int | None:
    """4 for merged tokens, 1 for patches, from the images' grids; None for means of one row each.

    Raises ExportError unless it is the same whole number for every image.
    """
    if is_mean and all(len(f.embeds) == 1 for f in features):
        return None
    found: dict[int, str] = {}
    for feature in features:
        n_rows, n_patches = len(feature.embeds), math.prod(feature.grid_thw)
        if n_rows == 0 or n_patches == 0 or n_patches % n_rows:
            raise ExportError(
                f"{feature.id!r} has {n_rows} rows for a grid of {feature.grid_thw}",
                name=str(path),
                expected="a whole number of patches for each row",
                remedy=AS_ENCODED,
            )
        found.setdefault(n_patches // n_rows, feature.id)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise ExportError(
            f"{one!r} has {first} patches per row and {other!r} has {second}",
            name=str(path),
            expected="the same",
            remedy='write merged and output="patch" features to separate files',
        )
    return next(iter(found))
