"""Find and remove the segments of an export's shards, and count the images that a folder keeps.

The writer saves a segment at an interrupt and, if `shard_seconds` is set, also about every
`shard_seconds` seconds. The finished shard contains the rows of all its segments, and replaces
them.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qwen_vit.common.safetensors_header import read_header
from qwen_vit.errors import CheckpointError
from qwen_vit.export.folder import ExportFolder
from qwen_vit.feature_files.segments import segment_name, segments_among

__all__ = ["count_kept", "find_segments", "remove_segments"]

RESULT = re.compile(r"(?:shard-\d{8}|segment-\d{8}-\d{8})\.safetensors")


def find_segments(folder: ExportFolder) -> Mapping[int, Sequence[int]]:
    """Return the indices of the first images of each shard's segments, in order."""
    return segments_among({*folder.names(), *os.listdir(folder.scratch)})


def remove_segments(folder: ExportFolder, shard: int, firsts: Iterable[int]) -> None:
    for first in firsts:
        folder.remove(segment_name(shard, first))


def count_kept(folder: Path) -> int:
    """Return the number of images with rows in a folder's shards and segments, from headers."""
    count = 0
    for name in os.listdir(folder):
        if RESULT.fullmatch(name):
            with suppress(CheckpointError, KeyError, IndexError):
                count += int(read_header(folder / name)["image_grid_thw"].shape[0])
    return count
