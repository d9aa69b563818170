"""What an image becomes, and the file that holds it for a downstream language model.

A feature file is one safetensors file: `image_embeds` (T, D), `image_grid_thw` (N, 3) int64 and
`image_token_offsets` (N + 1,) int64, so that image i owns rows offsets[i] : offsets[i + 1]. Its
metadata is a single key that holds sorted JSON, because safetensors writes several keys in random
order and the same features must give the same bytes. `feature_files` reads it.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.atomic_file import (
    AtomicFile,
    atomic_file,
    cannot_write,
    check_utf8,
    refuse_link,
)
from qwen_vit.common.safetensors_header import MAX_HEADER_BYTES
from qwen_vit.common.strict_json import is_integer
from qwen_vit.common.tensors import all_finite
from qwen_vit.errors import ArgumentError, ExportError, ImageError, display_name, plural

__all__ = [
    "METADATA_KEY",
    "SCHEMA_VERSION",
    "UNKNOWN_SIZE",
    "FailedImage",
    "FeatureWriter",
    "ImageFeatures",
    "check_features",
    "dtype_name",
    "not_finite",
    "write_features",
]

SCHEMA_VERSION = 1
METADATA_KEY = "qwen_vit"
STORED_AS = {  # safetensors' own names
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
UNKNOWN_SIZE = (0, 0)
FLOATS = set(STORED_AS) - {torch.int64}
OF_A_SHARD = {"ids", "images", "errors"}  # metadata that other images may have come with
FLUSH_BYTES = 2**25  # of rows, written before the disk is told to begin
COPY_BYTES = 2**18  # fits a cache


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """One image's embeddings.

    >>> features = ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))
    >>> features.map.shape
    torch.Size([1, 2, 3, 8])

    Attributes:
        id: the image's path, or what else its caller named it.
        embeds: (n_tokens, out_hidden_size), row-major over the merged cells, on the encoder's
            device and in its dtype; (n_patches, hidden_size), row-major over the patches, for
            output="patch".
        grid_thw: (frames, height, width) in patches.
        size_px: the original (height, width) in pixels; (0, 0) where only patches were given.
        notes: what the image policy did, such as "EXIF orientation 6 applied".
    """

    id: str
    embeds: Tensor
    grid_thw: tuple[int, int, int]
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape, dtype = tuple(self.embeds.shape), dtype_name(self.embeds.dtype)
        return f"ImageFeatures({self.id!r}, embeds={shape} {dtype}, grid_thw={self.grid_thw})"

    @property
    def error(self) -> None:
        """None: an image that failed is a `FailedImage`, whose `error` says why."""
        return None

    @property
    def map(self) -> Tensor:
        """`embeds` as a view (t, h, w, D): one cell a merged token, or a patch.

        Raises ArgumentError where the rows are not those of whole cells, as for output="mean".
        """
        (t, h, w), rows = self.grid_thw, len(self.embeds)
        side = math.isqrt(t * h * w // rows) if rows else 0
        if not side or h % side or w % side or rows * side**2 != t * h * w:
            raise ArgumentError(
                f"{rows} rows for a grid of {self.grid_thw}",
                name=self.id,
                expected="a row for each merged token or each patch",
                remedy='encode it with output="merged" or output="patch"',
            )
        return self.embeds.view(t, h // side, w // side, -1)

    def numpy(self) -> NDArray[np.float32]:
        """`embeds` as a float32 array on the host."""
        array: NDArray[np.float32] = self.embeds.detach().float().cpu().numpy()
        return array


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that could not be encoded, and why.

    Attributes:
        id: as `ImageFeatures.id`.
        error: what is wrong with it, with a stable `error.code`.
        stage: in an export, where it failed: "list", "read", "decode" or "encode".
        size_px: the original (height, width) in pixels; (0, 0) where it is not known.
    """

    id: str
    error: ImageError
    stage: str = ""
    size_px: tuple[int, int] = UNKNOWN_SIZE

    @property
    def code(self) -> str:
        """`error.code`: a key of `errors.IMAGE_CODES`."""
        return self.error.code

    @property
    def message(self) -> str:
        """The error's text."""
        return str(self.error)


def dtype_name(dtype: torch.dtype) -> str:
    """A type as files and options spell it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


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


def check_features(
    features: Iterable[ImageFeatures | FailedImage],
) -> list[ImageFeatures | FailedImage]:
    """The same as a list; ArgumentError for anything else, or for what holds anything else."""
    wanted = "ImageFeatures, as `encode` returns them"
    if isinstance(features, ImageFeatures | FailedImage | Tensor) or not isinstance(
        features, Iterable
    ):
        raise ArgumentError(
            f"features is one {type(features).__name__}", expected=f"a list of {wanted}"
        )
    features = list(features)
    for feature in features:
        if isinstance(feature, FailedImage):
            continue
        if not isinstance(feature, ImageFeatures):
            raise ArgumentError(f"features holds a {type(feature).__name__}", expected=wanted)
        grid = feature.grid_thw
        is_grid = isinstance(grid, tuple | list) and len(grid) == 3 and all(map(is_integer, grid))
        if not isinstance(feature.id, str) or not is_grid:
            raise ArgumentError(
                f"features holds one with the id {feature.id!r} and the grid_thw {grid!r}",
                expected="text and three whole numbers, as `encode` returns them",
            )
    return features


def not_finite(name: str) -> ImageError:
    """The error of an image whose embeddings hold NaN or infinity."""
    return ImageError(
        "its embeddings hold NaN or infinity",
        name=name,
        remedy="check the checkpoint with `qwen-vit info`, and try --dtype float32",
        code="not-finite",
    )


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
