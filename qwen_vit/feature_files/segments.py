"""Read the segments of an unfinished shard: the images that an interrupted export saved.

A segment is a feature file with consecutive images of one shard, including their errors. The file
name contains the shard's number and the index of the segment's first image in the shard.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vit.common.store_path import AnyPath
from qwen_vit.errors import ExportError
from qwen_vit.feature_files.file import FeatureFile, open_shard

__all__ = ["Segment", "open_segments", "segment_name", "segments_among"]

logger = logging.getLogger("qwen_vit")

SEGMENT = re.compile(r"segment-(\d{8})-(\d{8})\.safetensors")
ENCODED_AGAIN = "its images are encoded again"


@dataclass(frozen=True, slots=True)
class Segment:
    """Describe the images `first` to `end` - 1 of a shard, and the file with their rows and
    errors."""

    file: FeatureFile
    first: int
    end: int


def segment_name(shard: int, first: int) -> str:
    """Return the file name of a segment.

    >>> segment_name(7, 32)
    'segment-00000007-00000032.safetensors'
    """
    return f"segment-{shard:08}-{first:08}.safetensors"


def segments_among(names: Iterable[str]) -> Mapping[int, Sequence[int]]:
    """Return the indices of the first images of each shard's segments, in order, from file names.

    >>> segments_among(["export.json", segment_name(7, 32), segment_name(7, 0)])
    {7: [0, 32]}
    """
    found: dict[int, list[int]] = defaultdict(list)
    for name in names:
        if match := SEGMENT.fullmatch(name):
            found[int(match[1])].append(int(match[2]))
    return {shard: sorted(firsts) for shard, firsts in found.items()}


def open_segments(
    path_of: Callable[[str], AnyPath | None], shard: int, firsts: Sequence[int],
    names: Sequence[str], is_ours: Callable[[Mapping[str, Any]], bool],
) -> list[Segment]:  # fmt: skip
    """Return the consecutive segments from the shard's first image on.

    The function stops before a segment that is damaged, or has other settings or images, and logs
    the reason.

    Args:
        path_of: a function that returns a segment's path from its name. None means that a store
            listed a removed file.
        shard: the shard's number.
        firsts: the indices of the segments' first images, in order.
        names: the shard's ids, in order.
        is_ours: a function that returns whether a segment's metadata have the expected settings.
    """
    segments, end = list[Segment](), 0
    for first in firsts:
        if first != end:
            break
        path = path_of(segment_name(shard, first))
        if path is None:
            break
        try:
            file = open_shard(path)
        except ExportError as error:
            logger.warning("%s", ExportError.of(error, remedy=ENCODED_AGAIN))
            break
        failed = {error.id for error in file.errors}
        end = first + len(file) + len(failed)
        are_listed = file.ids == [name for name in names[first:end] if name not in failed]
        if not is_ours(file.metadata) or end > len(names) or not are_listed:
            other = ExportError(
                "has other settings or images", name=str(path), remedy=ENCODED_AGAIN
            )
            logger.warning("%s", other)
            break
        segments.append(Segment(file, first, end))
    return segments
