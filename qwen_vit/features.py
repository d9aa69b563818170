"""Define the result for an image: its embeddings, or its error."""

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.common.arguments import short_repr, typed_repr
from qwen_vit.common.strict_json import is_integer
from qwen_vit.errors import ArgumentError, ImageError, display_name, plural, with_options
from qwen_vit.images.image import ImageSource
from qwen_vit.video.load import VideoTiming

__all__ = [
    "TRY_FLOAT32",
    "UNKNOWN_SIZE",
    "AnyFeatures",
    "FailedImage",
    "FeatureOutput",
    "ImageFeatures",
    "VideoFeatures",
    "check_features",
    "dtype_name",
    "not_finite",
]

TRY_FLOAT32 = with_options(
    "check the checkpoint with `qwen-vit verify`, and try {}", ("dtype", "float32")
)
UNKNOWN_SIZE = (0, 0)
FeatureOutput = Literal["merged", "patch", "mean"]


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """Hold one image's embeddings.

    >>> features = ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))
    >>> features.map.shape
    torch.Size([1, 2, 3, 8])

    Attributes:
        id: the image's path, or another name.
        embeds: (n_tokens, out_hidden_size), row-major over the merged cells, on the encoder's
            device and in its dtype. For output="patch" the shape is (n_patches, hidden_size),
            row-major over the patches. For output="mean" the shape is (1, out_hidden_size), in
            float32.
        grid_thw: (frames, height, width) in patches. For a video, `frames` counts pairs of frames.
        size_px: the original (height, width) in pixels, or (0, 0) if the size is unknown, for
            example after `encode_patches`.
        notes: the changes that the image policy made, such as "EXIF orientation 6 applied".
        layers: maps a block to the residual stream after that block, before any norm. The rows
            (n_patches, hidden_size) are row-major over the patches. `layers[7].view(*grid_thw, -1)`
            is the map of block 7.
        output: the kind of rows in `embeds`.
        normalized: whether `encode` scaled each row to unit length.
        sha256: the hash of the encoded file, tar member or Parquet value. `qwen-vit encode` and
            exports store it. For features that `VisionEncoder.encode` returns, it is None.
    """

    id: str
    embeds: Tensor
    grid_thw: tuple[int, int, int]
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    output: FeatureOutput = "merged"
    normalized: bool = False
    sha256: str | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        shape, dtype = tuple(self.embeds.shape), dtype_name(self.embeds.dtype)
        layers = f", layers={list(self.layers)}" if self.layers else ""
        return (
            f"ImageFeatures({self.id!r}, embeds={shape} {dtype}, grid_thw={self.grid_thw}{layers})"
        )

    def _repr_html_(self) -> str:
        embeds = f"{' x '.join(map(str, self.embeds.shape))}, {dtype_name(self.embeds.dtype)}"
        facts = {
            "embeds": f"{embeds}, {'unit length, ' * self.normalized}{self.output}",
            "layers": ", ".join(map(str, self.layers)),
            "grid": " x ".join(map(str, self.grid_thw)) + " patches (t, h, w)",
            "size": _size_text(self.size_px),
            "notes": ", ".join(self.notes),
        }
        return _html_table(self.id, facts)

    @property
    def error(self) -> None:
        """Return None. A failed image is a `FailedImage`, whose `error` gives the reason."""
        return None

    @property
    def map(self) -> Tensor:
        """Return `embeds` as a view (t, rows, columns, D), with one cell per merged token or patch.

        Raises ArgumentError if the rows are not cells, as with output="mean".
        """
        (t, h, w), rows = self.grid_thw, len(self.embeds)
        side = math.isqrt(t * h * w // rows) if rows and self.output != "mean" else 0
        if not side or h % side or w % side or rows * side**2 != t * h * w:
            fact = f"{plural(rows, 'row')} for a grid of {self.grid_thw}"
            raise ArgumentError(
                "contains one mean vector, not a map" if self.output == "mean" else fact,
                name=self.id,
                expected="a row for each merged token or each patch",
                remedy=with_options(
                    "encode it with {} or {}", ("output", "merged"), ("output", "patch")
                ),
            )
        return self.embeds.view(t, h // side, w // side, -1)

    def show(
        self,
        picture: ImageSource | None = None,
        *,
        point: tuple[float, float] | None = None,
        layer: int | None = None,
    ) -> Image.Image:
        """Draw the image's attention windows, its feature map and, with a point, similarities.

        >>> from qwen_vit import VisionEncoder
        >>> encoder = VisionEncoder.from_pretrained("tiny")
        >>> features = encoder.encode("tests/photographs/rocket.jpg", output="patch")
        >>> features.show(point=(320, 240)).save("rocket-features.png")  # doctest: +SKIP

        Args:
            picture: the image. None selects the file that `id` names, if the file exists.
            point: (x, y) in pixels. The method compares every cell with the cell at this point.
            layer: a block of `layers` to draw instead of `embeds`.

        Returns:
            A picture that a notebook shows. `show_features` draws several images together.

        Raises:
            ArgumentError: matplotlib (the extra `show`) is missing, the rows are not cells, or the
                layer does not exist. The point is outside the image, the image's size is unknown,
                or `picture` does not fit the features.
            ImageError: qwen_vit cannot read `picture`.
        """
        from qwen_vit.show.sheets import show_features

        pictures = None if picture is None else {self.id: picture}
        return show_features([self], pictures, point=point, layer=layer)[0]

    def numpy(self) -> NDArray[np.float32]:
        """Return `embeds` as a float32 array on the host."""
        array: NDArray[np.float32] = self.embeds.detach().float().cpu().numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.numpy()
        if copy is False and array.ctypes.data != self.embeds.data_ptr():
            raise ValueError("float32 on the host needs a copy: omit copy=False")  # NumPy's own
        return np.array(array, dtype, copy=copy)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VideoFeatures(ImageFeatures):
    """Hold one video's embeddings, with the times of its frames.

    >>> clip = VideoFeatures("clip.mp4", torch.ones(12, 8), (2, 4, 6), second_per_grid_t=1.0)
    >>> clip.map.shape, clip.step_seconds
    (torch.Size([2, 2, 3, 8]), (0.0, 1.0))

    Step i of the grid is a pair of frames. Its patches attend only to each other. `map[i]`, (rows,
    columns, D), contains the features of pair i.

    The other attributes are those of `ImageFeatures`.

    Attributes:
        second_per_grid_t: seconds between two steps, computed from the sampling rate. The language
            model computes its positions from this value.
        frame_seconds: the time of each sampled frame, in seconds from the video's first frame.
    """

    second_per_grid_t: float = 1.0
    frame_seconds: tuple[float, ...] = ()

    @classmethod
    def of(cls, features: ImageFeatures, timing: VideoTiming) -> "VideoFeatures":
        """Create the features of a video from the features of its patches and the times of its
        frames.

        Args:
            features: the features of the video's patches.
            timing: the seconds per step of the grid, and the times of the frames.

        Returns:
            VideoFeatures with the values of `features` and `timing`.
        """
        facts = {each.name: getattr(features, each.name) for each in fields(ImageFeatures)}
        return cls(
            **facts, second_per_grid_t=timing.second_per_grid_t, frame_seconds=timing.frame_seconds
        )

    def __repr__(self) -> str:
        return ImageFeatures.__repr__(self).replace("ImageFeatures", "VideoFeatures", 1)

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Return the time of each step of the grid: the time of its pair's first frame."""
        if not self.frame_seconds:
            return tuple(step * self.second_per_grid_t for step in range(self.grid_thw[0]))
        return self.frame_seconds[::2]


@dataclass(frozen=True, slots=True)
class FailedImage:
    """Describe a failed image, and why it failed.

    Attributes:
        id: as `ImageFeatures.id`.
        error: the image's error, with a stable `error.code`.
        stage: the stage of an export at which the image failed: "list", "read", "decode" or
            "encode". Outside an export, `stage` is empty.
        size_px: the original (height, width) in pixels, or (0, 0) if the size is unknown.
    """

    id: str
    error: ImageError
    stage: str = ""
    size_px: tuple[int, int] = UNKNOWN_SIZE

    @property
    def code(self) -> str:
        """Return `error.code`, a key of `errors.IMAGE_CODES`."""
        return self.error.code

    @property
    def message(self) -> str:
        """Return the error's text."""
        return str(self.error)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        raise self.error

    if not TYPE_CHECKING:  # type checkers would accept every name

        def __getattr__(self, name: str) -> NoReturn:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            # during unpickling, the object has no error yet
            known = not name.startswith("_") and name not in self.__match_args__
            raise AttributeError(
                f"{text}, because the image failed: {self.error}" if known else text
            )

    def _repr_html_(self) -> str:
        failed_at = {"stage": self.stage, "size": _size_text(self.size_px)}
        return _html_table(self.id, {"failed": f"{self.code}: {self.message}", **failed_at})


def _size_text(size_px: tuple[int, int]) -> str:
    height, width = size_px
    return "" if size_px == UNKNOWN_SIZE else f"{width} x {height} px"


def _html_table(name: str, facts: Mapping[str, str]) -> str:
    cells = [
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>"
        for key, value in facts.items()
        if value
    ]
    caption = f"<caption>{html.escape(display_name(name))}</caption>"
    return f"<table>{caption}{''.join(cells)}</table>"


AnyFeatures: TypeAlias = ImageFeatures | FailedImage | Iterable[ImageFeatures | FailedImage]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as files and options spell it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def check_features(
    features: AnyFeatures, name: str = "features"
) -> list[ImageFeatures | FailedImage]:
    """Return features as a list, even for a single image, and reject other values."""
    wanted = "ImageFeatures, as `encode` returns them"
    if isinstance(features, ImageFeatures | FailedImage):
        features = [features]
    if isinstance(features, Tensor | str | bytes) or not isinstance(features, Iterable):
        raise ArgumentError(f"{name} is {typed_repr(features)}", expected=f"a list of {wanted}")
    features = list(features)
    for feature in features:
        if isinstance(feature, FailedImage):
            continue
        if not isinstance(feature, ImageFeatures):
            raise ArgumentError(f"{name} contains {typed_repr(feature)}", expected=wanted)
        grid = feature.grid_thw
        is_grid = isinstance(grid, tuple | list) and len(grid) == 3 and all(map(is_integer, grid))
        if not isinstance(feature.id, str) or not is_grid:
            raise ArgumentError(
                f"{name} contains an item with the id {feature.id!r} and the grid_thw "
                f"{short_repr(grid)}",
                expected="text and three whole numbers, as `encode` returns them",
            )
    return features


def not_finite(name: str) -> ImageError:
    return ImageError(
        "its features contain NaN or infinity",
        name=name,
        remedy=TRY_FLOAT32,
        code="not-finite",
    )
