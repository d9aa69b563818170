"""Read and check the configuration of a checkpoint's tower and images.

The dimension key of the package's comments and docstrings:

    N  patches              H  attention heads            C  hidden size
    M  merged tokens        D  head dim                   I  MLP size
    S  segments             R  rotary pairs, D / 2        O  output size
    P  values per patch: channels x frames x patch_px x patch_px

Names such as `window_px` give the unit. `Grid.h` and `Grid.w` are in patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from qwen_vit.common.arguments import short_repr
from qwen_vit.common.strict_json import (
    check_integer,
    child_object,
    is_integer,
    is_number,
    read_json,
)
from qwen_vit.config_json import VISION_KEYS, find_vision_part, image_fields, vision_fields
from qwen_vit.errors import ArgumentError, CheckpointError, with_options

__all__ = [
    "RMS_NORM_EPS",
    "Grid",
    "ImageConfig",
    "VisionConfig",
    "check_consistent",
]

RMS_NORM_EPS = 1e-6  # fixed in the published model; its config does not give it

MAX_PIXEL_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Grid:
    """Describe the patches of one image or video: `t` frames of `h` rows and `w` columns.

    For a video, a frame of the grid is a pair of the video's frames.

    >>> Grid(1, 32, 24).n_patches, Grid(1, 32, 24).n_tokens(merge_unit=4)
    (768, 192)
    """

    t: int
    h: int
    w: int

    @property
    def n_patches(self) -> int:
        return self.t * self.h * self.w

    def n_tokens(self, merge_unit: int) -> int:
        return self.n_patches // merge_unit


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Describe the tower's architecture. The fields have no defaults, so that each object states
    every number.

    >>> config = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
    >>> config.head_dim, config.patch_dim, config.window_units, config.factor_px
    (80, 1176, 4, 28)

    Key names follow transformers' models/qwen2_5_vl/configuration_qwen2_5_vl.py.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    in_channels: int
    patch_px: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_px: int
    fullatt_block_indexes: tuple[int, ...]
    rope_theta: float

    def __post_init__(self) -> None:
        for field, names, _, maximum in VISION_KEYS:
            check_integer(getattr(self, field), names[0], maximum)
        window = f"window_size {self.window_px} px"
        unit = f"a merge unit of {self.factor_px} px"
        rules = (  # condition, the fact if it is false, the expected value
            (self.in_channels == 3, f"in_channels is {self.in_channels}", "3 (RGB)"),
            (
                self.temporal_patch_size == 2,
                f"temporal_patch_size is {self.temporal_patch_size}",
                "2",
            ),
            (
                self.hidden_size % self.num_heads == 0,
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}",
                "",
            ),
            (
                self.hidden_size % (8 * self.num_heads) == 0,
                f"head_dim is hidden_size {self.hidden_size} / num_heads {self.num_heads}",
                "a multiple of 8",
            ),
            (
                self.out_hidden_size % 8 == 0,
                f"out_hidden_size is {self.out_hidden_size}",
                "a multiple of 8: the GPU moves rows in pieces of 16 bytes",
            ),
            (self.window_px >= self.factor_px, f"{window} is smaller than {unit}", ""),
            (self.window_px % self.factor_px == 0, f"{window} is not a multiple of {unit}", ""),
            (
                is_number(self.rope_theta) and self.rope_theta > 1,
                f"rope_theta is {short_repr(self.rope_theta)}",
                "a number above 1, and at most 1e12",
            ),
        )
        for passed, fact, expected in rules:
            if not passed:
                raise CheckpointError(fact, expected=expected)
        self._check_fullatt_block_indexes()

    def _check_fullatt_block_indexes(self) -> None:
        name = "fullatt_block_indexes"
        seen: set[int] = set()
        for index in self.fullatt_block_indexes:
            if not is_integer(index):
                raise CheckpointError(f"{name} contains {short_repr(index)}", expected="integers")
            if not 0 <= index < self.depth:
                raise CheckpointError(
                    f"{name} contains {short_repr(index)}",
                    expected=f"0 to {self.depth - 1} (depth is {self.depth})",
                )
            if index in seen:
                raise CheckpointError(f"{name} contains {index} twice", expected="each block once")
            seen.add(index)

    @property
    def head_dim(self) -> int:
        """Return D."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_pairs(self) -> int:
        """Return R. Half of the pairs encode the row, and half encode the column."""
        return self.head_dim // 2

    @property
    def patch_dim(self) -> int:
        """Return P, the number of values in one of Hugging Face's pixel rows."""
        return self.in_channels * self.temporal_patch_size * self.patch_px**2

    @property
    def merge_unit(self) -> int:
        """Return the number of patches per merged token."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Return a window's side in merge units."""
        return self.window_px // self.patch_px // self.spatial_merge_size

    @property
    def factor_px(self) -> int:
        """Return a merge unit's side in pixels. The sides of resized images are multiples of it."""
        return self.patch_px * self.spatial_merge_size

    @classmethod
    def from_json(
        cls, config: Mapping[str, Any] | str | Path, *, source: str = "config.json"
    ) -> Self:
        """Read a whole model's config.json, or its vision part, as parsed JSON or a path.

        Missing keys get the values of the published 3B and 7B models. out_hidden_size must be
        present, because it differs between these models. Raises CheckpointError with the file and
        the rule.
        """
        config, source = _open(config, source)
        vision, where = find_vision_part(config, source)
        try:
            return cls(**vision_fields(vision))
        except CheckpointError as error:
            raise CheckpointError.of(
                error, name=where, remedy="use the config.json that belongs to the weights"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return the config in Hugging Face's format, which `from_json` reads."""
        return {
            "model_type": "qwen2_5_vl_vision",
            **{names[0]: getattr(self, field) for field, names, _, _ in VISION_KEYS},
            "fullatt_block_indexes": list(self.fullatt_block_indexes),
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "axial"},
        }


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Choose how images become patches: size limits, normalisation, and patch and merge sizes.

    >>> ImageConfig.from_json({"size": {"shortest_edge": 3136, "longest_edge": 50176}}).max_pixels
    50176

    `min_pixels` and `max_pixels` limit height x width after resizing. A thin image may exceed
    `max_pixels`, because no side is shorter than a merge unit. Mean and standard deviation are per
    RGB channel, for values from 0 to 1. Key names follow transformers'
    models/qwen2_vl/image_processing_qwen2_vl.py.
    """

    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    patch_px: int
    temporal_patch_size: int
    merge_size: int

    def __post_init__(self) -> None:
        for name, maximum in (("patch_px", 1_024), ("temporal_patch_size", 2), ("merge_size", 64)):
            check_integer(getattr(self, name), name.replace("_px", "_size"), maximum)
        for name in ("min_pixels", "max_pixels"):
            check_integer(getattr(self, name), name, MAX_PIXEL_LIMIT)
        if self.max_pixels < self.min_pixels:
            raise CheckpointError(
                f"max_pixels {self.max_pixels} is smaller than min_pixels {self.min_pixels}"
            )
        factor_px = self.patch_px * self.merge_size
        if self.max_pixels < factor_px**2:
            raise CheckpointError(
                f"max_pixels is {self.max_pixels}",
                expected=f"at least {factor_px**2}: one merged token is {factor_px} x {factor_px} "
                "pixels",
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(map(is_number, values)):
                raise CheckpointError(f"{name} is {short_repr(values)}", expected="three numbers")
        if min(self.image_std) <= 0:
            raise CheckpointError(
                f"image_std is {short_repr(self.image_std)}", expected="values above 0"
            )

    @classmethod
    def from_json(
        cls, config: Mapping[str, Any] | str | Path, *, source: str = "preprocessor_config.json"
    ) -> Self:
        """Read preprocessor_config.json, or processor_config.json, as parsed JSON or a path.

        Missing or null keys get transformers' defaults. Raises CheckpointError with the file and
        the rule, for example if the file requests a resampling filter other than bicubic.
        """
        config, source = _open(config, source)
        if "image_processor" in config:
            config, source = child_object(config, "image_processor", source)
        try:
            return cls(**image_fields(config))
        except CheckpointError as error:
            raise CheckpointError.of(
                error, name=source, remedy="use the file that belongs to the weights"
            ) from None

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> "ImageConfig":
        """Return a copy with other limits on height x width. None keeps a limit.

        >>> ImageConfig.from_json({}).bounded(None, 50_176).max_pixels
        50176
        """
        try:
            return replace(
                self,
                min_pixels=self.min_pixels if min_pixels is None else min_pixels,
                max_pixels=self.max_pixels if max_pixels is None else max_pixels,
            )
        except CheckpointError as error:
            raise ArgumentError.of(
                error, remedy=with_options("pass other {} or {}", "min_pixels", "max_pixels")
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as Hugging Face's preprocessor_config, which `from_json` reads."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "patch_size": self.patch_px,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
        }


def check_consistent(
    vision: VisionConfig, image: ImageConfig, *, source: str = "preprocessor_config.json"
) -> None:
    for name, images_have, tower_has in (
        ("patch_size", image.patch_px, vision.patch_px),
        ("temporal_patch_size", image.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", image.merge_size, vision.spatial_merge_size),
    ):
        if images_have != tower_has:
            raise CheckpointError(
                f"{name} is {images_have}, but config.json has {tower_has}",
                name=source,
                remedy="use the two files of one checkpoint",
            )


def _open(config: Mapping[str, Any] | str | Path, source: str) -> tuple[Mapping[str, Any], str]:
    if isinstance(config, str | Path):
        return read_json(Path(config)), str(config)
    return config, source
