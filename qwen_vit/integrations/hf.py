"""transformers: features in place of pixels, prompts, and the encoder in place of its tower."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor, nn

from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError, plural
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.integrations.rows import MERGE_SIZE, count_tokens, rows_and_grids, whole_numbers

__all__ = ["IMAGE_TOKEN_ID", "PatchEncoder", "as_hf_tower", "expand_placeholders", "to_hf"]

IMAGE_PAD = "<|image_pad|>"
IMAGE_TOKEN_ID = 151_655  # of <|image_pad|> in every published Qwen2.5-VL


def to_hf(
    features: Iterable[ImageFeatures | FailedImage],
    input_ids: Tensor | None = None,
    *,
    image_token_id: int = IMAGE_TOKEN_ID,
) -> dict[str, Any]:
    """Return what transformers' Qwen2.5-VL takes instead of pixels, in `generate` and `forward`.

    >>> made = [ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))]
    >>> sorted(to_hf(made))
    ['image_grid_thw', 'mm_encoder_outputs']
    >>> ids = torch.tensor([[7, *6 * [IMAGE_TOKEN_ID], 8]])
    >>> to_hf(made, ids)["mm_token_type_ids"]
    tensor([[0, 1, 1, 1, 1, 1, 1, 0]])

    With `input_ids` (batch, sequence), whose image tokens are checked against the features, it adds
    `mm_token_type_ids`; without those, transformers silently numbers image tokens as if they were
    text. Needs transformers 5.18 or newer. Source: `mm_encoder_outputs` in transformers'
    models/qwen2_5_vl/modeling_qwen2_5_vl.py.

    Raises ArgumentError for a transformers that is missing or too old and for image tokens that do
    not fit; ExportError for features that are not merged tokens.
    """
    _require_transformers("5.18", "to_hf")
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    embeds, grids = rows_and_grids(features)
    arguments = {
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=embeds)},
        "image_grid_thw": grids,
    }
    if input_ids is not None:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            what = type(input_ids).__name__
            if isinstance(input_ids, Tensor):
                what = f"tensor of shape {tuple(input_ids.shape)}"
            raise ArgumentError(
                f"input_ids is a {what}",
                expected="a tensor of shape (prompts, tokens)",
                remedy='call the tokenizer with return_tensors="pt"',
            )
        is_image = input_ids == image_token_id
        _check_runs(is_image, [len(rows) for rows in embeds], image_token_id)
        arguments["mm_token_type_ids"] = is_image.long()
    return arguments


def expand_placeholders(
    text: str, grids: Iterable[Iterable[int]], merge_size: int = MERGE_SIZE
) -> str:
    """Repeat each `<|image_pad|>` of a prompt once per token of its image, as a processor does.

    >>> expand_placeholders("<|vision_start|><|image_pad|><|vision_end|>What?", [(1, 4, 4)])
    '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>What?'

    `grids` are (t, h, w) in patches, in the prompt's order: rows of an `image_grid_thw`, or the
    `grid_thw` of features. Raises ArgumentError where the counts differ or a grid is wrong.
    """
    counts = [count_tokens(whole_numbers(grid), merge_size) for grid in grids]
    found = text.count(IMAGE_PAD)
    if found != len(counts):
        raise ArgumentError(
            f"the text has {found} {IMAGE_PAD} for {plural(len(counts), 'image')}",
            expected="one per image",
            remedy="write one per image, not yet expanded",
        )
    repeats = iter(counts)
    return re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(repeats), text)


class PatchEncoder(Protocol):
    """What a tower needs of a `VisionEncoder`, which is in a layer above this module."""

    @property
    def config(self) -> VisionConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def encode_patches(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor: ...


class _HFTower(nn.Module):
    """A `VisionEncoder` with the interface of transformers' vision tower and no parameters."""

    def __init__(self, encoder: PatchEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.spatial_merge_size = encoder.config.spatial_merge_size

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **_: Any) -> Any:
        """Pixel rows (N, 1176) and grids (images, 3) to merged rows, as `pooler_output`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        merged = self.encoder.encode_patches(hidden_states, grid_thw)
        return BaseModelOutputWithPooling(pooler_output=merged)


def as_hf_tower(encoder: PatchEncoder) -> nn.Module:
    """Return a drop-in for the vision tower of transformers' Qwen2.5-VL.

    >>> from qwen_vit import VisionEncoder
    >>> tower = as_hf_tower(VisionEncoder.from_pretrained("tiny"))
    >>> tower.dtype, tower.spatial_merge_size
    (torch.float32, 2)

    `model.model.visual = as_hf_tower(encoder)` replaces the tower alone, for images and videos.
    Forward only, no gradients; `last_hidden_state`, which transformers does not read, is None.
    The tower copies and pickles as its encoder does. Needs transformers 5.17 or newer.

    Raises ArgumentError for a transformers that is missing or too old, and for another encoder.
    """
    if not callable(getattr(encoder, "encode_patches", None)):
        raise ArgumentError(
            f"encoder is {encoder!r}",
            expected="a VisionEncoder",
            remedy="load one with VisionEncoder.from_pretrained",
        )
    _require_transformers("5.17", "as_hf_tower")
    return _HFTower(encoder)


def _require_transformers(minimum: str, what: str) -> None:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        fact = "transformers is not installed"
    else:
        if Version(found).release >= Version(minimum).release:
            return
        fact = f"transformers {found} is installed"
    raise ArgumentError(
        fact,
        expected=f"{minimum} or newer, which {what} needs",
        remedy=f"run pip install 'transformers>={minimum}'",
    )


def _check_runs(is_image: Tensor, counts: list[int], image_token_id: int) -> None:
    """Raise ArgumentError unless each unbroken run of image tokens is as long as its image."""
    runs = [len(list(run)) for row in is_image.tolist() for same, run in groupby(row) if same]
    if runs != counts:
        raise ArgumentError(
            f"input_ids have {plural(len(runs), 'run')} of the image token {image_token_id}, of "
            f"the lengths {runs}",
            expected=f"{counts}, the tokens of each image",
            remedy="expand the prompt for these images, in their order (expand_placeholders)",
        )
