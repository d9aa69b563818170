"""Write feature files atomically and deterministically."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_vit.common.arguments import typed_repr
from qwen_vit.common.atomic_file import atomic_file, check_target
from qwen_vit.common.tensors import all_finite, odd_kind, resolved
from qwen_vit.errors import ArgumentError, ExportError, Wording, plural
from qwen_vit.feature_files.schema import EMBEDS, ItemFacts, rows_by_tensor
from qwen_vit.feature_files.writer import (
    FILE_EACH,
    FLOATS,
    RowTensor,
    build_head,
    bytes_of,
    rows_sha256,
)
from qwen_vit.features import (
    TRY_FLOAT32,
    UNKNOWN_SIZE,
    AnyFeatures,
    FailedImage,
    ImageFeatures,
    VideoFeatures,
    check_features,
    dtype_name,
)
from qwen_vit.images.image import EXIF_IGNORED, ExifPolicy

__all__ = ["write_features"]

OF_A_SHARD = {"ids", "images", "errors"}  # metadata that belongs to one shard's images
AS_ENCODED = "write what `encode` returned"


def write_features(
    path: str | Path,
    features: AnyFeatures,
    metadata: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a feature file completely or not at all. Omit failed images.

    >>> import tempfile
    >>> from qwen_vit import VisionEncoder, load_features
    >>> encoder = VisionEncoder.from_pretrained("tiny")
    >>> encoded = encoder.encode(["tests/photographs/chelsea.png"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_features(folder + "/cat.safetensors", encoded, encoder.metadata())
    ...     load_features(path)["tests/photographs/chelsea.png"].grid_thw
    (1, 22, 32)

    The bytes depend only on the arguments.

    Args:
        path: the file. Its format is safetensors, and its suffix must not name another format.
        features: the features of one image, or of several images with different ids. Their rows
            are finite floating-point tensors (n, width) that fit their grids. All images have the
            same widths, the same layers and the same kind of rows.
        metadata: the result of `VisionEncoder.metadata()`, or other JSON values by name.
        overwrite: whether to replace an existing file.

    Returns:
        The path of the file.

    Raises:
        ExportError: `path` exists without `overwrite=True`, is a symbolic link or a file of an
            export, has the suffix of another format, is not UTF-8 or cannot be written. No image
            succeeded, a value of `features` or `metadata` is not as described above, or the file's
            header exceeds 100 MB.
        ArgumentError: `path` is an address or a folder's name, or an argument has the wrong type.
    """
    path = check_target("path", path)
    features = check_features(features)
    if not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata is {typed_repr(metadata)}",
            expected="a mapping",
            remedy="pass encoder.metadata()",
        )
    good = _good_features(path, features)
    columns = _columns(path, good)
    tensors = [RowTensor(name, *_form(path, name, rows)) for name, rows in columns.items()]
    broken = [
        f.id
        for f, *parts in zip(good, *columns.values(), strict=True)
        if not all(map(all_finite, parts))
    ]
    if broken:
        raise ExportError(
            f"the features of {broken[0]!r} ({len(broken)} of {plural(len(good), 'image')}) "
            "contain NaN or infinity",
            name=str(path),
            remedy=TRY_FLOAT32,
        )
    output, normalized = _output(path, good, metadata)
    facts = {name: value for name, value in metadata.items() if name not in OF_A_SHARD}
    facts |= {
        "output": output,
        "normalize": normalized,
        "layers": sorted(good[0].layers),
        "patches_per_row": _patches_per_row(path, good, output == "mean"),
        "computed_in": metadata.get("computed_in", metadata.get("dtype")),
        "dtype": dtype_name(tensors[0].dtype),
    }
    items, digests = [_item_of(feature) for feature in good], []
    for place in range(len(good)):
        stored = {t.name: columns[t.name][place].to(t.dtype).contiguous() for t in tensors}
        digests.append({name: rows_sha256(rows) for name, rows in stored.items()})
    head = build_head(path, items, digests, tensors, facts)
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(head)
        for tensor in tensors:
            for rows in columns[tensor.name]:
                file.write(bytes_of(rows.to(tensor.dtype).contiguous()))
    return path


def _good_features(
    path: Path, features: Sequence[ImageFeatures | FailedImage]
) -> list[ImageFeatures]:
    if not features:
        raise ExportError("features is empty", name=str(path), remedy="pass at least one image")
    good = [feature for feature in features if isinstance(feature, ImageFeatures)]
    if not good:
        raise ExportError(
            f"no image to write: {plural(len(features), 'image')} failed",
            name=str(path),
            remedy=Wording("fix the cause that its error gives", shell="fix the cause named above")
            if len(features) == 1
            else Wording(
                "fix the causes that their errors give", shell="fix the causes named above"
            ),
        )
    ids = [feature.id for feature in good]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ExportError(
            f"two images have the id {twice!r}",
            name=str(path),
            remedy="give them different ids, for example with "
            "`dataclasses.replace(features, id=...)`",
        )
    return good


def _item_of(feature: ImageFeatures) -> ItemFacts:
    is_image = feature.size_px != UNKNOWN_SIZE  # patches from the caller have no policy
    size_px = feature.size_px if is_image else None
    if isinstance(feature, VideoFeatures):
        return ItemFacts(
            feature.id, feature.grid_thw, len(feature.embeds), size_px, feature.notes,
            feature.sha256, kind="video", second_per_grid_t=feature.second_per_grid_t,
            frame_seconds=feature.frame_seconds,
        )  # fmt: skip
    return ItemFacts(
        feature.id, feature.grid_thw, len(feature.embeds), size_px,
        feature.notes, feature.sha256, exif=_exif(feature) if is_image else None,
    )  # fmt: skip


def _exif(feature: ImageFeatures) -> ExifPolicy:
    return "ignore" if EXIF_IGNORED in feature.notes else "apply"


def _columns(path: Path, features: Sequence[ImageFeatures]) -> dict[str, list[Tensor]]:
    """Return the images' rows on the CPU by tensor name, image_embeds first."""
    blocks = [sorted(feature.layers) for feature in features]
    other = next((place for place, each in enumerate(blocks) if each != blocks[0]), None)
    if other is not None:
        raise ExportError(
            f"{features[0].id!r} has the layers {blocks[0]} and {features[other].id!r} has "
            f"{blocks[other]}",
            name=str(path),
            expected="the same layers",
            remedy="write them to separate files",
        )
    found = [rows_by_tensor(feature) for feature in features]
    columns: dict[str, list[Tensor]] = {}
    for name in found[0]:
        columns[name] = []
        for feature, rows in zip(features, found, strict=True):
            what = feature.id if name == EMBEDS else f"{feature.id}: {name}"
            columns[name].append(_rows(path, what, rows[name]))
            n_patches = math.prod(feature.grid_thw)
            if name != EMBEDS and len(rows[name]) != n_patches:
                raise ExportError(
                    f"{feature.id!r} has {len(rows[name])} rows of {name} for a grid of "
                    f"{feature.grid_thw}",
                    name=str(path),
                    expected=f"{n_patches}, one for each patch",
                    remedy=AS_ENCODED,
                )
    return columns


def _form(path: Path, name: str, rows: Sequence[Tensor]) -> tuple[int, torch.dtype]:
    """Return the width of a tensor, and the dtype that can store all its rows."""
    widths = sorted({part.shape[1] for part in rows})
    if len(widths) > 1:
        shapes = ", ".join(f"(n, {width})" for width in widths)
        what = "embeddings" if name == EMBEDS else f"rows of {name}"
        raise ExportError(
            f"{what} of the shapes {shapes} do not fit into one file",
            name=str(path),
            remedy=FILE_EACH,
        )
    return widths[0], reduce(torch.promote_types, (part.dtype for part in rows))


def _output(
    path: Path, features: Sequence[ImageFeatures], metadata: Mapping[str, Any]
) -> tuple[str, bool]:
    """Return the kind of rows that all features share, and whether the rows have unit length."""
    if metadata.get("output") == "mean":  # of features that were made by hand
        features = [replace(feature, output="mean") for feature in features]
    kinds = {(f.output, f.normalized): f.id for f in features}
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise ExportError(
            f"{one!r} has {_kind_text(*first)} and {other!r} has {_kind_text(*second)}",
            name=str(path),
            expected="the same kind of rows",
            remedy="write them to separate files",
        )
    return next(iter(kinds))


def _kind_text(output: str, is_normalized: bool) -> str:
    return f"output={output!r}{' of unit length' if is_normalized else ''}"


def _rows(path: Path, name: str, embeds: Tensor) -> Tensor:
    kind = f"have the type {type(embeds).__name__}"
    if isinstance(embeds, Tensor):
        kind = odd_kind(embeds) and f"are a {odd_kind(embeds)} tensor"
    if kind:
        raise ExportError(
            f"the embeddings of {name!r} {kind}",
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
    return resolved(embeds.cpu())


def _patches_per_row(path: Path, features: Sequence[ImageFeatures], is_mean: bool) -> int | None:
    """Return the patches per row, such as 4 for merged tokens, or None for means."""
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
            f"the numbers of patches per row differ: {one!r} has {first} and {other!r} has "
            f"{second}",
            name=str(path),
            expected="the same number",
            remedy="write merged features and features of patches to separate files",
        )
    return next(iter(found))
