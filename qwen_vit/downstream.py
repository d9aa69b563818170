"""Provide the public import path of the integrations with transformers, vLLM and SGLang."""

from qwen_vit.integrations.hf import as_hf_tower, expand_placeholders, to_hf
from qwen_vit.integrations.sglang import to_sglang
from qwen_vit.integrations.vllm import (
    read_ec_cache,
    to_vllm,
    to_vllm_cached,
    to_vllm_cached_chat_part,
    to_vllm_chat_part,
    write_ec_cache,
)

__all__ = [
    "as_hf_tower",
    "expand_placeholders",
    "read_ec_cache",
    "to_hf",
    "to_sglang",
    "to_vllm",
    "to_vllm_cached",
    "to_vllm_cached_chat_part",
    "to_vllm_chat_part",
    "write_ec_cache",
]
