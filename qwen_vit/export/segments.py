"""Save the encoded images of an unfinished shard in segments, for the next run.

A segment is a feature file with consecutive images of one shard, including their errors. The file
name gives the shard's number and the place of the segment's first image in the shard. The writer
saves a segment at an interrupt and, if `shard_seconds` is set, also every `shard_seconds` seconds.
The finished shard contains the rows of all its segments, and replaces them.
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vit.common.safetensors_header import read_header
from qwen_vit.errors import CheckpointError, ExportError
from qwen_vit.export.folder import ExportFolder
from qwen_vit.feature_files.file import FeatureFile, open_shard

__all__ = [
    "Segment",
    "count_kept",
    "find_segments",
    "open_segments",
    "remove_segments",
    "segment_name",
]

logger = logging.getLogger("qwen_vit")

SEGMENT = re.compile(r"segment-(\d{8})-(\d{8})\.safetensors")
RESULT = re.compile(r"(?:shard-\d{8}|segment-\d{8}-\d{8})\.safetensors")
ENCODED_AGAIN = "its images are encoded again"


@dataclass(frozen=True, slots=True)
class Segment:
    """Describe images `first` to `end` of a shard, and the file with their rows and errors."""

    file: FeatureFile
    first: int
    end: int


def segment_name(shard: int, first: int) -> str:
    """Return the file name of a segment.

    >>> segment_name(7, 32)
    'segment-00000007-00000032.safetensors'
    """
    return f"segment-{shard:08}-{first:08}.safetensors"


def find_segments(folder: ExportFolder) -> Mapping[int, Sequence[int]]:
    """Return the places of the first images of each shard's segments, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for name in {*folder.names(), *os.listdir(folder.scratch)}:
        if match := SEGMENT.fullmatch(name):
            found[int(match[1])].append(int(match[2]))
    return {shard: sorted(firsts) for shard, firsts in found.items()}


def open_segments(
    folder: ExportFolder, shard: int, firsts: Sequence[int], names: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Segment]:  # fmt: skip
    """Return the consecutive segments from the shard's first image on. `names` are the shard's ids.

    The function stops before a segment that is damaged or has other settings, and logs the reason.
    """
    segments, end = list[Segment](), 0
    for first in firsts:
        if first != end:
            break
        path = folder.fetch(segment_name(shard, first))
        if path is None:  # a store may list a removed file
            break
        try:
            file = open_shard(path)
        except ExportError as error:
            logger.warning("%s", ExportError.of(error, remedy=ENCODED_AGAIN))
            break
        failed = {error.id for error in file.errors}
        end = first + len(file) + len(failed)
        listed = names[first:end]
        is_ours = all(file.metadata.get(name) == value for name, value in settings.items())
        if not is_ours or end > len(names) or file.ids != [n for n in listed if n not in failed]:
            other = ExportError("has other settings", name=str(path), remedy=ENCODED_AGAIN)
            logger.warning("%s", other)
            break
        segments.append(Segment(file, first, end))
    return segments


def remove_segments(folder: ExportFolder, shard: int, firsts: Iterable[int]) -> None:
    """Remove segments of a finished shard."""
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
