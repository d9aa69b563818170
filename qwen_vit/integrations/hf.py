"""transformers: features in place of pixels, prompts, and the encoder in place of its tower."""

import re
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qwen_vit.common.transformers_version import require_transformers
from qwen_vit.errors import ArgumentError, plural
from qwen_vit.features import AnyFeatures
from qwen_vit.integrations.rows import MERGE_SIZE, count_tokens, rows_and_grids, whole_numbers

if TYPE_CHECKING:
    from qwen_vit.encoder import VisionEncoder

__all__ = ["IMAGE_TOKEN_ID", "as_hf_tower", "expand_placeholders", "to_hf"]

IMAGE_PAD = "<|image_pad|>"
IMAGE_TOKEN_ID = 151_655  # of <|image_pad|> in every published Qwen2.5-VL


def to_hf(
    features: AnyFeatures,
    input_ids: Tensor | None = None,
    *,
    image_token_id: int = IMAGE_TOKEN_ID,
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

    These are arguments of `generate` and `forward`. With `input_ids` (batch, sequence), whose image
    tokens are checked against the features, it adds `mm_token_type_ids`; without those, Qwen2.5-VL
    silently numbers image tokens as if they were text. Qwen2.5-Omni finds the images itself, and
    refuses them: pass mm_token_type_ids=False. Needs transformers 5.18 or newer.

    Source: `mm_encoder_outputs` in transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py.

    Raises ArgumentError for a transformers that is missing or too old and for image tokens that do
    not fit; ExportError for features that are not merged tokens.
    """
    require_transformers("to_hf")
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
        if mm_token_type_ids:
            arguments["mm_token_type_ids"] = is_image.long()
    return arguments


def expand_placeholders(
    text: str, grids: Iterable[Iterable[int]], merge_size: int = MERGE_SIZE
) -> str:
    """Repeat each `<|image_pad|>` of a prompt once per token of its image, as a processor does.

    >>> expand_placeholders("<|vision_start|><|image_pad|><|vision_end|>What?", [(1, 4, 4)])
    '<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>What?'

    `grids` are (t, h, w) in patches, in the prompt's order: rows of an `image_grid_thw`, or the
    `grid_thw` of features. Raises ArgumentError if the counts differ or a grid is wrong.
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
