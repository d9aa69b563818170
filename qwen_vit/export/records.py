"""Define the records that an export's stages pass on: images, starts of shards, finished shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen_vit.errors import ImageError
from qwen_vit.export.manifest import ManifestRow
from qwen_vit.feature_files.segments import Segment
from qwen_vit.features import UNKNOWN_SIZE
from qwen_vit.images.frames import Frames
from qwen_vit.images.patches import Patches
from qwen_vit.images.picture import Picture
from qwen_vit.inputs.listing import Item
from qwen_vit.video.load import VideoTiming

__all__ = [
    "COPY", "ENCODE", "READ", "REST", "STAGES", "WRITE", "DoneShard", "ImageRecord", "ShardStart",
]  # fmt: skip

# The stages that an export may wait for.
STAGES = READ, ENCODE, COPY, WRITE, REST = "read and decode", "encode", "copy back", "write", "rest"

ROW_BYTES = 1_000  # of the manifest, in memory, at least


@dataclass(slots=True)
class ImageRecord:
    """Describe one image of a shard. Each stage of the export adds its results."""

    item: Item
    place: int = 0  # the image's place in its shard
    sha256: str = ""
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    grid_thw: tuple[int, int, int] = (0, 0, 0)
    patches: Patches | Picture | Frames | None = None  # exists between decoding and encoding
    timing: VideoTiming | None = None  # only for a video
    n_rows: int = 0  # the number of its rows in image_embeds
    stage: str = "read"
    error: ImageError | None = None

    @property
    def n_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.n_bytes


class ShardStart(NamedTuple):
    """Mark the start of a shard, before the records of its images.

    For a finished shard that the export keeps, `rows` are its manifest rows, and no image records
    follow.

    `segments` contain images that an earlier run saved. No image records follow for these images.
    `firsts` contains the index of each segment's first image, also for damaged segments. `replaces`
    marks an existing shard that the export writes again.
    """

    shard: int
    n_images: int
    rows: list[ManifestRow] | None
    segments: Sequence[Segment] = ()
    firsts: Sequence[int] = ()
    replaces: bool = False

    @property
    def n_bytes(self) -> int:
        return ROW_BYTES * len(self.rows or ())


class DoneShard(NamedTuple):
    """Describe a finished shard by its manifest rows. The first `n_kept` rows come from earlier
    runs."""

    shard: int
    rows: list[ManifestRow]
    n_kept: int = 0
