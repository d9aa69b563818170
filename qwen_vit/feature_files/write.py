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
FLUSH_BYTES = 2**25  # of rows, written before the disk is told to begin
COPY_BYTES = 2**18  # fits a cache


def write_features(
    path: str | Path,
    features: Iterable[ImageFeatures | FailedImage],
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = True,
) -> Path:
    """Write a feature file whole or not at all; images with an error are left out.

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
    embeddings that are no rows of finite numbers, nothing to write, or a folder that cannot be
    written.
    """
    path = Path(path)
    check_utf8(path)
    refuse_link(path)
    features = check_features(features)
    if not isinstance(metadata, Mapping):
        raise ArgumentError(f"metadata is {metadata!r}, expected what encoder.metadata() gives")
    good = [feature for feature in features if isinstance(feature, ImageFeatures)]
    if not good:
        raise ExportError(f"{path} would hold no image: every one of {len(features)} failed")
    ids = [feature.id for feature in good]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ExportError(
            f"{path}: two images have the id {twice!r}; give each one its own, as by "
            "dataclasses.replace(features, id=...)"
        )
    embeds = [_rows(path, f.id, f.embeds) for f in good]
    widths = sorted({tuple(e.shape[1:]) for e in embeds})
    if len(widths) > 1:
        raise ExportError(
            f"{path}: embeddings of the shapes {', '.join(f'(n, {w[0]})' for w in widths)} do not "
            "go into one file; write one file for each model and output"
        )
    broken = [name for name, e in zip(ids, embeds, strict=True) if not all_finite(e)]
    if broken:
        raise ExportError(
            f"{path}: the embeddings of {broken[0]!r} ({len(broken)} of {len(ids)} images) hold "
            "NaN or infinity; check the checkpoint with `qwen-vit info`, and try float32"
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
    """A feature file as it grows: its rows are written as they come, and its head at the end.

    The head knows all lengths, so room is left for it: `head_bytes`, from which the file's bytes
    follow, too. A head that needs more has the rows copied behind it. Whole under its name, or not
    there: what is not saved is discarded when the block ends. Raises ExportError where the system
    refuses to write.
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype, head_bytes: int) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self.ids: list[str] = []
        self._grids: list[tuple[int, int, int]] = []
        self._lengths: list[int] = []
        self._head_bytes = min(head_bytes + -head_bytes % 8, MAX_HEADER_BYTES)
        self._end = self._flushed = self._head_bytes  # of the rows; and what the system was told of
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
        """Append images: their rows (n, width), and of each its id, its grid and its share of n."""
        n_rows = sum(length for _, _, length in images)
        if rows.shape != (n_rows, self.width):
            raise ExportError(
                f"{self.path}: the embeddings of {plural(len(images), 'image')} from "
                f"{display_name(images[0][0])} on have the shape {tuple(rows.shape)}, expected "
                f"({n_rows}, {self.width}); write one file for each model and output"
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
        """Write the head, and give the file its name; `facts` are JSON values for its metadata."""
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
            self._growing.file.seek(self._head_bytes)  # which writes what is still in a buffer
            shutil.copyfileobj(self._growing.file, file, COPY_BYTES)
        self._growing.discard()

    def _begin_flush(self) -> None:
        """Have the disk begin with what is there, so that little is left to wait for at the end."""
        if hasattr(os, "posix_fadvise"):  # Linux then starts to write, and does not wait
            length = self._end - self._flushed
            os.posix_fadvise(
                self._growing.file.fileno(), self._flushed, length, os.POSIX_FADV_DONTNEED
            )
        self._flushed = self._end


def _head(
    path: Path, ids: Sequence[str], grids: Sequence[tuple[int, int, int]], lengths: Sequence[int],
    width: int, dtype: torch.dtype, facts: Mapping[str, Any], *, at_least: int = 0,
) -> bytes:  # fmt: skip
    """All of a feature file that comes before its rows; spaces fill it up to `at_least` bytes."""
    facts = {**facts, "schema_version": SCHEMA_VERSION, "ids": ids}
    try:
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: its metadata cannot be JSON ({error}); pass VisionEncoder.metadata()"
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
            f"{path} would have a header of {len(raw)} bytes, of which safetensors reads "
            f"at most {MAX_HEADER_BYTES}; put fewer images into a file"
        )
    raw = raw.ljust(at_least - 8 - len(integers))
    return len(raw).to_bytes(8, "little") + raw + integers


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _rows(path: Path, name: str, embeds: Tensor) -> Tensor:
    """An image's rows on the CPU, or ExportError for what no feature file can hold."""
    if not isinstance(embeds, Tensor) or embeds.layout is not torch.strided:
        raise ExportError(
            f"{path}: the embeddings of {name!r} are a {type(embeds).__name__}, expected a dense "
            "torch tensor; write what `encode` returned"
        )
    if embeds.dim() != 2 or embeds.dtype not in FLOATS:
        raise ExportError(
            f"{path}: the embeddings of {name!r} are {embeds.dtype} of the shape "
            f"{tuple(embeds.shape)}, expected floating-point rows (n, width); write what `encode` "
            "returned"
        )
    return embeds.cpu()


def _patches_per_row(path: Path, features: Sequence[ImageFeatures], is_mean: bool) -> int | None:
    """4 for merged tokens, 1 for patches: the same for every image, as its grid has it.

    None where each image's one row is the mean of its tokens.
    """
    if is_mean and all(len(f.embeds) == 1 for f in features):
        return None
    found: dict[int, str] = {}
    for feature in features:
        n_rows, n_patches = len(feature.embeds), math.prod(feature.grid_thw)
        if n_rows == 0 or n_patches == 0 or n_patches % n_rows:
            raise ExportError(
                f"{path}: {feature.id!r} has {n_rows} rows for a grid of {feature.grid_thw}, which "
                "is not a whole number of patches each; write what `encode` returned"
            )
        found.setdefault(n_patches // n_rows, feature.id)
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise ExportError(
            f"{path}: {one!r} has {first} patches per row and {other!r} has {second}, expected the "
            'same; write merged and output="patch" features to files of their own'
        )
    return next(iter(found))
