"""What an image becomes, and the file that holds it for a downstream language model.

A feature file is one safetensors file: `image_embeds` (T, D), `image_grid_thw` (N, 3) int64 and
`image_token_offsets` (N + 1,) int64, so that image i owns rows offsets[i] : offsets[i + 1]. Its
metadata is a single key that holds sorted JSON, because safetensors writes several keys in random
order and the same features must give the same bytes. `feature_files` reads it.
"""

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwen_vit.errors import ExportError, ImageError

__all__ = ["METADATA_KEY", "SCHEMA_VERSION", "ImageFeatures", "write_features"]

SCHEMA_VERSION = 1
METADATA_KEY = "qwen_vit"


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """One image's embeddings, or the error that it met.

    `embeds` is (n_tokens, out_hidden_size), row-major over the merged cells, on the encoder's
    device and in its dtype; (n_patches, hidden_size), row-major over patches, for output="patch".
    `grid_thw` is (t, h, w) in patches. Both are None where `error` is set. `size_px` is the
    original (height, width), and `notes` is what the image policy did.
    """

    id: str
    embeds: Tensor | None
    grid_thw: tuple[int, int, int] | None
    size_px: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    error: ImageError | None = None


def write_features(
    path: str | Path, features: Sequence[ImageFeatures], metadata: Mapping[str, Any]
) -> Path:
    """Write a feature file whole or not at all; images with an error are left out.

    `metadata` is what `VisionEncoder.metadata()` gives. The bytes depend on the arguments alone.
    Raises ExportError for two images of one id, values that are not finite, nothing to write, or a
    folder that cannot be written.
    """
    path = Path(path)
    good = [feature for feature in features if feature.embeds is not None]
    if not good:
        raise ExportError(f"{path} would hold no image: every one of {len(features)} failed")
    ids = [feature.id for feature in good]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ExportError(f"{path}: two images have the id {twice!r}; give each one its own")
    embeds = [feature.embeds.cpu() for feature in good if feature.embeds is not None]
    widths = sorted({tuple(e.shape[1:]) for e in embeds})
    if len(widths) > 1:
        raise ExportError(
            f"{path}: embeddings of the shapes {', '.join(f'(n, {w[0]})' for w in widths)} do not "
            "go into one file; write one file for each model and output"
        )
    broken = [name for name, e in zip(ids, embeds, strict=True) if not e.isfinite().all()]
    if broken:
        raise ExportError(
            f"{path}: the embeddings of {broken[0]!r} ({len(broken)} of {len(ids)} images) hold "
            "NaN or infinity; check the checkpoint with `qwen-vit info`, and try float32"
        )
    patches_per_row = _patches_per_row(path, good)
    lengths = torch.tensor([len(e) for e in embeds], dtype=torch.int64)
    tensors = {
        "image_embeds": torch.cat(embeds),
        "image_grid_thw": torch.tensor([f.grid_thw for f in good], dtype=torch.int64),
        "image_token_offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    }
    facts = {
        **metadata,
        "schema_version": SCHEMA_VERSION,
        "ids": ids,
        "patches_per_row": patches_per_row,
    }
    try:
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: its metadata cannot be JSON ({error}); pass VisionEncoder.metadata()"
        ) from None
    _write_atomically(path, tensors, {METADATA_KEY: text})
    return path


def _write_atomically(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = path.with_name(f".qwen-vit-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.touch()  # the user's own permissions: safetensors' are for the owner alone
        mode = temporary.stat().st_mode & 0o777
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"{path} could not be written ({reason}); check the folder, its permissions and the "
            "space on its disk"
        ) from None
    finally:  # whatever stopped it, an interrupt too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _patches_per_row(path: Path, features: Sequence[ImageFeatures]) -> int:
    """4 for merged tokens, 1 for patches: the same for every image, as its grid has it."""
    found: dict[int, str] = {}
    for feature in features:
        n_rows = 0 if feature.embeds is None else len(feature.embeds)
        n_patches = math.prod(feature.grid_thw or (0,))
        if n_rows == 0 or n_patches % n_rows:
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
