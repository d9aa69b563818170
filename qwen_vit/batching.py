"""Images of any kind -> batches of patches -> each image's features, in order.

Loader threads prefetch images; the caller's thread packs what is loaded into batches and runs the
encoder on them. An image's name travels with it from the input to its features or its error.
"""

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.common.prefetch import Job, work_ahead
from qwen_vit.config import Grid, ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, ExportError, ImageError, check_choice
from qwen_vit.features import UNKNOWN_SIZE, FailedImage, FeatureOutput, ImageFeatures
from qwen_vit.graphs import MAX_BUCKET
from qwen_vit.images.image import ArrayLayout, ImageLimits, ImageSource, RgbImage
from qwen_vit.images.load import load_image, unwrap
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.layout import check_grids
from qwen_vit.model import LayerTaps, Output
from qwen_vit.outputs import ImageRows, OutputOptions

__all__ = [
    "BatchEncoder",
    "EncodeOptions",
    "ImageInput",
    "ImageLoader",
    "Images",
    "InFlightLimit",
    "LoadedImage",
    "OnError",
    "OneImage",
    "as_images",
    "is_one_image",
    "pack",
]

logger = logging.getLogger("qwen_vit")

OnError = Literal["raise", "skip"]
# What `encode` takes for one image, arrays aside: those of four axes are a stack of several.
OneImage: TypeAlias = (
    str
    | os.PathLike[str]
    | os.PathLike[bytes]
    | bytes
    | bytearray
    | memoryview
    | Image.Image
    | Patches
    | Mapping[str, Any]
)
ImageInput: TypeAlias = OneImage | NDArray[Any] | Tensor
Images: TypeAlias = ImageInput | Iterable[ImageInput]
# Iterating over one of these would give its characters, bytes or rows.
ONE_IMAGE = (
    str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Patches, io.IOBase, Mapping,
)  # fmt: skip
STACKED_AXES = 4
Forward = Callable[[Tensor, tuple[Grid, ...], Output, LayerTaps | None], Tensor]

# Patches in one forward pass. More gain nothing on a GPU; an image may be larger on its own.
TOKEN_BUDGET = {"cuda": MAX_BUCKET, "cpu": 4_096}
# Batches that are packed together. On a CPU results may depend on the batch, and the same images
# shall give the same ones: so one batch, in the order in which the images come.
WINDOW = {"cuda": 4, "cpu": 1}
BATCHES_AHEAD = 2  # of the GPU: queued batches wait in pinned memory
IMAGES_IN_A_WINDOW = 1_024  # so that a long run of images that fail is reported as well


class EncodeOptions(TypedDict, total=False):
    """The options of `encode` and `encode_iter` that do not decide the type of the result."""

    output: FeatureOutput
    normalize: bool
    layers: Iterable[int]
    layout: ArrayLayout
    limits: ImageLimits | None
    decode_threads: int | None


def is_one_image(images: object) -> bool:
    """Whether this is one image, rather than an iterable or a stack of them.

    >>> is_one_image("a.jpg"), is_one_image(["a.jpg"]), is_one_image(np.zeros((2, 28, 28, 3)))
    (True, False, False)
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != STACKED_AXES
    return isinstance(images, ONE_IMAGE)


def as_images(images: Any) -> Iterator[Any]:
    """The images of one image, a stack or an iterable. Raises ArgumentError for anything else."""
    try:
        return iter([images] if is_one_image(images) else images)
    except TypeError:
        raise ArgumentError(f"images is {images!r}", expected="an iterable of images") from None


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image on its way to the encoder: its patches, or the error that it met."""

    id: str
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    patches: Patches | None = None
    error: ImageError | None = None

    @property
    def n_patches(self) -> int:
        return 0 if self.patches is None else len(self.patches.pixels)

    @property
    def n_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.pixels.nbytes


@dataclass(frozen=True, slots=True)
class ImageLoader:
    """Loads, resizes and patchifies any kind of image, in any thread."""

    config: VisionConfig
    image_config: ImageConfig
    layout: ArrayLayout
    limits: ImageLimits
    on_error: OnError

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, get_args(OnError))
        check_choice("layout", self.layout, get_args(ArrayLayout))
        if not isinstance(self.limits, ImageLimits):
            raise ArgumentError(f"limits is {self.limits!r}", expected="ImageLimits or None")

    def jobs(self, images: Iterable[ImageInput], *, is_ahead: bool) -> Iterator[Job[LoadedImage]]:
        """A job for each image. With `is_ahead` it may run after the next image was taken."""
        for index, image in enumerate(images):
            name = _name_of(image, index)
            if isinstance(image, Mapping):
                try:
                    image = unwrap(image, name)
                except ImageError as error:  # raised in order
                    yield Job(partial(self.load, error.without_frames(), name))
                    continue
                name = _name_of(image, index)
            is_fixed = isinstance(image, (str, os.PathLike, bytes, Patches))
            if is_fixed or not is_ahead:
                n_bytes = len(image) if isinstance(image, bytes) else 0
                yield Job(partial(self.load, image, name), n_bytes)
            else:  # the caller may change it after the next one is taken
                loaded = self._load_eagerly(image, name)
                n_bytes = 4 * loaded.height * loaded.width if isinstance(loaded, RgbImage) else 0
                yield Job(partial(self.load, loaded, name), n_bytes)  # 4 bytes as Pillow holds them

    def load(self, image: ImageInput | RgbImage | ImageError, name: str) -> LoadedImage:
        """One image's patches; with on_error="skip" its error instead of an exception."""
        try:
            if isinstance(image, Patches):
                return self._accept_patches(image, name)
            return self._load_and_patchify(image, name)
        except ImageError as error:
            if self.on_error == "raise":
                raise
            return LoadedImage(name, error=error.without_frames())

    def _load_eagerly(self, image: Any, name: str) -> RgbImage | ImageError:
        try:
            return load_image(image, name=name, layout=self.layout, limits=self.limits)
        except ImageError as error:  # raised in order
            return error.without_frames()

    def _load_and_patchify(
        self, image: ImageSource | RgbImage | ImageError, name: str
    ) -> LoadedImage:
        if isinstance(image, ImageError):
            raise image
        rgb = image
        if not isinstance(rgb, RgbImage):
            rgb = load_image(rgb, name=name, layout=self.layout, limits=self.limits)
        patches = patchify(rgb.picture, self.image_config, name=name)
        return LoadedImage(name, (rgb.height, rgb.width), rgb.notes, patches)

    def _accept_patches(self, patches: Patches, name: str) -> LoadedImage:
        """One image that the caller patchified."""
        if len(patches.grids) != 1:
            raise ImageError(
                f"the patches of {len(patches.grids)} images",
                name=name,
                expected="those of one",
                remedy="pass each image's patches by themselves",
                code="patches",
            )
        values = patches.pixels.shape[1]
        expected = self.config.patch_dim // self.config.temporal_patch_size  # of one frame
        if values != expected:
            raise ImageError(
                f"patches of {values} values",
                name=name,
                expected=str(expected),
                remedy="build them with this encoder's image_config",
                code="patches",
            )
        check_grids(patches.grids, self.config, name)
        return LoadedImage(name, patches=patches)


def _name_of(image: ImageInput, index: int) -> str:
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, Patches) and image.name is not None:
        return image.name
    return f"image {index}"


@dataclass(frozen=True, slots=True)
class BatchEncoder:
    """Packs loaded images into batches and runs `forward` on them, in flat memory."""

    forward: Forward
    device: torch.device
    merge_unit: int
    outputs: OutputOptions
    on_error: OnError

    def encode(
        self, jobs: Iterator[Job[LoadedImage]], threads: int
    ) -> Iterator[ImageFeatures | FailedImage]:
        """The features of every image, in order."""
        limit = InFlightLimit(self.device)
        with closing(work_ahead(jobs, threads=threads)) as loaded:
            for window in self._windows(loaded):
                yield from self._encode_window(window, limit)

    def _windows(self, loaded: Iterable[LoadedImage]) -> Iterator[list[LoadedImage]]:
        """The images in order, in groups that are packed together."""
        budget = WINDOW[self.device.type] * TOKEN_BUDGET[self.device.type]
        window: list[LoadedImage] = []
        n_patches = 0
        try:
            for each in loaded:
                is_full = n_patches + each.n_patches > budget or len(window) == IMAGES_IN_A_WINDOW
                if window and is_full:
                    yield window
                    window, n_patches = [], 0
                window.append(each)
                n_patches += each.n_patches
        except ExportError:  # an export was stopped: the earlier results are not needed
            raise
        except Exception:
            yield window  # the images before the failed one come first
            raise
        yield window

    def _encode_window(
        self, window: list[LoadedImage], limit: "InFlightLimit"
    ) -> Iterator[ImageFeatures | FailedImage]:
        results: dict[int, ImageRows | ImageError] = {}
        for batch in self._batches(window):
            named = [(window[index].id, window[index].patches) for index in batch]
            parts = [(name, patches) for name, patches in named if patches is not None]
            results.update(zip(batch, self._encode_parts(parts), strict=True))
            del named, parts
            limit.step()
        facts = [(i.id, i.size_px, i.notes, i.error, _grid_of(i)) for i in window]
        window.clear()  # the pixels are not needed any more
        for index, (name, size_px, notes, error, grid_thw) in enumerate(facts):
            result = results.pop(index, error)
            if isinstance(result, ImageRows):
                yield ImageFeatures(
                    name, result.embeds, grid_thw, size_px, notes, result.layers,
                    self.outputs.output, self.outputs.normalize,
                )  # fmt: skip
            elif result is not None:
                yield FailedImage(name, result, size_px=size_px)

    def _batches(self, window: Sequence[LoadedImage]) -> list[list[int]]:
        """Indices of the images of each pass. Failed images are in none."""
        good = [index for index, loaded in enumerate(window) if loaded.patches is not None]
        if self.device.type == "cpu":
            return [good] if good else []
        batches = pack([window[index].n_patches for index in good], TOKEN_BUDGET[self.device.type])
        return [[good[index] for index in batch] for batch in batches]

    def _encode_parts(self, parts: Sequence[tuple[str, Patches]]) -> list[ImageRows | ImageError]:
        """Each image's rows by name. A batch that is too large for the GPU's memory is halved."""
        if not parts:
            return []
        pinned_rows = TOKEN_BUDGET["cuda"] if self.device.type == "cuda" else 0
        patches = Patches.cat((part for _, part in parts), pinned_rows=pinned_rows)
        outputs, taps = self.outputs, self.outputs.taps()
        sizes = [len(part.pixels) for _, part in parts]
        try:
            # no reference to the batch's rows, so that their memory is free for the halves
            return list(
                outputs.split(
                    self.forward(patches.pixels, patches.grids, outputs.tower_output, taps),
                    taps, sizes, self.merge_unit,
                )
            )  # fmt: skip
        except torch.cuda.OutOfMemoryError as cause:
            if len(parts) == 1:
                error = ImageError(
                    f"its {len(patches.pixels)} patches do not fit the memory of {self.device}",
                    name=parts[0][0],
                    remedy="lower max_pixels, or free memory there",
                    code="out-of-memory",
                )
                if self.on_error == "raise":
                    raise error from cause
                return [error]
        del taps  # and the rows that it holds
        half = len(parts) // 2
        logger.warning("out of memory on %s: a batch of %d is halved", self.device, len(parts))
        return [*self._encode_parts(parts[:half]), *self._encode_parts(parts[half:])]


class InFlightLimit:
    """Keeps the host at most a few batches ahead of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """After each batch: wait for the one that is BATCHES_AHEAD before it."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > BATCHES_AHEAD:
            with torch.cuda.device(self._device):  # otherwise the first GPU gets a context as well
                self._events.popleft().synchronize()


def _grid_of(loaded: LoadedImage) -> tuple[int, int, int]:
    if loaded.patches is None:
        return 0, 0, 0
    [grid] = loaded.patches.grids
    return grid.t, grid.h, grid.w


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Group sizes, by their indices, into batches of at most `budget`: largest first, first fit.

    >>> pack([3, 7, 5, 4, 12], 10)
    [[4], [1, 0], [2, 3]]

    A size above the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = next((at for at, left in enumerate(room) if size <= left), None)
        if place is None:
            batches.append([index])
            room.append(budget - size)
        else:
            batches[place].append(index)
            room[place] -= size
    return batches
