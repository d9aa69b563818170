"""Convert features of images and videos for vLLM's engine and server."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_vit.features import AnyFeatures
from qwen_vit.integrations.rows import check_modalities, split_videos

__all__ = ["to_base64", "to_vllm", "to_vllm_chat_part"]


def to_vllm(
    features: AnyFeatures = (),
    *,
    videos: AnyFeatures = (),
    second_per_grid_ts: Sequence[float] = (),
    width: int | None = None,
) -> dict[str, Any]:
    """Return `multi_modal_data` for vLLM's `LLM(..., enable_mm_embeds=True)`.

    >>> from qwen_vit import ImageFeatures
    >>> data = to_vllm([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> {name: tuple(tensor.shape) for name, tensor in data["image"].items()}
    {'image_embeds': (6, 8), 'image_grid_thw': (1, 3)}
    >>> from qwen_vit import VideoFeatures
    >>> clip = VideoFeatures("clip.mp4", torch.ones(12, 8), (2, 4, 6), second_per_grid_t=1.0)
    >>> sorted(to_vllm([clip])["video"])
    ['second_per_grid_ts', 'video_embeds', 'video_grid_thw']

    The prompt must have one `<|image_pad|>` per image and one `<|video_pad|>` per video. A video
    may precede an image. vLLM expands the placeholders itself. Source: vLLM's
    docs/features/multimodal_inputs.md.

    Args:
        features: features of images, in the prompt's order. The function treats VideoFeatures in
            this list as videos, and puts them before the features in `videos`.
        videos: features of videos, in the prompt's order.
        second_per_grid_ts: the seconds per time step of each video's grid: 2 / (frames per second),
            since a time step is two frames. VideoFeatures already contain this value. Without the
            value, vLLM would assume 1 s.
        width: the language model's width. The function rejects features of any other width, which
            would stop vLLM's engine. None disables the check.

    Returns:
        The rows (M, D) and the grids (n, 3) of all images and of all videos, and the videos'
        seconds per time step.

    Raises:
        ExportError: The features are not finite merged tokens of one dtype and one width, their
            width differs from the argument `width`, or an image failed.
        ArgumentError: `features` and `videos` are both empty, or an item has the wrong type or an
            invalid grid. The grid of ImageFeatures in `features` has several time steps.
            `second_per_grid_ts` does not give one number above 0 for each video.
    """
    found, of_videos, seconds = split_videos(features, videos, second_per_grid_ts)
    pictures, clips = check_modalities(found, of_videos, seconds, width)
    data: dict[str, Any] = {}
    if pictures is not None:
        rows, grids = pictures
        data["image"] = {"image_embeds": _joined(rows), "image_grid_thw": grids}
    if clips is not None:
        rows, grids = clips
        data["video"] = {
            "video_embeds": _joined(rows),
            "video_grid_thw": grids,
            "second_per_grid_ts": torch.tensor(seconds, device="cpu"),
        }
    return data


def to_vllm_chat_part(
    features: AnyFeatures = (),
    *,
    videos: AnyFeatures = (),
    second_per_grid_ts: Sequence[float] = (),
    width: int | None = None,
) -> list[dict[str, Any]]:
    """Return one part of a chat message per image or video, for `vllm serve --enable-mm-embeds`.

    >>> from qwen_vit import ImageFeatures
    >>> parts = to_vllm_chat_part([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> [(part["type"], sorted(part["image_embeds"])) for part in parts]
    [('image_embeds', ['image_embeds', 'image_grid_thw'])]

    Since vLLM's pull request 29988 (December 2025), a request may have several such parts. Source:
    vLLM's docs/features/multimodal_inputs.md.

    Args:
        features: features of images and videos, as in `to_vllm`.
        videos: features of videos.
        second_per_grid_ts: the seconds per time step of each video's grid, as in `to_vllm`.
        width: the language model's width, or None to disable the check.

    Returns:
        The parts of the images, then those of the videos. A part contains the rows (n, D), the
        grid (3,) and a video's seconds per time step. Each tensor is the base64-encoded output of
        `torch.save`. Put each part at its position in the prompt.

    Raises:
        ExportError: as in `to_vllm`.
        ArgumentError: as in `to_vllm`.
    """
    found, of_videos, seconds_of = split_videos(features, videos, second_per_grid_ts)
    pictures, clips = check_modalities(found, of_videos, seconds_of, width)
    parts = []
    for rows, grid in zip(*pictures, strict=True) if pictures else ():
        parts.append(_part("image", image_embeds=rows, image_grid_thw=grid))
    for rows, grid, seconds in zip(*clips, seconds_of, strict=True) if clips else ():
        time = torch.tensor(float(seconds), device="cpu")
        parts.append(
            _part("video", video_embeds=rows, video_grid_thw=grid, second_per_grid_ts=time)
        )
    return parts


def _part(kind: str, **tensors: Tensor) -> dict[str, Any]:
    content = {name: to_base64(tensor) for name, tensor in tensors.items()}
    return {"type": f"{kind}_embeds", f"{kind}_embeds": content}


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in rows])


def to_base64(tensor: Tensor) -> str:
    """Encode like vLLM's tensor2base64. Clone first, because `torch.save` writes the whole storage
    of a view."""
    buffer = io.BytesIO()
    torch.save(tensor.cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
