"""Pass features in place of pixels to transformers, and replace its vision tower."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_vit.common.arguments import short_repr, typed_repr
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
IMAGE_TOKEN_ID, VIDEO_TOKEN_ID = 151_655, 151_656  # the token ids in every published Qwen2.5-VL


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
    """Return arguments that replace pixels in transformers' Qwen2.5-VL and Qwen2.5-Omni thinker.

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

    Pass the arguments to `generate` or `forward` of transformers 5.18 or newer.

    Source: `mm_encoder_outputs` in transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py.

    Args:
        features: features of images, in the prompts' order. The function treats VideoFeatures in
            this list as videos, and puts them before the features in `videos`.
        input_ids: the prompts' tokens (batch, sequence). The function checks them against the
            features, and computes `mm_token_type_ids` from them. Without `mm_token_type_ids`,
            Qwen2.5-VL silently assigns text positions to the tokens of images and videos.
        videos: features of videos, in the prompts' order.
        second_per_grid_ts: the seconds per time step of each video's grid: 2 / (frames per second),
            since a time step is two frames. VideoFeatures already contain this value.
        image_token_id: the token id of `<|image_pad|>`.
        video_token_id: the token id of `<|video_pad|>`.
        mm_token_type_ids: False for Qwen2.5-Omni, which finds images itself and rejects this
            argument. The result then has Omni's key for the seconds, `video_second_per_grid`.

    Returns:
        Keyword arguments by name. `mm_encoder_outputs` contains the merged rows of all images and
        of all videos, and `image_grid_thw` and `video_grid_thw` contain their grids, (n, 3) int64.

    Raises:
        ArgumentError: transformers is missing or too old. `features` and `videos` are both empty,
            or an item has the wrong type or an invalid grid. The grid of ImageFeatures in
            `features` has several time steps. `second_per_grid_ts` does not give one number above 0
            for each video. `input_ids` is not a tensor (batch, sequence), or its runs of
            placeholder tokens do not match the items' token counts, in order.
        ExportError: The features are not finite merged tokens of one width and dtype, or an image
            failed.
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
            what = typed_repr(input_ids)
            if isinstance(input_ids, Tensor):
                what = f"a tensor of shape {tuple(input_ids.shape)}"
            raise ArgumentError(
                f"input_ids is {what}",
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
    """Repeat each placeholder of a prompt once per image or video token, as a processor does.

    >>> expand_placeholders("<|vision_start|><|image_pad|><|vision_end|>What?", [(1, 4, 4)])
    '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>What?'
    >>> expand_placeholders("<|video_pad|>What?", video_grids=[(2, 2, 2)])
    '<|video_pad|><|video_pad|>What?'

    Args:
        text: the prompt, with one `<|image_pad|>` per image and one `<|video_pad|>` per video.
        grids: the images' grids, (t, h, w) in patches, in the prompt's order: rows of an
            `image_grid_thw`, or the `grid_thw` of features.
        merge_size: the side, in patches, of the square that becomes one token.
        video_grids: the videos' grids, in the same format.

    Returns:
        The prompt with one placeholder per token.

    Raises:
        ArgumentError: `text` is not a string, or does not have one placeholder for each grid. A
            grid is not three whole numbers above 0. Its height and width must be divisible by
            `merge_size`.
    """
    if not isinstance(text, str):
        raise ArgumentError(f"text is {typed_repr(text)}", expected="the prompt")
    for kind, pad, of_kind in (("image", IMAGE_PAD, grids), ("video", VIDEO_PAD, video_grids)):
        if not isinstance(of_kind, Iterable):
            raise ArgumentError(
                f"{kind} grids are {short_repr(of_kind)}",
                expected="a list of grids such as [(1, 4, 4)]",
            )
        counts = [count_tokens(whole_numbers(grid), merge_size) for grid in of_kind]
        found = text.count(pad)
        if found != len(counts):
            raise ArgumentError(
                f"the text has {found} {pad} for {plural(len(counts), kind)}",
                expected=f"one per {kind}",
                remedy=f"write one {pad} per {kind}, and expand the text only once",
            )
        text = _repeated(text, pad, counts)
    return text


def _repeated(text: str, pad: str, counts: list[int]) -> str:
    repeats = iter(counts)
    return re.sub(re.escape(pad), lambda _: pad * next(repeats), text)


def as_hf_tower(encoder: "VisionEncoder") -> nn.Module:
    """Return a replacement for the vision tower of transformers' Qwen2.5-VL and Qwen2.5-Omni.

    >>> from qwen_vit import VisionEncoder
    >>> tower = as_hf_tower(VisionEncoder.from_pretrained("tiny"))
    >>> tower.dtype, tower.spatial_merge_size
    (torch.float32, 2)
    >>> tower.state_dict()["merger.ln_q.weight"].shape
    torch.Size([160])

    `model.set_encoder(as_hf_tower(encoder), modality="image")` replaces only the tower, for images
    and videos. For Omni, call `model.thinker.set_encoder`. The language model remains trainable.

    Args:
        encoder: an encoder from `from_pretrained` or `from_tensors`. The tower starts with this
            encoder, and builds a new one when it moves or loads weights. Your encoder does not
            change.

    Returns:
        A module without parameters, so optimisers, weight decay and parameter counts ignore it.

    Raises:
        ArgumentError: transformers is missing or older than 5.18, or `encoder` has no
            `encode_patches`.

    Behaviour of the module:

    - `state_dict` returns the published names and values, as copies in host memory, for every
      device and dtype, so transformers can load a saved model.
    - `load_state_dict` loads all or some weights, and rebuilds the encoder if a weight changes.
    - `to`, `cuda`, `cpu`, `float` and `bfloat16` rebuild the encoder for the new device or dtype.
      On a CPU the tower computes in float32 instead of bfloat16, and logs a warning. It rejects
      every other dtype, such as float16.
    - `train` and `eval` do not change the results. In training, the module warns once that the
      tower is frozen. It rejects `requires_grad_()` and pixel rows that need gradients. PEFT cannot
      add adapters to the module.
    - torch.compile breaks the graph at the tower, and compiles the code before and after it.
    - The result's `pooler_output` contains the merged rows. Its `last_hidden_state` is None,
      because transformers does not read it.
    """
    if not callable(getattr(encoder, "encode_patches", None)):
        raise ArgumentError(
            f"encoder is {short_repr(encoder)}",
            expected="a VisionEncoder",
            remedy="load an encoder with VisionEncoder.from_pretrained",
        )
    require_transformers("as_hf_tower")
    from qwen_vit.integrations.hf_tower import HFTower  # importing torch._dynamo takes 1.5 s

    return HFTower(encoder)


def _check_runs(kind: str, where: Tensor, counts: list[int], token_id: int) -> None:
    """Raise ArgumentError unless each run of equal placeholder tokens has its item's length."""
    runs = [len(list(run)) for row in where.tolist() for same, run in groupby(row) if same]
    if runs != counts:
        raise ArgumentError(
            f"input_ids have {plural(len(runs), 'run')} of the {kind} token {token_id}, with "
            f"lengths {runs}",
            expected=f"{counts}, the tokens of each {kind}",
            remedy=f"expand the prompt for these {kind}s, in their order (expand_placeholders)",
        )
