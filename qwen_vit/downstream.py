"""The public path `qwen_vit.downstream`: features in the forms of other software."""

from qwen_vit.integrations.hf import as_hf_tower, expand_placeholders, to_hf
from qwen_vit.integrations.sglang import to_sglang
from qwen_vit.integrations.vllm import to_vllm, to_vllm_chat_part

__all__ = [
    "as_hf_tower",
    "expand_placeholders",
    "to_hf",
    "to_sglang",
    "to_vllm",
    "to_vllm_chat_part",
]
