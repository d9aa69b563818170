"""Convert features for SGLang's engine, and run qwen_vit's tower in SGLang's Qwen2.5-VL.

`SGLANG_EXTERNAL_MODEL_PACKAGE=qwen_vit.integrations.sglang` makes SGLang import every module of
this package. SGLang then uses `model.EntryClass` in place of its own model. The package has no
effect on SGLang unless that variable names it.
"""

from qwen_vit.integrations.sglang.features import to_sglang

__all__ = ["to_sglang"]
