"""transformers: features in place of pixels, prompts, and the encoder in place of its tower."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_vit.common.transformers_version import require_transformers
from qwen_vit.errors import ArgumentError, plural
from qwen_vit.features import AnyFeatures
from qwen_vit.integrations.rows import (
    MERGE_SIZE,
    check_modalities,
    count_tokens,
    split_videos,
    whole_numbers,
)

if TYPE_CHECKING:
    from qwen_vit.encoder import VisionEncoder

__all__ = ["IMAGE_TOKEN_ID", "VIDEO_TOKEN_ID", "as_hf_tower", "expand_placeholders", "to_hf"]

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 151_655, 151_656  # theirs in every published Qwen2.5-VL


def to_hf(
    features: AnyFeatures = (),
    input_ids: Tensor | None = None,
    *,
    videos: AnyFeatures = (),
    second_per_grid_ts: Sequence[float] = (),
    image_token_id: int = IMAGE_TOKEN_ID,
    video_token_id: int = VIDEO_TOKEN_ID,
    mm_token_type_ids: bool = True,
) -> dict[str, Any]:
    """Return what transformers' Qwen2.5-VL and Qwen2.5-Omni (its thinker) take instead of pixels.

    >>> import torch; from qwen_vit import ImageFeatures
    >>> made = [ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))]
    >>> sorted(to_hf(made))
    ['image_grid_thw', 'mm_encoder_outputs']
    >>> ids = torch.tensor([[7, *6 * [IMAGE_TOKEN_ID], 8]])
    >>> to_hf(made, ids)["mm_token_type_ids"]
    tensor([[0, 1, 1, 1, 1, 1, 1, 0]])
    >>> from qwen_vit import VideoFeatures
    >>> sorted(to_hf(VideoFeatures("clip.mp4", torch.ones(12, 8), (2, 4, 6))))
    ['mm_encoder_outputs', 'second_per_grid_ts', 'video_grid_thw']

    These are arguments of `generate` and `forward`. Needs transformers 5.18 or newer.

    Source: `mm_encoder_outputs` in transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py.

    Args:
        features: of pictures, in the prompts' order. VideoFeatures among them are videos, and come
            before those of `videos`.
        input_ids: the prompts' tokens (batch, sequence). They are checked against the features, and
            `mm_token_type_ids` is made from them. Without those, Qwen2.5-VL silently numbers the
            tokens of images and videos as if they were text.
        videos: features of videos, in the prompts' order.
        second_per_grid_ts: for each video, the seconds from one step of its grid to the next: 2 /
            (frames per second), since a step is two frames. VideoFeatures have their own.
        image_token_id: of `<|image_pad|>`.
        video_token_id: of `<|video_pad|>`.
        mm_token_type_ids: False for Qwen2.5-Omni, which finds images itself and refuses them. Its
            name for the seconds is `video_second_per_grid`.

    Raises:
        ArgumentError: a transformers that is missing or too old, tokens that do not fit the
            features, nothing to send, a video among the pictures, or one without its seconds.
        ExportError: features that are not merged tokens, and failed images.
    """
    require_transformers("to_hf")
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    of_pictures, of_videos, seconds = split_videos(features, videos, second_per_grid_ts)
    pictures, clips = check_modalities(of_pictures, of_videos, seconds)
    arguments: dict[str, Any] = {"mm_encoder_outputs": {}}
    for kind, found in (("image", pictures), ("video", clips)):
        if found is not None:
            embeds, grids = found
            made = BaseModelOutputWithPooling(pooler_output=embeds)
            arguments["mm_encoder_outputs"][kind] = made
            arguments[f"{kind}_grid_thw"] = grids
    if clips is not None:
        name = "second_per_grid_ts" if mm_token_type_ids else "video_second_per_grid"
        arguments[name] = torch.tensor(seconds, device="cpu")
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
        is_image, is_video = input_ids == image_token_id, input_ids == video_token_id
        for kind, where, token_id, given in (
            ("image", is_image, image_token_id, pictures),
            ("video", is_video, video_token_id, clips),
        ):
            counts = [len(rows) for rows in given[0]] if given else []
            _check_runs(kind, where, counts, token_id)
        if mm_token_type_ids:
            arguments["mm_token_type_ids"] = is_image.long() + 2 * is_video.long()
    return arguments


def expand_placeholders(
    text: str,
    grids: Iterable[Iterable[int]] = (),
    merge_size: int = MERGE_SIZE,
    *,
    video_grids: Iterable[Iterable[int]] = (),
) -> str:
    """Repeat a prompt's placeholders once per token of an image or video, as a processor does.

    >>> expand_placeholders("<|vision_start|><|image_pad|><|vision_end|>What?", [(1, 4, 4)])
    '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>What?'
    >>> expand_placeholders("<|video_pad|>What?", video_grids=[(2, 2, 2)])
    '<|video_pad|><|video_pad|>What?'

    Args:
        text: with one `<|image_pad|>` for each image and one `<|video_pad|>` for each video.
        grids: of the images, (t, h, w) in patches, in the prompt's order: rows of an
            `image_grid_thw`, or the `grid_thw` of features.
        merge_size: the side, in patches, of the square that becomes one token.
        video_grids: those of the videos.

    Raises:
        ArgumentError: the counts differ, or a grid is wrong.
    """
    for kind, pad, of_kind in (("image", IMAGE_PAD, grids), ("video", VIDEO_PAD, video_grids)):
        counts = [count_tokens(whole_numbers(grid), merge_size) for grid in of_kind]
        found = text.count(pad)
        if found != len(counts):
            raise ArgumentError(
                f"the text has {found} {pad} for {plural(len(counts), kind)}",
                expected=f"one per {kind}",
                remedy=f"write one per {kind}, not yet expanded",
            )
        text = _repeated(text, pad, counts)
    return text


def _repeated(text: str, pad: str, counts: list[int]) -> str:
    """The text with each placeholder repeated by its count."""
    repeats = iter(counts)
    return re.sub(re.escape(pad), lambda _: pad * next(repeats), text)


def as_hf_tower(encoder: "VisionEncoder") -> nn.Module:
    """Return a drop-in for the vision tower of transformers' Qwen2.5-VL and Qwen2.5-Omni.

    >>> from qwen_vit import VisionEncoder
    >>> tower = as_hf_tower(VisionEncoder.from_pretrained("tiny"))
    >>> tower.dtype, tower.spatial_merge_size
    (torch.float32, 2)
    >>> tower.state_dict()["merger.ln_q.weight"].shape
    torch.Size([160])

    `model.set_encoder(as_hf_tower(encoder), modality="image")` replaces the tower alone, for images
    and videos, wherever this version of transformers has it (Omni: of `model.thinker`). The
    language model behind it can be trained.

    Args:
        encoder: from_pretrained or from_tensors made it. The tower begins with this encoder, and
            builds others when it moves or loads weights; yours stays what it is.

    Returns:
        A module without parameters: no optimiser sees it, no weight decay changes it, and counts of
        parameters go without it.

    What the module does:

    - `state_dict` has the published names and values, as copies in host memory, whatever the
      device and dtype: a saved model is one of transformers.
    - `load_state_dict` takes other weights, all or some, and builds the encoder again.
    - `to`, `cuda`, `cpu`, `float` and `bfloat16` build the encoder again where it is asked to
      be. On a CPU float32 stands for bfloat16, with a warning. float16 is refused.
    - `train` and `eval` change nothing: in training it warns once that the tower is frozen.
      `requires_grad_()`, pixel rows that want gradients and PEFT's adapters are refused.
    - torch.compile breaks its graph at the tower and goes on behind it.
    - `pooler_output` of its result holds the merged rows; `last_hidden_state`, which
      transformers does not read, is None.

    Needs transformers 5.18 or newer. Raises ArgumentError for a transformers that is missing or too
    old, and for another encoder.
    """
    if not callable(getattr(encoder, "encode_patches", None)):
        raise ArgumentError(
            f"encoder is {encoder!r}",
            expected="a VisionEncoder",
            remedy="load one with VisionEncoder.from_pretrained",
        )
    require_transformers("as_hf_tower")
    from qwen_vit.integrations.hf_tower import HFTower  # imports torch._dynamo: 1.5 s

    return HFTower(encoder)


def _check_runs(kind: str, where: Tensor, counts: list[int], token_id: int) -> None:
    """Raise ArgumentError unless each unbroken run of a kind's tokens is as long as its item."""
    runs = [len(list(run)) for row in where.tolist() for same, run in groupby(row) if same]
    if runs != counts:
        raise ArgumentError(
            f"input_ids have {plural(len(runs), 'run')} of the {kind} token {token_id}, of "
            f"the lengths {runs}",
            expected=f"{counts}, the tokens of each {kind}",
            remedy=f"expand the prompt for these {kind}s, in their order (expand_placeholders)",
        )
