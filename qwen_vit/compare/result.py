"""Hold the result of a comparison with Hugging Face, per image and stage, and convert it to
JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from qwen_vit.compare.tolerance import RELATIVE_TOLERANCE, Difference, Verdict, ratio
from qwen_vit.config import Grid
from qwen_vit.errors import ImageError, plural

__all__ = [
    "Comparison", "FeatureMaps", "FrameChoice", "ImageComparison", "Preprocessing", "SampledFrames",
    "Stage", "StepError", "StepMaps",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Hold the difference between our pixels and one Hugging Face processor's pixels.

    `values_differ` counts the pixel values, out of `values`, with a different grey level.
    `largest_levels` is the largest difference, out of 255. Both numbers are None if the grids
    differ.
    """

    processor: str
    grid_thw: tuple[int, int, int]  # Hugging Face's grid
    same_grid: bool
    values: int
    values_differ: int | None
    largest_levels: int | None
    relative: float | None  # difference of the normalised values

    @property
    def passed(self) -> bool:
        return self.same_grid and (self.relative or 0.0) <= RELATIVE_TOLERANCE

    @property
    def is_judged(self) -> bool:
        """Return whether a difference is a failure. torchvision's processor resizes differently."""
        return self.processor == "pillow"


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold the verdict and the errors of one stage, between both towers and against float64."""

    name: str
    difference: Difference
    ours: float  # relative errors against float64
    theirs: float
    verdict: Verdict

    @property
    def ratio(self) -> float:
        return ratio(self.ours, self.theirs)


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Hold the frames that a reference samples from a video.

    If `is_run`, the installed library chose the frames; otherwise the rule in `video.sampling` did.
    `is_judged` is True for the reference that our sampling follows, if it accepts the video and the
    options.
    """

    reference: str  # the library and its version
    is_run: bool
    is_judged: bool
    indices: tuple[int, ...] | None  # None if the reference samples no frames of this video
    differ: int  # number of positions where the frames differ, or only one side has a frame

    @property
    def passed(self) -> bool:
        return self.indices is not None and not self.differ


@dataclass(frozen=True, slots=True)
class SampledFrames:
    """Hold the frames that we sample, as indices into the file's frames, and the frames of the
    references."""

    sampling: str
    n_frames: int  # in the file
    rate: float
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    references: tuple[FrameChoice, ...]


@dataclass(frozen=True, slots=True)
class StepError:
    """Hold the relative errors of one frame pair's merged tokens."""

    difference: float  # ours against Hugging Face's
    ours: float  # against float64
    theirs: float


@dataclass(frozen=True, slots=True, eq=False)
class StepMaps:
    """Hold the first frame and the merged tokens of one frame pair of a video."""

    step: int
    rgb: Tensor  # (height, width, 3) uint8
    ours: Tensor  # (rows, columns, values)
    theirs: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FeatureMaps:
    """Hold the data of a report's pictures: the tower's input and some stages in raster order.

    For a video, `rgb` is the first frame, and `stages` belong to the first pair of frames.
    `steps` contains some pairs from the whole video.
    """

    rgb: Tensor  # (height, width, 3) uint8
    stages: dict[str, tuple[Tensor, Tensor]]  # ours and theirs: (rows, columns, values)
    steps: tuple[StepMaps, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ImageComparison:
    id: str
    sha256: str
    size_px: tuple[int, int]  # height, width
    grid: Grid
    tower_input: str  # our tower's input
    preprocessing: tuple[Preprocessing, ...]
    stages: tuple[Stage, ...]
    maps: FeatureMaps | None
    frames: SampledFrames | None = None  # of a video
    steps: tuple[StepError, ...] = ()  # for a video: each pair of frames

    @property
    def problems(self) -> list[str]:
        references = self.frames.references if self.frames else ()
        frames = [
            f"frames: {each.differ} differ from those of {each.reference}"
            for each in references
            if each.is_judged and not each.passed
        ]
        pixels = [
            f"preprocessing ({part.processor}): {_pixel_problem(part)}"
            for part in self.preprocessing
            if part.is_judged and not part.passed
        ]
        return [*frames, *pixels] + [
            f"{stage.name}: {stage.verdict.problem}"
            for stage in self.stages
            if not stage.verdict.passed
        ]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """Hold a comparison's differences for each image and stage.

    Attributes:
        facts: the model, weights, dtype, device, versions, config, reference and golden file.
        images: the compared images.
        skipped: the ids and errors of images that the comparison skipped.
    """

    facts: dict[str, Any]
    images: tuple[ImageComparison, ...]
    skipped: tuple[tuple[str, ImageError], ...]

    def __repr__(self) -> str:
        n_images = plural(len(self.images), "image")
        return f"Comparison({n_images}, {len(self.skipped)} skipped, passed={self.passed})"

    @property
    def agrees(self) -> bool:
        """Return whether every compared image agrees, and at least one image was compared."""
        return bool(self.images) and not any(image.problems for image in self.images)

    @property
    def passed(self) -> bool:
        """Return whether every image was compared and agrees, which determines the exit code."""
        return not self.skipped and self.agrees

    @property
    def has_same_weights(self) -> bool:
        """Return whether the golden file, if there is one, comes from the same weights."""
        golden = self.facts.get("golden")
        return not golden or golden["weights_sha256"] == self.facts["weights_sha256"]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison, without the feature maps, as JSON values. NaN and infinity become
        null."""
        document = {
            **self.facts,
            "agrees": self.agrees,
            "images": [
                {
                    "id": image.id,
                    "sha256": image.sha256,
                    "size_px": image.size_px,
                    "grid_thw": (image.grid.t, image.grid.h, image.grid.w),
                    "tower_input": image.tower_input,
                    "frames": image.frames and asdict(image.frames),
                    "steps": [asdict(step) for step in image.steps],
                    "preprocessing": [
                        {**asdict(part), "passed": part.passed, "judged": part.is_judged}
                        for part in image.preprocessing
                    ],
                    "stages": [
                        {
                            "stage": stage.name,
                            **asdict(stage.difference),
                            "ours_against_float64": stage.ours,
                            "theirs_against_float64": stage.theirs,
                            "ratio": stage.ratio if self.has_same_weights else None,
                            **asdict(stage.verdict),
                            "passed": stage.verdict.passed,
                        }
                        for stage in image.stages
                    ],
                    "problems": image.problems,
                }
                for image in self.images
            ],
            "skipped": [
                {"id": name, "code": error.code, "message": str(error)}
                for name, error in self.skipped
            ],
        }
        return _finite(document)  # type: ignore[no-any-return]


def _pixel_problem(part: Preprocessing) -> str:
    if not part.same_grid:
        return f"its grid is {part.grid_thw}, ours differs"
    return (
        f"{part.values_differ} of {part.values} values have a different grey level, up to "
        f"{part.largest_levels} of 255; relative error {part.relative:.2g}, "
        f"allowed {RELATIVE_TOLERANCE:g}"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
