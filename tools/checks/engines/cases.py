"""Define the prompts that every engine answers, with images and videos between texts.

All sides are multiples of 28 px, so that no processor resizes and all processors agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

NEW_TOKENS = 8
PATCH_PX, MERGE, FRAMES_A_PATCH = 14, 2, 2
FPS = 4.0  # for every video: a step of its grid has 0.5 s
SECONDS_PER_GRID = FRAMES_A_PATCH / FPS

PATCHIFY = "(t f) (h a p) (w b q) c -> (t h w a b) (c f p q)"  # (a, b) is the place in a merge unit

Pixels = NDArray[np.uint8]

# Height and width in pixels. The controls exchange "tall" and "tall 2"; "wide" has partial
# windows in both directions; "strip" is one row of merge units.
PICTURES = {
    "tall": (84, 56),
    "tall 2": (84, 56),
    "square": (112, 112),
    "wide": (140, 196),
    "strip": (28, 168),
}
# Pictures of many sizes and shapes for the soak, one to eight merge units a side.
POOL = {
    f"pool {i}": (28 * height, 28 * width)
    for i, (height, width) in enumerate(np.random.default_rng(0).integers(1, 9, (90, 2)).tolist())
    if height * width >= 4  # the processor would enlarge a smaller picture
}
# (frames, height, width). transformers 5 numbers the text after a video correctly only if the last
# step in time is at most the longer side in tokens. These videos are short enough.
VIDEOS = {"clip": (4, 84, 112), "clip 2": (6, 84, 84)}


@dataclass(frozen=True, slots=True)
class Picture:
    """Mark an image's position in a prompt."""

    name: str


@dataclass(frozen=True, slots=True)
class Video:
    """Mark a video's position in a prompt."""

    name: str


Part = str | Picture | Video


@dataclass(frozen=True, slots=True)
class Case:
    """Hold the parts of one prompt in order."""

    name: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Return the chat template's prompt, with one placeholder for each image or video."""
        return f"<|im_start|>user\n{''.join(map(_placeholder, self.parts))}<|im_end|>\n" + (
            "<|im_start|>assistant\n"
        )

    @property
    def pictures(self) -> list[str]:
        """Return the images' names, in the prompt's order."""
        return [part.name for part in self.parts if isinstance(part, Picture)]

    @property
    def videos(self) -> list[str]:
        """Return the videos' names, in the prompt's order."""
        return [part.name for part in self.parts if isinstance(part, Video)]


def _placeholder(part: Part) -> str:
    match part:
        case Picture():
            return "<|vision_start|><|image_pad|><|vision_end|>"
        case Video():
            return "<|vision_start|><|video_pad|><|vision_end|>"
    return part


CASES = (
    Case("tall", ("What is this? ", Picture("tall"))),
    Case("square", (Picture("square"), "Describe it.")),
    Case("wide", ("Look: ", Picture("wide"), " And?")),
    Case("strip", (Picture("strip"), "?")),
    Case("several", ("From ", Picture("tall"), " to ", Picture("wide"), " by ", Picture("tall 2"))),
    Case("swapped", ("From ", Picture("tall 2"), " to ", Picture("wide"), " by ", Picture("tall"))),
    Case("text", ("No picture here.",)),
    Case("video", ("What moves? ", Video("clip"))),
    Case("videos and a picture", (Video("clip 2"), Picture("tall"), " then ", Video("clip"), "?")),
)


def case(name: str) -> Case:
    """Return a case by name."""
    return next(each for each in CASES if each.name == name)


def frames(name: str) -> Pixels:
    """Return reproducible frames (T, height, width, 3) of an image (one frame) or a video.

    A frame has a coarse pattern and noise, so that means differ between images, and patches differ
    within an image.
    """
    sizes = {**PICTURES, **POOL}
    shape = VIDEOS[name] if name in VIDEOS else (1, *sizes[name])
    seed = [*PICTURES, *VIDEOS, *POOL].index(name)
    numbers = np.random.default_rng(seed)
    steps, height, width = shape
    coarse = numbers.integers(0, 200, (steps, height // 14, width // 14, 3))
    noise = numbers.integers(0, 56, (*shape, 3))
    return (coarse.repeat(14, axis=1).repeat(14, axis=2) + noise).astype(np.uint8)


def grid(name: str) -> tuple[int, int, int]:
    """Return (frames, height, width) in patches."""
    steps, height, width, _ = frames(name).shape
    return -(-steps // FRAMES_A_PATCH), height // PATCH_PX, width // PATCH_PX


def rows(names: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute the rows (N, 1176) in float64 for transformers' tower, from the formula.

    Source: transformers' models/qwen2_vl/image_processing_qwen2_vl.py.
    """
    parts = []
    for name in names:
        pixels = torch.from_numpy(frames(name)).double() / 255
        pixels = (pixels - torch.tensor(mean).double()) / torch.tensor(std).double()
        if len(pixels) == 1:
            pixels = pixels.repeat(FRAMES_A_PATCH, 1, 1, 1)  # a picture is two equal frames
        sides = {"f": FRAMES_A_PATCH, "a": MERGE, "b": MERGE, "p": PATCH_PX, "q": PATCH_PX}
        parts.append(rearrange(pixels, PATCHIFY, **sides))
    return torch.cat(parts)
