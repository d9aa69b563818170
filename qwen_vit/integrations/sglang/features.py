"""SGLang: features for its engine."""

from typing import Any

import torch

from qwen_vit.features import AnyFeatures
from qwen_vit.integrations.rows import rows_and_grids

__all__ = ["to_sglang"]


def to_sglang(features: AnyFeatures) -> list[dict[str, Any]]:
    """Return `image_data` for one request to SGLang's engine: a single item for all its images.

    >>> from qwen_vit import ImageFeatures
    >>> [item] = to_sglang([ImageFeatures("a.jpg", torch.ones(6, 8), (1, 4, 6))])
    >>> item["format"], tuple(item["feature"].shape), item["image_grid_thw"].tolist()
    ('precomputed_embedding', (6, 8), [[1, 4, 6]])

    `input_ids` go with it, from a prompt that `expand_placeholders` expanded. Source: SGLang's
    docs/advanced_features/vlm_query.ipynb and srt/multimodal/processors/base_processor.py.

    Raises ExportError for features that are not merged tokens, and for failed images.
    """
    embeds, grids = rows_and_grids(features)
    rows = torch.cat([rows.cpu() for rows in embeds])
    return [{"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grids}]
