"""Features in the forms that transformers, vLLM and SGLang take, and a tower for transformers.

All three want the same thing: merged rows (sum n, D), image after image in the prompt's order, with
n = t * h * w / 4 rows for the grid (t, h, w) of each image. None of them checks it well (vLLM's
engine may crash on a wrong count), so every function here does before it returns.
"""

import base64
import io
import math
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from operator import index
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor, nn

from qwen_vit.common.tensors import all_finite
from qwen_vit.config import VisionConfig
from qwen_vit.errors import ArgumentError, ExportError
from qwen_vit.features import FailedImage, ImageFeatures, check_features

__all__ = [
    "as_hf_tower",
    "expand_placeholders",
    "to_hf",
    "to_sglang",
    "to_vllm",
    "to_vllm_chat_part",
]

IMAGE_PAD = "<|image_pad|>"
IMAGE_TOKEN_ID = 151_655  # of <|image_pad|> in every published Qwen2.5-VL
MERGE_SIZE = 2


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
    not fit; ExportError for features that are no merged tokens.
    """
    _require_transformers((5, 18), "to_hf")
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    embeds, grids = _rows_and_grids(features)
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
                f"input_ids is a {what}, expected a tensor of shape (prompts, tokens), as a "
                'tokenizer gives with return_tensors="pt"'
            )
        is_image = input_ids == image_token_id
        _check_runs(is_image, [len(rows) for rows in embeds], image_token_id)
        arguments["mm_token_type_ids"] = is_image.long()
    return arguments


def to_vllm(features: Iterable[ImageFeatures | FailedImage]) -> dict[str, Any]:
    """Return `multi_modal_data` for vLLM's `LLM(..., enable_mm_embeds=True)`.

    >>> data = to_vllm([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> {name: tuple(tensor.shape) for name, tensor in data["image"].items()}
    {'image_embeds': (6, 8), 'image_grid_thw': (1, 3)}

    The prompt has one `<|image_pad|>` per image: vLLM expands them itself. Source: vLLM's
    docs/features/multimodal_inputs.md.
    """
    embeds, grids = _rows_and_grids(features)
    rows = torch.cat([rows.cpu() for rows in embeds])
    return {"image": {"image_embeds": rows, "image_grid_thw": grids}}


def to_vllm_chat_part(features: Iterable[ImageFeatures | FailedImage]) -> list[dict[str, Any]]:
    """Return a part of a chat message for each image, for `vllm serve --enable-mm-embeds`.

    >>> parts = to_vllm_chat_part([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> [(part["type"], sorted(part["image_embeds"])) for part in parts]
    [('image_embeds', ['image_embeds', 'image_grid_thw'])]

    Each tensor, (n, D) and (3,), is what `torch.save` writes, in base64. A request may have several
    such parts since vLLM's pull request 29988 (December 2025). Source: vLLM's
    docs/features/multimodal_inputs.md.
    """
    embeds, grids = _rows_and_grids(features)
    return [
        {
            "type": "image_embeds",
            "image_embeds": {"image_embeds": _base64(rows), "image_grid_thw": _base64(grid)},
        }
        for rows, grid in zip(embeds, grids, strict=True)
    ]


def to_sglang(features: Iterable[ImageFeatures | FailedImage]) -> list[dict[str, Any]]:
    """Return `image_data` for one request to SGLang's engine: a single item for all its images.

    >>> [item] = to_sglang([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> item["format"], tuple(item["feature"].shape), item["image_grid_thw"].tolist()
    ('precomputed_embedding', (6, 8), [[1, 4, 6]])

    `input_ids` go with it, from a prompt that `expand_placeholders` expanded. Source: SGLang's
    docs/advanced_features/vlm_query.ipynb and srt/multimodal/processors/base_processor.py.
    """
    embeds, grids = _rows_and_grids(features)
    rows = torch.cat([rows.cpu() for rows in embeds])
    return [{"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grids}]


def expand_placeholders(
    text: str, grids: Iterable[Iterable[int]], merge_size: int = MERGE_SIZE
) -> str:
    """Repeat each `<|image_pad|>` of a prompt once per token of its image, as a processor does.

    >>> expand_placeholders("<|vision_start|><|image_pad|><|vision_end|>What?", [(1, 4, 4)])
    '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>What?'

    `grids` are (t, h, w) in patches, in the prompt's order: rows of an `image_grid_thw`, or the
    `grid_thw` of features. Raises ArgumentError where the counts differ or a grid is none.
    """
    counts = [_n_tokens(_whole_numbers(grid), merge_size) for grid in grids]
    found = text.count(IMAGE_PAD)
    if found != len(counts):
        raise ArgumentError(
            f"the text has {found} {IMAGE_PAD} for {len(counts)} images, expected one each; write "
            "one per image, not yet expanded"
        )
    repeats = iter(counts)
    return re.sub(re.escape(IMAGE_PAD), lambda _: IMAGE_PAD * next(repeats), text)


class PatchEncoder(Protocol):
    """What a tower needs of a `VisionEncoder`, which lies above this module."""

    @property
    def config(self) -> VisionConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def encode_patches(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor: ...


class _HFTower(nn.Module):
    """A `VisionEncoder` with the face of transformers' vision tower; it has no parameters."""

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

    `model.model.visual = as_hf_tower(encoder)` keeps everything else as it is, for images and
    videos. Forward only, no gradients; `last_hidden_state`, which nothing there reads, is None.
    Needs transformers 5.17 or newer.
    """
    if not callable(getattr(encoder, "encode_patches", None)):
        raise ArgumentError(
            f"encoder is {encoder!r}, expected a VisionEncoder; make one with from_pretrained"
        )
    _require_transformers((5, 17), "as_hf_tower")
    return _HFTower(encoder)


def _require_transformers(least: tuple[int, int], what: str) -> None:
    wanted = f"{what} needs transformers {least[0]}.{least[1]} or newer"
    install = f"pip install 'transformers>={least[0]}.{least[1]}'"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ArgumentError(f"{wanted}, which is not installed; {install}") from None
    if Version(found).release < least:
        raise ArgumentError(f"{wanted}, and {found} is installed; {install}")


def _rows_and_grids(features: Iterable[ImageFeatures | FailedImage]) -> tuple[list[Tensor], Tensor]:
    """Each image's merged rows, and all grids (N, 3), once every promise about them was checked."""
    images = check_features(features)
    if not images:
        raise ArgumentError("there are no images in it, expected one at least; leave images out")
    embeds = [_merged_rows(image) for image in images]
    good = [image for image in images if isinstance(image, ImageFeatures)]
    kinds = {
        (rows.shape[1], rows.dtype): image.id for rows, image in zip(embeds, images, strict=True)
    }
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise ExportError(
            f"{one!r} has rows of {first[0]} {first[1]} and {other!r} of {second[0]} {second[1]}, "
            "expected the same; take features of one model and data type"
        )
    grids = [image.grid_thw for image in good]
    return embeds, torch.tensor(grids, dtype=torch.int64, device="cpu")


def _merged_rows(image: ImageFeatures | FailedImage) -> Tensor:
    if isinstance(image, FailedImage):
        raise ExportError(f"{image.id!r} has no features ({image.error}); leave it out")
    expected = _n_tokens(image.grid_thw, MERGE_SIZE)
    if image.embeds.dim() != 2 or len(image.embeds) != expected:
        raise ExportError(
            f"{image.id!r} has features of shape {tuple(image.embeds.shape)}, expected {expected} "
            f"merged rows for its grid of {image.grid_thw}; a language model takes "
            'output="merged", neither "patch" nor "mean": encode or export again with it'
        )
    if not image.embeds.is_floating_point() or not all_finite(image.embeds):
        raise ExportError(
            f"{image.id!r} has features of {image.embeds.dtype} with NaN, infinity or integers, "
            "expected finite floating-point numbers; encode or export it again"
        )
    return image.embeds


def _whole_numbers(grid: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, grid))
    except TypeError:  # 4.7 is no 4
        raise ArgumentError(
            f"a grid is {grid!r}, expected whole numbers of frames, height and width in patches; "
            "pass what came with the features"
        ) from None


def _n_tokens(grid: tuple[int, ...], merge_size: int) -> int:
    is_whole = len(grid) == 3 and min(grid) > 0 and not any(n % merge_size for n in grid[1:])
    if not is_whole:
        raise ArgumentError(
            f"a grid is {grid}, expected frames, height and width in patches, the latter two "
            f"multiples of {merge_size}; pass what came with the features"
        )
    return math.prod(grid) // merge_size**2


def _check_runs(is_image: Tensor, counts: list[int], image_token_id: int) -> None:
    """The prompt's unbroken runs of image tokens are as long as its images, in their order."""
    runs = [len(list(run)) for row in is_image.tolist() for same, run in groupby(row) if same]
    if runs != counts:
        raise ArgumentError(
            f"input_ids have {len(runs)} runs of the image token {image_token_id}, of the lengths "
            f"{runs}, but the images have {counts} tokens; expand the prompt for these images, in "
            "their order (expand_placeholders)"
        )


def _base64(tensor: Tensor) -> str:
    """As vLLM's tensor2base64; a clone, because `torch.save` writes all that a view looks into."""
    buffer = io.BytesIO()
    torch.save(tensor.cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
