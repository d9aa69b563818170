"""Turn images and videos into patches or decoded pixels, in loader threads and in order."""

import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, Literal, TypeAlias, TypedDict, TypeGuard, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwen_vit.common.arguments import check_choice, check_ordered, short_repr
from qwen_vit.common.prefetch import Job
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.features import UNKNOWN_SIZE, FeatureOutput
from qwen_vit.images.frames import Decoded, Frames
from qwen_vit.images.image import (
    ArrayLayout,
    ExifPolicy,
    ImageLimits,
    ImagePage,
    ImageSource,
    RgbImage,
)
from qwen_vit.images.load import load_image, read_image_file, unwrap
from qwen_vit.images.pages import Pages, split_pages
from qwen_vit.images.patches import Patches, patchify
from qwen_vit.images.picture import Picture
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.read import read_item
from qwen_vit.inputs.suffixes import VIDEO_SUFFIXES, suffix_of
from qwen_vit.inputs.urls import is_https
from qwen_vit.layout import check_grids
from qwen_vit.video.animation import is_animated
from qwen_vit.video.container import HEAD_BYTES, container_of
from qwen_vit.video.load import LoadedVideo, VideoTiming, load_pieces, load_video
from qwen_vit.video.options import Video, VideoLimits, VideoOptions, VideoSource
from qwen_vit.video.pieces import PieceMemory, PieceStream

__all__ = [
    "EncodeOptions", "ImageInput", "ImageLoader", "Images", "LoadedImage", "OnError", "OneImage",
    "Videos", "as_images", "as_videos", "is_one_image", "is_single_still", "is_video_file",
]  # fmt: skip

OnError = Literal["raise", "skip"]
# What `encode` accepts for one image, except arrays: a 4D array is a stack of several images.
OneImage: TypeAlias = (
    str | os.PathLike[str] | os.PathLike[bytes] | bytes | bytearray | memoryview | Image.Image
    | Patches | Picture | Frames | Video | Mapping[str, Any] | ImagePage
)  # fmt: skip
ImageInput: TypeAlias = OneImage | NDArray[Any] | Tensor
Images: TypeAlias = ImageInput | Iterable[ImageInput]
# Iterating over one of these would not give images, but for example characters or bytes.
ONE_IMAGE = (
    str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Patches, Picture, Frames, Video,
    io.IOBase, Mapping, ImagePage,
)  # fmt: skip
FIXED = (str, os.PathLike, bytes, Patches, Picture, Frames, ImagePage, ImageError)  # cannot change
STACKED_AXES = 4
Source = TypeVar("Source")
Videos: TypeAlias = VideoSource | Video | Iterable[VideoSource | Video]


class EncodeOptions(TypedDict, total=False):
    """List the options of `encode` and `encode_iter` that do not change the result's type."""

    output: FeatureOutput
    normalize: bool
    layers: Iterable[int]
    layout: ArrayLayout
    exif: ExifPolicy
    limits: ImageLimits | None
    formats: Iterable[str]
    video_limits: VideoLimits | None
    decode_threads: int | None


def is_one_image(images: object) -> bool:
    """Return whether `images` is one image, not an iterable or a stack of images.

    >>> is_one_image("a.jpg"), is_one_image(["a.jpg"]), is_one_image(np.zeros((2, 28, 28, 3)))
    (True, False, False)
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != STACKED_AXES
    return isinstance(images, ONE_IMAGE)


def is_single_still(images: Any) -> bool:
    """Return whether `images` is one image, or a list or tuple of one image, and not a video.

    >>> is_single_still("a.jpg"), is_single_still(["a.jpg", "b.jpg"]), is_single_still("a.mp4")
    (True, False, False)
    """
    if isinstance(images, list | tuple) and len(images) == 1:
        [images] = images
    return is_one_image(images) and not isinstance(images, Video) and not is_video_file(images)


def as_images(images: Any) -> Iterator[Any]:
    check_ordered("images", images)
    try:
        return iter([images] if is_one_image(images) else images)
    except TypeError:
        expected = "an image, or an iterable of images"
        raise ArgumentError(f"images is {short_repr(images)}", expected=expected) from None


def as_videos(videos: Any, options: VideoOptions) -> Video | Iterable[Video]:
    """Return one video, or an iterable of several videos. Videos without options receive `options`.

    >>> as_videos("clip.mp4", VideoOptions(fps=1.0)).fps
    1.0
    >>> [each.name for each in as_videos(["a.mp4", "b.mp4"], VideoOptions())]
    ['a.mp4', 'b.mp4']

    A list or tuple that begins with a PIL image, or with an array or tensor of one image, is a list
    of frames.
    """
    if isinstance(videos, Video):
        return videos
    check_ordered("videos", videos)
    if isinstance(videos, (np.ndarray, Tensor)):
        is_one = videos.ndim <= STACKED_AXES
    elif isinstance(videos, (list, tuple)):
        is_one = bool(videos) and _is_picture(videos[0])
    else:
        is_one = isinstance(videos, ONE_IMAGE)
    if is_one:
        return Video.of(videos, options)
    if not isinstance(videos, Iterable):
        raise ArgumentError(
            f"videos is {short_repr(videos)}", expected="a video, or an iterable of videos"
        )
    return (each if isinstance(each, Video) else Video.of(each, options) for each in videos)


def _is_picture(value: object) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim < STACKED_AXES
    return isinstance(value, Image.Image)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """Hold an image's or video's patches, decoded pixels, stream of pieces, or error."""

    id: str
    size_px: tuple[int, int] = UNKNOWN_SIZE
    notes: tuple[str, ...] = ()
    patches: Patches | Picture | Frames | None = None
    error: ImageError | None = None
    timing: VideoTiming | None = None  # only for a video
    stream: PieceStream | None = None

    @property
    def n_patches(self) -> int:
        return 0 if self.patches is None else self.patches.n_patches

    @property
    def n_bytes(self) -> int:
        # PieceMemory counts a stream's bytes, so that the loaders may start the next video
        return 0 if self.patches is None else self.patches.n_bytes


@dataclass(frozen=True, slots=True)
class ImageLoader:
    """Load any kind of image or video as patches or decoded pixels, in any thread.

    With `on_gpu`, the loader returns decoded pixels, which the GPU resizes and cuts. With
    `is_lent`, the caller does not change its PIL images before their features arrive. `video`
    contains the options for videos without their own. With `as_video`, the loader treats the bytes
    of an animation as a video. `video_threads` is the number of threads that decode one video. The
    loader cuts a video file of more than `piece_patches` patches into pieces, and returns the video
    after it has decoded the first piece. If `piece_patches` is None, the loader cuts no video.
    """

    config: VisionConfig
    image_config: ImageConfig
    layout: ArrayLayout
    limits: ImageLimits
    on_error: OnError
    video_limits: VideoLimits = field(default_factory=VideoLimits)
    exif: ExifPolicy = "apply"
    video_threads: int = 1
    video: VideoOptions = field(default_factory=VideoOptions)
    as_video: bool = False
    frames: Pages = "first"
    piece_patches: int | None = None
    on_gpu: bool = False
    is_lent: bool = False
    _piece_memory: PieceMemory = field(default_factory=PieceMemory, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, get_args(OnError))
        check_choice("layout", self.layout, get_args(ArrayLayout))
        check_choice("exif", self.exif, get_args(ExifPolicy))
        check_choice("frames", self.frames, get_args(Pages))
        for name, kind in (("limits", ImageLimits), ("video_limits", VideoLimits)):
            if not isinstance(value := getattr(self, name), kind):
                fact = f"{name} is {short_repr(value)}"
                raise ArgumentError(fact, expected=f"{kind.__name__} or None")

    def jobs(self, images: Iterable[ImageInput], *, is_ahead: bool) -> Iterator[Job[LoadedImage]]:
        """Yield a job for each image or page. With `is_ahead`, a job may run after the iteration
        has moved on."""
        for image, name in self._named(images):
            is_fixed = isinstance(image, FIXED) or (self.is_lent and isinstance(image, Image.Image))
            if isinstance(image, Video):
                is_fixed = isinstance(image.source, (str, os.PathLike, bytes))
            elif isinstance(image, (bytearray, memoryview)) and container_of(image[:HEAD_BYTES]):
                image, is_fixed = bytes(image), True
            if is_fixed or not is_ahead:
                n_bytes = len(image) if isinstance(image, bytes) else 0
                load = partial(self.load, image, name, is_ahead=is_ahead)
                yield Job(load, n_bytes, _decode_rest)
            elif isinstance(image, Video):  # frames that the caller may change
                yield Job(partial(self.load, self._load_frames(image, name), name))
            else:  # the caller may change it after the loader takes the next image
                loaded = self._load_eagerly(image, name)
                # Pillow stores 4 bytes per pixel
                n_bytes = 4 * loaded.height * loaded.width if isinstance(loaded, RgbImage) else 0
                yield Job(partial(self.load, loaded, name), n_bytes)

    def _named(self, images: Iterable[ImageInput]) -> Iterator[tuple[Any, str]]:
        """Yield the images or their pages, with names. An error replaces a bad image."""
        for index, image in enumerate(images):
            name = _name_of(image, index)
            source: Any = image
            try:
                if isinstance(source, Mapping):
                    source = unwrap(source, name)
                    name = _name_of(source, index)
                if self.frames == "first" or isinstance(source, Video) or is_video_file(source):
                    yield source, name
                    continue
                source = self._fetched(source, name)
                if isinstance(source, (str, os.PathLike)):
                    source = read_image_file(os.fsdecode(source), name, self.limits)
                elif isinstance(source, (bytearray, memoryview)):
                    source = bytes(source)
                yield from split_pages(source, name, self.limits)
            except ImageError as error:  # `load` raises it in order
                yield error.without_frames(), name

    def load(
        self,
        image: ImageInput | RgbImage | LoadedImage | ImageError,
        name: str,
        *,
        is_ahead: bool = False,
    ) -> LoadedImage:
        """Return an image or video as a `LoadedImage`.

        With on_error="skip", the result may contain an error. The result of a long video contains
        only the first decoded piece. With `is_ahead`, the
        loader thread then decodes the other pieces in `_decode_rest`.
        """
        try:
            if isinstance(image, LoadedImage):
                return image
            if isinstance(image, Patches | Picture | Frames):
                return self._accept_patches(image, name)
            if isinstance(image, Video):
                return self._load_pieces(image, name, is_ahead=is_ahead)
            if is_video_file(image) or self._is_animation(image):
                return self._load_pieces(Video.of(image, self.video), name, is_ahead=is_ahead)
            return self._load_and_patchify(image, name)
        except ImageError as error:
            if self.on_error == "raise":
                raise
            return LoadedImage(name, error=error.without_frames())

    def _load_frames(self, video: Video, name: str) -> LoadedImage | ImageError:
        try:
            return self.load_video(video, name)
        except ImageError as error:  # `load` raises it in order
            return error.without_frames()

    def _load_eagerly(self, image: Any, name: str) -> RgbImage | ImageError:
        try:
            return load_image(
                image, name=name, layout=self.layout, limits=self.limits, exif=self.exif
            )
        except ImageError as error:  # `load` raises it in order
            return error.without_frames()

    def _load_and_patchify(
        self, image: ImageSource | RgbImage | ImageError, name: str
    ) -> LoadedImage:
        if isinstance(image, ImageError):
            raise image
        rgb = self._fetched(image, name)
        if not isinstance(rgb, RgbImage):
            rgb = load_image(
                rgb, name=name, layout=self.layout, limits=self.limits, exif=self.exif,
                is_lent=self.is_lent,
            )  # fmt: skip
        size_px = (rgb.height, rgb.width)
        try:
            make = Picture.of if self.on_gpu else patchify
            patches = make(rgb.picture, self.image_config, name=name)
        except ImageError as error:
            if self.on_error == "raise":
                raise
            return LoadedImage(name, size_px, error=error.without_frames())
        return LoadedImage(name, size_px, rgb.notes, patches)

    def _fetched(self, image: Source, name: str) -> Source | bytes:
        """Return the bytes at an address of an allowed host, and every other source unchanged."""
        if isinstance(image, str) and self.limits.allow_urls and is_https(image):
            return read_item(Item(name, image), self.limits)
        return image

    def _is_animation(self, image: object) -> TypeGuard[bytes]:
        return self.as_video and isinstance(image, bytes) and is_animated(image, self.limits)

    def _load_pieces(self, video: Video, name: str, *, is_ahead: bool) -> LoadedImage:
        pieces = load_pieces(
            video.named(name), self.image_config, most=self.piece_patches,
            limits=self.video_limits, image_limits=self.limits, layout=self.layout,
            threads=self.video_threads, on_gpu=self.on_gpu,
        )  # fmt: skip
        loaded = next(pieces)
        found = LoadedImage(name, loaded.size_px, loaded.notes, timing=loaded.timing)
        if loaded.is_last:
            pieces.close()
            return replace(found, patches=loaded.decoded)
        stream = PieceStream(
            loaded.decoded, _rest_of(pieces), is_ahead=is_ahead, memory=self._piece_memory
        )
        return replace(found, stream=stream)

    def load_video(self, video: Video, name: str, file: BinaryIO | None = None) -> LoadedImage:
        """Return a video's patches. `file` replaces the video's source. Raises ImageError."""
        loaded = load_video(
            video.named(name), self.image_config, limits=self.video_limits,
            image_limits=self.limits, layout=self.layout, threads=self.video_threads, file=file,
        )  # fmt: skip
        return LoadedImage(name, loaded.size_px, loaded.notes, loaded.patches, timing=loaded.timing)

    def _accept_patches(self, patches: Patches | Picture | Frames, name: str) -> LoadedImage:
        if len(patches.grids) != 1:
            raise ImageError(
                f"the patches of {len(patches.grids)} images",
                name=name,
                expected="the patches of one image",
                remedy="pass each image's patches separately",
                code="patches",
            )
        values = patches.n_values
        expected = self.config.patch_dim // self.config.temporal_patch_size  # for one frame
        if values not in (expected, self.config.patch_dim):
            raise ImageError(
                f"patches of {values} values",
                name=name,
                expected=f"{expected}, or {self.config.patch_dim} for a video",
                remedy="build the patches with this encoder's image_config",
                code="patches",
            )
        check_grids(patches.grids, self.config, name)
        return LoadedImage(name, patches=patches)


def _rest_of(pieces: Generator[LoadedVideo, None, None]) -> Generator[Decoded, None, None]:
    with closing(pieces):
        for piece in pieces:
            yield piece.decoded


def _decode_rest(loaded: LoadedImage, is_closed: Callable[[], bool]) -> None:
    if loaded.stream is not None:
        loaded.stream.decode(is_closed)


def _name_of(image: ImageInput, index: int) -> str:
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, Patches | Picture | Frames | Video) and image.name is not None:
        return image.name
    return f"{'video' if isinstance(image, Video) else 'image'} {index}"


def is_video_file(image: object) -> TypeGuard[str | os.PathLike[str] | bytes]:
    """Return whether a path or bytes are a video, by a path's suffix or by the bytes' content.

    >>> is_video_file("clip.mp4"), is_video_file("animation.gif"), is_video_file(b"RIFF....AVI ")
    (True, False, True)
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return container_of(image[:HEAD_BYTES]) is not None
    return isinstance(image, str | os.PathLike) and (
        suffix_of(os.fsdecode(image)) in VIDEO_SUFFIXES
    )
