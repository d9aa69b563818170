"""Describe a feature file or an export folder from its headers and settings."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from qwen_vit.common.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorInfo,
    read_header,
)
from qwen_vit.common.storage import is_remote
from qwen_vit.common.store_path import AnyPath
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.listed import listings_of
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.feature_files.schema import SHARD, shard_name

__all__ = ["describe_features", "feature_files_of", "holds_features"]

EXPORT_SETTINGS = "export.json"
SUFFIX = ".safetensors"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def holds_features(path: str) -> bool:
    """Return whether a path may contain features. Without the suffix .safetensors, a file's first
    bytes decide.

    >>> holds_features("tests/photographs"), holds_features("features.safetensors")
    (False, True)
    """
    if is_remote(path):
        return True
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, EXPORT_SETTINGS)):
            return True
        with suppress(OSError):
            return any(map(SHARD.fullmatch, os.listdir(path)))
        return False
    return path.lower().endswith(SUFFIX) or _begins_as_safetensors(path)


def _begins_as_safetensors(path: str) -> bool:
    with suppress(OSError):
        if os.path.isfile(path):  # to open a FIFO could block
            with open(path, "rb") as file:
                start = file.read(LENGTH_BYTES + 1)
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            return start[LENGTH_BYTES:] == b"{" and length <= MAX_HEADER_BYTES
    return False


def describe_features(path: str | Path) -> dict[str, Any]:
    """Return the number of images and rows, the rows' width and dtype, and the encoder's facts, as
    JSON values.

    >>> describe_features("export")["images_done"]  # doctest: +SKIP
    497

    `images_saved` counts an export's images that are saved in unfinished shards. `rows` and `bytes`
    include these images.
    """
    features = load_features(path)
    n_images = len(features)  # also reports a damaged shard as an ExportError
    metadata = features.metadata
    files = feature_files_of(features)
    segments = features.segments if isinstance(features, FeatureFolder) else {}
    stored = [*files, *(file.path for kept in segments.values() for file in kept)]
    tensors = [read_header(file)["image_embeds"] for file in stored]
    facts: dict[str, Any] = {
        "kind": "feature file",
        "path": str(path),
        "images_done": n_images,
    }
    if isinstance(features, FeatureFolder):
        failed = Counter(each.code for each in features.errors)
        failed += Counter(
            error.code
            for shard, kept in segments.items()
            for file in kept
            for error in file.errors
            if features.is_current(shard, error.id)
        )
        saved = len(_current_row_counts(features, segments))
        facts |= {
            "kind": "export folder",
            "images_saved": saved,
            "images_to_do": len(features.listing) - n_images - saved - failed.total(),
            "images_failed": dict(failed.most_common()),
            "shards": len(files),
            "shards_missing": n_shards_of(features) - len(files),
        }
    return {
        **facts,
        "rows": _count_rows(features),
        **_row_facts(tensors),
        "bytes": sum(file.stat().st_size for file in stored),
        "output": features[0].output if n_images else metadata.get("output"),
        "layers": metadata.get("layers") or [],
        "quantization": metadata.get("quantization"),
        "model": metadata.get("model"),
        "commit": metadata.get("commit"),
        "weights_sha256": metadata.get("weights_sha256"),
        "versions": metadata.get("versions"),
        "schema_version": metadata.get("schema_version"),
    }


def feature_files_of(features: FeatureFile | FeatureFolder) -> list[AnyPath]:
    """Return the feature file, or every shard that existed at opening."""
    if isinstance(features, FeatureFile):
        return [features.path]
    return [features.path / shard_name(shard) for shard in features.shards]


def n_shards_of(features: FeatureFolder) -> int:
    return listings_of(features.metadata, features.path / EXPORT_SETTINGS)[-1].shards.stop


def _count_rows(features: FeatureFile | FeatureFolder) -> int:
    if isinstance(features, FeatureFile):
        return sum(features.row_counts)
    files = ({shard: [features.open_shard(shard)]} for shard in features.shards)
    return sum(
        sum(_current_row_counts(features, each)) for each in chain(files, [features.segments])
    )


def _current_row_counts(
    folder: FeatureFolder, files: Mapping[int, Sequence[FeatureFile]]
) -> list[int]:
    """Return the row count of each image that no later listing replaced or withdrew."""
    return [
        count
        for shard, parts in files.items()
        for file in parts
        for name, count in zip(file.ids, file.row_counts, strict=True)
        if folder.is_current(shard, name)
    ]


def _row_facts(tensors: list[TensorInfo]) -> dict[str, Any]:
    if not tensors:
        return {"width": None, "dtype": None}
    return {"width": tensors[0].shape[1], "dtype": DTYPES.get(tensors[0].dtype, tensors[0].dtype)}
