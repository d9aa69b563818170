"""Define the options of an export, and the format of its rows."""

from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import torch

from qwen_vit.common.arguments import check_choice, short_repr
from qwen_vit.common.strict_json import is_integer, is_number
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError
from qwen_vit.feature_files.schema import EMBEDS, layer_name
from qwen_vit.feature_files.writer import RowTensor
from qwen_vit.features import FeatureOutput
from qwen_vit.images.image import ExifPolicy, ImageLimits
from qwen_vit.images.pages import Pages
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.loading import OnError
from qwen_vit.outputs import check_layers, check_normalize
from qwen_vit.video.options import VideoLimits, VideoOptions

__all__ = ["ExportOptions", "RowFormat"]

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Choose how an export encodes and stores images.

    >>> ExportOptions(output="mean", part=(2, 8)).shard_size
    512

    Attributes:
        output: "merged" rows are the language model's input. "patch" rows are unmerged patches.
            "mean" is one row per image, the float32 mean of its merged rows.
        dtype: the dtype of stored rows. None selects the encoder's dtype.
        shard_size: the number of images in a shard.
        on_error: "skip" records a failed image and continues. "raise" stops the export.
        part: (I, N) selects the shards I, I+N, I+2N and so on, counted from 1.
        max_failures: the number of consecutive failures that stop an export, because they suggest
            one cause. 0 never stops the export.
        limits: the limits on an image.
        exif: "apply" rotates an image by its EXIF orientation, and "ignore" does not rotate images,
            as in `encode`.
        shard_seconds: seconds between saves of an unfinished shard. A killed export loses about
            this much work. None saves only at an interrupt.
        extend: whether to add new and changed images of the inputs to an existing export.
        retry_failed: whether to try the failed images of an existing export again.
        accept_versions: whether to resume an export with different package versions or a different
            kind of GPU. Each shard records its versions and GPU.
        normalize: whether to divide a mean by its length, as in `encode`.
        layers: the blocks whose dense features the export also stores, as in `encode`.
        column: the column of images in Parquet files. With None, the export reads no Parquet files.
        id_column: the column of ids in Parquet files. With None, a row's id is `file:row`.
        video: which frames of videos to encode, and at what size.
        video_limits: the limits on a video.
        as_video: whether to encode an animated GIF, WebP or PNG as a video, not as its first frame.
        pages: "first", or "all" to export each page of a TIFF and frame of an animation as an
            image. With "all", the export opens every image before it writes the listing.

    Raises:
        ArgumentError: A value has the wrong type, is unknown or is out of range. `normalize` is set
            without output="mean", `id_column` without `column`, or a layer repeats.
    """

    output: FeatureOutput = "merged"
    dtype: Literal["float32", "bfloat16"] | None = None
    shard_size: int = 512
    on_error: OnError = "skip"
    part: tuple[int, int] = (1, 1)
    max_failures: int = 200
    limits: ImageLimits = field(default_factory=ImageLimits)
    normalize: bool = False
    layers: tuple[int, ...] = ()
    column: str | None = None
    id_column: str | None = None
    exif: ExifPolicy = "apply"
    video: VideoOptions = field(default_factory=VideoOptions)
    video_limits: VideoLimits = field(default_factory=VideoLimits)
    as_video: bool = False
    pages: Pages = "first"
    shard_seconds: float | None = None
    extend: bool = False
    retry_failed: bool = False
    accept_versions: bool = False

    @property
    def columns(self) -> ParquetColumns | None:
        """Return the columns of Parquet files to read, or None to read no Parquet files."""
        return ParquetColumns.of(self.column, self.id_column)

    def __post_init__(self) -> None:
        check_choice("output", self.output, get_args(FeatureOutput))
        check_normalize(self.output, self.normalize)
        check_choice("pages", self.pages, get_args(Pages))
        ParquetColumns.of(self.column, self.id_column)
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_choice("exif", self.exif, get_args(ExifPolicy))
        check_choice("dtype", self.dtype, (None, *STORAGE))
        check_choice("on_error", self.on_error, get_args(OnError))
        is_part = (
            isinstance(self.part, tuple) and len(self.part) == 2 and all(map(is_integer, self.part))
        )
        is_size = is_integer(self.shard_size) and self.shard_size >= 1
        seconds = self.shard_seconds
        is_time = seconds is None or (is_number(seconds) and seconds > 0)
        is_count = is_integer(self.max_failures) and self.max_failures >= 0
        for is_right, name, expected in (
            (is_size, "shard_size", "a whole number of images, at least 1"),
            (is_part and 1 <= self.part[0] <= self.part[1], "part", "(I, N) with I from 1 to N"),
            (is_count, "max_failures", "a whole number: 0 (never stop) or more"),
            (is_time, "shard_seconds", "a number above 0, or None"),
            (isinstance(self.limits, ImageLimits), "limits", "ImageLimits"),
            (isinstance(self.video, VideoOptions), "video", "VideoOptions"),
            (isinstance(self.video_limits, VideoLimits), "video_limits", "VideoLimits"),
            *(
                (isinstance(getattr(self, name), bool), name, "True or False")
                for name in ("as_video", "extend", "retry_failed", "accept_versions")
            ),
        ):
            if not is_right:
                raise ArgumentError(
                    f"{name} is {short_repr(getattr(self, name))}", expected=expected
                )


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Describe the tensors of an export's rows: `image_embeds`, and the layers in the order of
    their names.

    `patches_per_row` is None if an image has one row for all its patches.
    """

    tensors: tuple[RowTensor, ...]
    patches_per_row: int | None

    @classmethod
    def of(cls, encoder: VisionEncoder, options: ExportOptions) -> Self:
        config = encoder.config
        check_layers(options.layers, config.depth)
        dtype = encoder.dtype if options.dtype is None else STORAGE[options.dtype]
        is_patch = options.output == "patch"
        width = config.hidden_size if is_patch else config.out_hidden_size
        per_row = {"patch": 1, "merged": config.merge_unit, "mean": None}[options.output]
        layers = (
            RowTensor(name, config.hidden_size, dtype)
            for name in sorted(map(layer_name, options.layers))
        )
        return cls((RowTensor(EMBEDS, width, dtype), *layers), per_row)

    def count(self, n_patches: int) -> int:
        """Return the number of rows of an image.

        >>> RowFormat((), 4).count(24)
        6
        """
        return 1 if self.patches_per_row is None else n_patches // self.patches_per_row

    def n_bytes(self, n_rows: int, n_patches: int) -> int:
        """Return the bytes of `n_rows` rows and of the layers of `n_patches` patches.

        >>> RowFormat((RowTensor("image_embeds", 8, torch.float32),), 4).n_bytes(6, 24)
        192
        """
        rows = (n_rows if name == EMBEDS else n_patches for name, _, _ in self.tensors)
        return sum(
            count * width * dtype.itemsize
            for count, (_, width, dtype) in zip(rows, self.tensors, strict=True)
        )
