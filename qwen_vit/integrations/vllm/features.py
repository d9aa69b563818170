"""vLLM: features for its engine and for its server."""

import base64
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.integrations.rows import rows_and_grids

__all__ = ["to_vllm", "to_vllm_chat_part"]


def to_vllm(features: Iterable[ImageFeatures | FailedImage]) -> dict[str, Any]:
    """Return `multi_modal_data` for vLLM's `LLM(..., enable_mm_embeds=True)`.

    >>> data = to_vllm([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> {name: tuple(tensor.shape) for name, tensor in data["image"].items()}
    {'image_embeds': (6, 8), 'image_grid_thw': (1, 3)}

    The prompt has one `<|image_pad|>` per image: vLLM expands them itself. Source: vLLM's
    docs/features/multimodal_inputs.md.

    Raises ExportError for features that are not merged tokens, and for failed images.
    """
    embeds, grids = rows_and_grids(features)
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

    Raises ExportError for features that are not merged tokens, and for failed images.
    """
    embeds, grids = rows_and_grids(features)
    return [
        {
            "type": "image_embeds",
            "image_embeds": {"image_embeds": _base64(rows), "image_grid_thw": _base64(grid)},
        }
        for rows, grid in zip(embeds, grids, strict=True)
    ]


def _base64(tensor: Tensor) -> str:
    """As vLLM's tensor2base64. A clone, because `torch.save` writes the whole storage of a view."""
    buffer = io.BytesIO()
    torch.save(tensor.cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
