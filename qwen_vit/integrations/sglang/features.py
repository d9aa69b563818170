"""Convert features to the image data of a request to SGLang's engine."""

from typing import Any

import torch

from qwen_vit.errors import ArgumentError, plural
from qwen_vit.features import AnyFeatures, VideoFeatures, check_features
from qwen_vit.integrations.rows import rows_and_grids

__all__ = ["to_sglang"]


def to_sglang(features: AnyFeatures) -> list[dict[str, Any]]:
    """Return `image_data` for a request to SGLang's engine: one item with all of its images.

    >>> from qwen_vit import ImageFeatures
    >>> [item] = to_sglang([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> item["format"], tuple(item["feature"].shape), item["image_grid_thw"].tolist()
    ('precomputed_embedding', (6, 8), [[1, 4, 6]])

    The request also needs `input_ids`: the tokens of a prompt from `expand_placeholders`. Source:
    SGLang's docs/advanced_features/vlm_query.ipynb and srt/multimodal/processors/base_processor.py.

    Args:
        features: features of images, in the prompt's order.

    Returns:
        A list of one item, which contains the rows (M, D) of all images, on the CPU, and the grids
        (images, 3).

    Raises:
        ExportError: The features are not finite merged tokens of one width and dtype, or an image
            failed.
        ArgumentError: `features` is empty. An item has the wrong type or an invalid grid, is a
            VideoFeatures, or has a grid of several time steps. SGLang 0.5.23 passes a video's
            features to its tower as pixels, and its scheduler then crashes for every user.
    """
    images = check_features(features)
    embeds, grids = rows_and_grids(images)
    for image, (t, _, _) in zip(images, grids.tolist(), strict=True):
        if t != 1 or isinstance(image, VideoFeatures):
            raise ArgumentError(
                f"its grid has {plural(t, 'time step')}, and SGLang runs its tower on a "
                "video's features",
                name=image.id,
                expected="an image with one time step",
                remedy="send the video itself to SGLang",
            )
    rows = torch.cat([rows.cpu() for rows in embeds])
    return [{"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grids}]
