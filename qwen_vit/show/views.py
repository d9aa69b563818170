"""Prepare each image's pixels, features as colours, and similarities to one cell for drawing."""

import logging
import math
import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qwen_vit.common.arguments import short_repr, typed_repr
from qwen_vit.errors import (
    TO_ENCODE,
    ArgumentError,
    ImageError,
    QwenVitError,
    display_name,
    with_options,
)
from qwen_vit.images.image import ImageLimits, ImagePage, ImageSource, RgbImage
from qwen_vit.images.load import load_image, read_image_file, unwrap
from qwen_vit.images.pages import split_page_id
from qwen_vit.show.colours import PrincipalColours, similarity_map

__all__ = [
    "WINDOW_PATCHES", "DenseFeatures", "FeatureView", "FeatureViews", "check_point",
    "view_features",
]  # fmt: skip

WINDOW_PATCHES = 8  # patches: 112 px in every published checkpoint
MAX_SIDE_PX = 1_600  # pixels of a drawn image; a panel has 720
UNKNOWN_SIZE = (0, 0)
MIN_SPAN = 1e-3  # of a scale of similarities, whose rounding errors are about 1e-7

logger = logging.getLogger("qwen_vit")

OnError = Literal["raise", "skip"]
Point = tuple[float, float]


class DenseFeatures(Protocol):
    """Define the attributes of `ImageFeatures` that drawing needs."""

    @property
    def id(self) -> str:
        """Return the image's name."""

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Return the number of time steps, rows and columns of the grid of patches."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Return the original height and width, or (0, 0) if unknown."""

    @property
    def map(self) -> Tensor:
        """Return the features as (t, h, w, D), with one merged token or patch per cell."""

    @property
    def layers(self) -> Mapping[int, Tensor]:
        """Return each block's features by number, (n_patches, C), row-major."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureView:
    """Hold one image's data for drawing.

    Attributes:
        id: the id of the features.
        h: rows of the grid, in patches.
        w: columns of the grid, in patches.
        size_px: the original height and width, or (0, 0) if unknown.
        colours: (rows, columns, 3) sRGB from 0 to 1, with one cell per merged token or patch.
        picture: (height, width, 3) uint8 over the same area, or None.
        similarity: (rows, columns) cosine similarities to the chosen cell, or None.
        mark: the chosen cell's centre as (x, y) in patches, only in the image of that cell.
        frame: the index of the drawn pair of frames.
        n_frames: the number of pairs of frames: 1 for an image.
        is_changed: whether the picture's file differs from the encoded one.
    """

    id: str
    h: int
    w: int
    size_px: tuple[int, int]
    colours: NDArray[np.float32]
    picture: NDArray[np.uint8] | None = None
    similarity: NDArray[np.float32] | None = None
    mark: tuple[float, float] | None = None
    frame: int = 0
    n_frames: int = 1
    is_changed: bool = False

    def n_windows(self, window: int) -> int:
        """Return the number of attention windows, including windows that an edge cuts."""
        return math.ceil(self.h / window) * math.ceil(self.w / window)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureViews:
    """Hold the views of several images, with comparable colours and similarities.

    Attributes:
        window: the side of an attention window, in patches.
        explained: the share of the variance that each component explains.
        span: the similarities at the two ends of the colour scale, or None. The lower end is the
            lowest of the images' 1 % quantiles, but at most 0.999. The upper end is 1.
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
    on_error: OnError = "raise",
) -> FeatureViews:
    """Fit components to all features together, and compute similarities to a cell, for drawing.

    `show_features` describes the arguments from `features` to `frame`. For an image that is not in
    `pictures`, the function reads the file or page that the id names. If this file is missing, is
    unreadable or does not fit the features, the view has no picture. With on_error="skip", the view
    also has no picture if the image in `pictures` is unreadable or does not fit. The function then
    logs a warning. It also logs a warning for an image file other than the encoded one. `window` is
    the side of an attention window, in patches.
    """
    features = list(features) if isinstance(features, Iterable) else [features]
    for each in features:
        # a lower layer than features.py, so it knows no class; a FailedImage has an error
        if not (hasattr(each, "grid_thw") or hasattr(each, "error")):
            raise ArgumentError(
                f"features contains {typed_repr(each)}",
                expected="ImageFeatures, as `encode` returns them",
            )
    if not features:
        raise ArgumentError("features is empty", remedy="pass at least one image's features")
    if pictures is not None and not isinstance(pictures, Mapping):
        raise ArgumentError(
            f"pictures is {typed_repr(pictures)}",
            expected="a mapping from ids to images",
            remedy="to show one image's features, call their show(), such as features[0].show()",
        )
    maps = [_map_of(each, layer, frame) for each in features]
    widths = sorted({each.shape[-1] for each in maps})
    if len(widths) > 1:
        raise ArgumentError(
            f"features have the widths {', '.join(map(str, widths))}",
            expected="features of one encoder and one output",
            remedy="show these images one by one",
        )
    found = [_picture_of(each, pictures or {}, on_error) for each in features]
    colours = PrincipalColours.fit(maps)
    similarities: list[NDArray[np.float32] | None] = [None] * len(maps)
    mark = span = None
    if point is not None:
        row, column = _cell_at(point, features[0], found[0][0], maps[0])
        rows, columns = maps[0].shape[:2]
        _, h, w = features[0].grid_thw
        mark = ((column + 0.5) * w / columns, (row + 0.5) * h / rows)
        cosines = [similarity_map(each, maps[0][row, column]) for each in maps]
        similarities = [*cosines]
        lowest = min(float(np.quantile(each, 0.01)) for each in cosines)
        span = min(lowest, 1 - MIN_SPAN), 1.0
    views = tuple(
        FeatureView(
            each.id, *each.grid_thw[1:],
            each.size_px if picture is None else (picture.height, picture.width),
            colours.paint(cells), None if picture is None else _drawable(picture, each.grid_thw),
            similarity, mark if index == 0 else None, frame, each.grid_thw[0], is_changed,
        )
        for index, (each, cells, (picture, is_changed), similarity) in enumerate(
            zip(features, maps, found, similarities, strict=True)
        )
    )  # fmt: skip
    return FeatureViews(views, window, colours.explained, span)


def _map_of(features: DenseFeatures, layer: int | None, frame: int) -> Tensor:
    error = getattr(features, "error", None)  # of a FailedImage
    if error is not None:
        raise ArgumentError(
            f"this image failed: {error.fact}", name=features.id, remedy="omit the image"
        )
    if layer is None:
        frames = features.map
    elif isinstance(layer, Hashable) and layer in features.layers:
        frames = features.layers[layer].view(*features.grid_thw, -1)
    else:
        found = ", ".join(map(str, features.layers))
        raise ArgumentError(
            f"no features of layer {layer}",
            name=features.id,
            expected=f"one of its layers: {found}" if found else "",
            remedy=with_options("encode it again, and pass {}", ("layers", (layer,))) + TO_ENCODE,
        )
    if not (isinstance(frame, int | np.integer) and 0 <= frame < len(frames)):
        raise ArgumentError(
            f"frame is {short_repr(frame)}",
            name=features.id,
            expected=f"from 0 to {len(frames) - 1}",
        )
    return frames[frame]


def _picture_of(
    features: DenseFeatures, pictures: Mapping[str, ImageSource], on_error: OnError
) -> tuple[RgbImage | None, bool]:
    """Return an image's picture, or None, and whether its file differs from the encoded one."""
    source: ImageSource = pictures.get(features.id, features.id)
    if features.id in pictures:
        try:
            picture = _given_picture(features, source)
        except QwenVitError as error:
            if on_error == "raise":
                raise
            logger.warning("drew the features without their image: %s", error)
            return None, False
    else:
        path, page = split_page_id(features.id)
        if not os.path.isfile(path):
            return None, False
        try:
            if page is not None:
                source = ImagePage(read_image_file(path, features.id, ImageLimits()), page)
            picture = load_image(source)
        except ImageError:
            return None, False
        if not _fits(picture, features):
            return None, False
    if is_changed := _is_changed(source, features):
        place = display_name(str(source)) if isinstance(source, str | os.PathLike) else "the image"
        logger.warning(
            "%s: %s is not the encoded file, or has changed since, so the picture may not match "
            "the features",
            display_name(features.id), place,
        )  # fmt: skip
    return picture, is_changed


def _given_picture(features: DenseFeatures, source: ImageSource) -> RgbImage:
    is_path = isinstance(source, str | os.PathLike)  # an error then names this path
    picture = load_image(source, name=None if is_path else features.id)
    if not _fits(picture, features):
        height, width = features.size_px
        known = "an image of another shape" if (height, width) == UNKNOWN_SIZE else ""
        raise ArgumentError(
            f"the image is {picture.width} x {picture.height}, but the features come from "
            f"{known or f'{width} x {height} pixels'}",
            name=features.id,
            remedy="pass the image that these features come from",
        )
    return picture


def _is_changed(source: ImageSource, features: DenseFeatures) -> bool:
    """Return whether the bytes of an encoded image differ from the recorded hash. For an array, a
    frame of a video, and features without a hash, return False."""
    recorded: str | None = getattr(features, "sha256", None)
    if recorded is None or features.grid_thw[0] > 1:
        return False
    if isinstance(source, Mapping):
        source = unwrap(source, features.id)
    if isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                return file_digest(file, "sha256").hexdigest() != recorded
        except OSError:  # removed meanwhile
            return True
    data = source.data if isinstance(source, ImagePage) else source
    if not isinstance(data, bytes | bytearray | memoryview):
        return False
    return sha256(data).hexdigest() != recorded


def _fits(picture: RgbImage, features: DenseFeatures) -> bool:
    """Return whether the image fits the features, by size, or by aspect ratio if the size is
    unknown."""
    if features.size_px != UNKNOWN_SIZE:
        return (picture.height, picture.width) == features.size_px
    _, h, w = features.grid_thw
    # the processor rounds sides to multiples of two patches
    off = picture.height / picture.width * w / h
    return 1 / (1 + 2 / min(h, w)) <= off <= 1 + 2 / min(h, w)


def _cell_at(
    point: Point, features: DenseFeatures, picture: RgbImage | None, cells: Tensor
) -> tuple[int, int]:
    size_px = features.size_px if picture is None else (picture.height, picture.width)
    if size_px == UNKNOWN_SIZE:
        raise ArgumentError(
            "the image's size is unknown",
            name=features.id,
            expected="the image that contains the point",
            remedy="also pass this image",
        )
    (x, y), (height, width) = check_point(point, features.id, size_px), size_px
    rows, columns = cells.shape[:2]
    return int(y * rows / height), int(x * columns / width)


def check_point(point: Point, name: str, size_px: tuple[int, int]) -> Point:
    """Return a point as floats, or raise ArgumentError if the point is outside the named image."""
    (x, y), (height, width) = _xy(point), size_px
    if not (0 <= x < width and 0 <= y < height):
        raise ArgumentError(
            f"the point {x:.15g},{y:.15g} is outside the image",
            name=name,
            expected=f"x from 0 to {width - 1} and y from 0 to {height - 1}",
        )
    return x, y


def _xy(point: Point) -> Point:
    try:
        x, y = map(float, () if isinstance(point, str | bytes) else point)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"point is {typed_repr(point)}", expected="(x, y) in pixels, such as (120, 80)"
        ) from None
    return x, y


def _drawable(picture: RgbImage, grid_thw: tuple[int, int, int]) -> NDArray[np.uint8]:
    _, h, w = grid_thw
    px = max(2, min(14, MAX_SIDE_PX // max(h, w)))
    return np.asarray(picture.picture.resize((w * px, h * px)))  # Pillow's default is bicubic
