"""What is drawn of each image: its picture, its features as colours, similarities to one cell."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.errors import ArgumentError, ImageError, with_options
from qwen_vit.images.image import ImageSource, RgbImage
from qwen_vit.images.load import load_image
from qwen_vit.show.colours import PrincipalColours, similarity_map

__all__ = ["WINDOW_PATCHES", "DenseFeatures", "FeatureView", "FeatureViews", "view_features"]

WINDOW_PATCHES = 8  # 112 px, in every published checkpoint
MAX_SIDE_PX = 1_600  # of a picture that is drawn; its panel has 720
UNKNOWN_SIZE = (0, 0)

Point = tuple[float, float]


class DenseFeatures(Protocol):
    """The parts of `ImageFeatures` that pictures need."""

    @property
    def id(self) -> str:
        """The image's name."""

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Frames, rows and columns, in patches."""

    @property
    def size_px(self) -> tuple[int, int]:
        """The original height and width; (0, 0) where they are not known."""

    @property
    def map(self) -> Tensor:
        """(t, h, w, D): one cell a merged token, or a patch."""

    @property
    def layers(self) -> Mapping[int, Tensor]:
        """Block -> (n_patches, C), row-major."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureView:
    """One image, ready to be drawn.

    Attributes:
        id: as the features have it.
        h: rows of the grid, in patches.
        w: columns of the grid, in patches.
        size_px: the original height and width; (0, 0) where they are not known.
        colours: (rows, columns, 3) sRGB from 0 to 1, a cell a token.
        picture: (height, width, 3) uint8 over the same area, or None.
        similarity: (rows, columns) cosine similarities to the chosen cell, or None.
        mark: in the image of the chosen cell, its centre as (x, y) in patches.
    """

    id: str
    h: int
    w: int
    size_px: tuple[int, int]
    colours: NDArray[np.float32]
    picture: NDArray[np.uint8] | None = None
    similarity: NDArray[np.float32] | None = None
    mark: tuple[float, float] | None = None

    def n_windows(self, window: int) -> int:
        """The attention windows of the image, cut ones included."""
        return math.ceil(self.h / window) * math.ceil(self.w / window)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureViews:
    """Images whose colours and similarities compare with one another.

    Attributes:
        window: the side of an attention window, in patches.
        explained: the share of the variance in each of the three components.
        span: the least and the largest similarity that is drawn, or None.
    """

    views: tuple[FeatureView, ...]
    window: int
    explained: tuple[float, ...]
    span: tuple[float, float] | None


def view_features(
    features: Iterable[DenseFeatures],
    pictures: Mapping[str, ImageSource] | None = None,
    *,
    point: Point | None = None,
    layer: int | None = None,
    frame: int = 0,
    window: int = WINDOW_PATCHES,
) -> FeatureViews:
    """Prepare features for drawing: components fitted together, similarities to one cell.

    Args:
        features: of one encoder and of one output, "merged" or "patch".
        pictures: the images by id. An image that is not among them is read from the path that its
            id is, if there is a file of its size; otherwise it is drawn without.
        point: (x, y) in pixels of the first image: its cell is compared with every cell.
        layer: a block of `features.layers` to draw instead of the embeddings.
        frame: which frame of a video.
        window: the side of an attention window, in patches.

    Raises:
        ArgumentError: nothing to draw, a layer that is not there, features of different widths, a
            point outside of the image, or a picture that is not the image of the features.
        ImageError: a picture that cannot be read.
    """
    features = list(features)
    if not features:
        raise ArgumentError("features is empty", remedy="pass at least one image's features")
    maps = [_map_of(each, layer, frame) for each in features]
    widths = sorted({each.shape[-1] for each in maps})
    if len(widths) > 1:
        raise ArgumentError(
            f"features have the widths {', '.join(map(str, widths))}",
            expected="features of one encoder and one output",
            remedy="show them one by one",
        )
    found = [_picture_of(each, pictures or {}) for each in features]
    colours = PrincipalColours.fit(maps)
    similarities: list[NDArray[np.float32] | None] = [None] * len(maps)
    mark = span = None
    if point is not None:
        row, column = _cell_at(point, features[0], found[0], maps[0])
        rows, columns = maps[0].shape[:2]
        _, h, w = features[0].grid_thw
        mark = ((column + 0.5) * w / columns, (row + 0.5) * h / rows)
        cosines = [similarity_map(each, maps[0][row, column]) for each in maps]
        similarities = [*cosines]
        span = min(float(np.quantile(each, 0.01)) for each in cosines), 1.0
    views = tuple(
        FeatureView(
            each.id, *each.grid_thw[1:],
            each.size_px if picture is None else (picture.height, picture.width),
            colours.paint(cells), None if picture is None else _drawable(picture, each.grid_thw),
            similarity, mark if index == 0 else None,
        )
        for index, (each, cells, picture, similarity) in enumerate(
            zip(features, maps, found, similarities, strict=True)
        )
    )  # fmt: skip
    return FeatureViews(views, window, colours.explained, span)


def _map_of(features: DenseFeatures, layer: int | None, frame: int) -> Tensor:
    if layer is None:
        frames = features.map
    elif layer in features.layers:
        frames = features.layers[layer].view(*features.grid_thw, -1)
    else:
        found = ", ".join(map(str, features.layers))
        raise ArgumentError(
            f"no features of layer {layer}",
            name=features.id,
            expected=f"one of its layers: {found}" if found else "",
            remedy=with_options("encode it with {}", ("layers", (layer,))),
        )
    if not 0 <= frame < len(frames):
        raise ArgumentError(
            f"frame is {frame}", name=features.id, expected=f"from 0 to {len(frames) - 1}"
        )
    return frames[frame]


def _picture_of(features: DenseFeatures, pictures: Mapping[str, ImageSource]) -> RgbImage | None:
    if features.id in pictures:
        picture = load_image(pictures[features.id], name=features.id)
        if not _fits(picture, features):
            height, width = features.size_px
            known = "an image of another shape" if (height, width) == UNKNOWN_SIZE else ""
            raise ArgumentError(
                f"the picture is {picture.width} x {picture.height}, and the features are of "
                f"{known or f'{width} x {height}'}",
                name=features.id,
                remedy="pass the image that was encoded",
            )
        return picture
    if not os.path.isfile(features.id):
        return None
    try:
        picture = load_image(features.id)
    except ImageError:
        return None
    return picture if _fits(picture, features) else None


def _fits(picture: RgbImage, features: DenseFeatures) -> bool:
    """Whether the features can be of this picture: by its size, or by its ratio alone."""
    if features.size_px != UNKNOWN_SIZE:
        return (picture.height, picture.width) == features.size_px
    _, h, w = features.grid_thw
    off = picture.height / picture.width * w / h  # sides are rounded to two patches
    return 1 / (1 + 2 / min(h, w)) <= off <= 1 + 2 / min(h, w)


def _cell_at(
    point: Point, features: DenseFeatures, picture: RgbImage | None, cells: Tensor
) -> tuple[int, int]:
    size_px = features.size_px if picture is None else (picture.height, picture.width)
    if size_px == UNKNOWN_SIZE:
        raise ArgumentError(
            "the size of the image is not known",
            name=features.id,
            expected="the picture that the point belongs to",
            remedy="pass its picture as well",
        )
    (x, y), (height, width) = point, size_px
    if not (0 <= x < width and 0 <= y < height):
        raise ArgumentError(
            f"the point {x:g},{y:g} is outside of the image",
            name=features.id,
            expected=f"x from 0 to {width - 1} and y from 0 to {height - 1}",
        )
    rows, columns = cells.shape[:2]
    return int(y * rows / height), int(x * columns / width)


def _drawable(picture: RgbImage, grid_thw: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The picture at a whole number of pixels a patch."""
    _, h, w = grid_thw
    px = max(2, min(14, MAX_SIDE_PX // max(h, w)))
    return np.asarray(picture.picture.resize((w * px, h * px)))  # bicubic
