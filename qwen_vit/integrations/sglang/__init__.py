"""SGLang: features for its engine, and this package's vision tower in its Qwen2.5-VL.

`SGLANG_EXTERNAL_MODEL_PACKAGE=qwen_vit.integrations.sglang` makes SGLang import every module of
this package and take `model.EntryClass` in place of its own model. Nothing here does anything
unless that variable names it.
"""

from qwen_vit.integrations.sglang.features import to_sglang

__all__ = ["to_sglang"]
