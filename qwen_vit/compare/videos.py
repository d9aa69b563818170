"""Compare a video's frames with the references' frames, and prepare our rows and Hugging Face's."""

from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_vit.compare.huggingface import Processed, process_pairs
from qwen_vit.compare.result import FrameChoice, SampledFrames
from qwen_vit.config import ImageConfig
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.images.patches import Patches
from qwen_vit.images.regular_file import open_regular, unreadable
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Sampling, Video, VideoLimits, VideoOptions
from qwen_vit.video.reader import open_video
from qwen_vit.video.sampling import Timeline, sample_frames

__all__ = ["VideoRows", "compare_frames", "digest_of", "load_rows"]

BLOCK_BYTES = 2**20


class VideoRows(NamedTuple):
    patches: Patches
    processed: Processed
    size_px: tuple[int, int]
    frames: SampledFrames


def load_rows(name: str, options: VideoOptions, config: ImageConfig) -> VideoRows:
    resized: dict[int, NDArray[np.uint8]] = {}
    loaded = load_video(Video.of(name, options, name), config, keep=resized)
    ordered = [resized[at] for at in sorted(resized)]
    ordered += ordered[-1:] * (len(ordered) % 2)
    with open_video(name, name, VideoLimits()) as video:
        timeline = video.timeline
    frames = compare_frames(timeline, options, loaded.timing.frame_seconds, name)
    done = process_pairs(ordered, config, name)
    return VideoRows(loaded.patches, done, loaded.size_px, frames)


def digest_of(name: str) -> str:
    try:
        with open_regular(name, name, expected="a video") as file:
            digest = sha256()
            for block in iter(partial(file.read, BLOCK_BYTES), b""):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise unreadable(error, name) from None


def compare_frames(
    timeline: Timeline, options: VideoOptions, seconds: tuple[float, ...], name: str
) -> SampledFrames:
    """Compare our frames with those of both references.

    If a library runs here, it chooses its frames. Otherwise the library's rule in `video.sampling`
    chooses them.
    """
    ours, _ = sample_frames(timeline, options, name)
    choices = []
    for reference in REFERENCES:
        theirs, title, is_run = reference.choose(timeline, options, name)
        differ = len(ours)
        if theirs is not None:
            same = sum(a == b for a, b in zip(ours, theirs, strict=False))
            differ = max(len(ours), len(theirs)) - same
        is_taken = timeline.n_frames > 1 and reference.takes(options)
        is_judged = reference.rule == options.sampling and is_taken  # neither accepts one frame
        indices = None if theirs is None else tuple(theirs)
        choices.append(FrameChoice(title, is_run, is_judged, indices, differ))
    return SampledFrames(
        options.sampling, timeline.n_frames, timeline.rate, tuple(ours), seconds, tuple(choices)
    )


@dataclass(frozen=True, slots=True)
class _Reference:
    """Describe a library that samples frames, with the rule's name in `video.sampling`."""

    package: str
    version: str  # the rule's library
    rule: Sampling

    def takes(self, options: VideoOptions) -> bool:
        """Return whether the library supports these options. transformers accepts only whole
        videos."""
        return self.rule == "qwen" or not options.is_part

    def choose(
        self, timeline: Timeline, options: VideoOptions, name: str
    ) -> tuple[list[int] | None, str, bool]:
        """Return the chosen frames' indices, the library's name and version, and whether it ran.

        The indices are None if the library rejects the options.
        """
        if self.takes(options):
            run = _run_qwen if self.rule == "qwen" else _run_transformers
            try:
                return run(timeline, options), f"{self.package} {version(self.package)}", True
            except (TypeError, ValueError):  # the library rejects them
                return None, f"{self.package} {version(self.package)}", True
            except (ImportError, RuntimeError, AttributeError):  # or torchvision is missing
                pass
        return _by_rule(timeline, options, self, name), f"{self.package} {self.version}", False


REFERENCES = (
    _Reference("qwen-vl-utils", "0.0.14", "qwen"),
    _Reference("transformers", "5.23", "transformers"),
)


def _by_rule(
    timeline: Timeline, options: VideoOptions, reference: _Reference, name: str
) -> list[int] | None:
    if not reference.takes(options):
        return None
    keys = ("fps", "n_frames", "max_frames", "start", "end")
    chosen = {key: getattr(options, key) for key in keys}
    try:
        return sample_frames(timeline, VideoOptions(**chosen, sampling=reference.rule), name)[0]
    except (ArgumentError, ImageError):
        return None


def _run_qwen(timeline: Timeline, options: VideoOptions) -> list[int]:
    from qwen_vl_utils import vision_process as library  # type: ignore[import-not-found, unused-ignore]

    names = {"n_frames": "nframes", "start": "video_start", "end": "video_end"}
    asked: dict[str, Any] = {
        names.get(key, key): getattr(options, key)
        for key in ("n_frames", "start", "end", "max_frames")
        if getattr(options, key) is not None
    }
    if options.n_frames is None:
        asked["fps"] = options.fps
    first, last, count = library.calculate_video_frame_range(
        asked, timeline.n_frames, timeline.rate
    )
    n = library.smart_nframes(asked, total_frames=count, video_fps=timeline.rate)
    found: list[int] = torch.linspace(first, last, n).round().long().tolist()
    return found


def _run_transformers(timeline: Timeline, options: VideoOptions) -> list[int]:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    if options.n_frames is None:
        asked: dict[str, Any] = {"fps": options.fps, "max_frames": options.max_frames}
    else:
        asked = {"num_frames": options.n_frames}
    metadata = VideoMetadata(total_num_frames=timeline.n_frames, fps=timeline.rate)
    found: list[int] = Qwen2VLVideoProcessor().sample_frames(metadata, **asked).tolist()
    return found
