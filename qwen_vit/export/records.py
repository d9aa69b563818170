"""The records between the stages of an export: images, the start of a shard, a finished shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen_vit.errors import ImageError
from qwen_vit.export.manifest import ManifestRow
from qwen_vit.export.segments import Segment
from qwen_vit.features import UNKNOWN_SIZE
from qwen_vit.images.patches import Patches
from qwen_vit.inputs.listing import Item
from qwen_vit.video.load import VideoTiming

__all__ = [
    "COPY", "ENCODE", "READ", "REST", "STAGES", "WRITE", "DoneShard", "ImageRecord", "ShardStart",
]  # fmt: skip

# The stages that an export may wait for.
STAGES = READ, ENCODE, COPY, WRITE, REST = "read and decode", "encode", "copy back", "write", "rest"

ROW_BYTES = 1_000  # of the manifest, in memory, or more


@dataclass(slots=True)
class ImageRecord:
    """One image on its way into a shard. Each stage adds its results."""

    item: Item
    place: int = 0  # in its shard
    sha256: str = ""
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    grid_thw: tuple[int, int, int] = (0, 0, 0)
    patches: Patches | None = None  # from its file to the encoder
    timing: VideoTiming | None = None  # of a video
    n_rows: int = 0  # of its features, as they are stored
    stage: str = "read"
    error: ImageError | None = None

    @property
    def n_bytes(self) -> int:
        """Its bytes in memory until it is encoded."""
        return 0 if self.patches is None else self.patches.pixels.nbytes


class ShardStart(NamedTuple):
    """Precedes a shard's images; a shard that exists already has its `rows`, and no images.

    Images that an earlier run kept are in `segments`; they do not follow. `firsts` has the places
    of all segments, damaged ones included. `replaces` says that a shard exists that is made again.
    """

    shard: int
    n_images: int
    rows: list[ManifestRow] | None
    segments: Sequence[Segment] = ()
    firsts: Sequence[int] = ()
    replaces: bool = False

    @property
    def n_bytes(self) -> int:
        """Its bytes in memory."""
        return ROW_BYTES * len(self.rows or ())


class DoneShard(NamedTuple):
    """A whole shard and its rows of the manifest, of which earlier runs made the first."""

    shard: int
    rows: list[ManifestRow]
    n_kept: int = 0
