"""Convert features for vLLM's engine, server and encoder cache, and replace its vision tower."""

from qwen_vit.integrations.vllm.cached import (
    CachedFeatures,
    to_vllm_cached,
    to_vllm_cached_chat_part,
)
from qwen_vit.integrations.vllm.ec_cache import EncoderCache, read_ec_cache, write_ec_cache
from qwen_vit.integrations.vllm.features import to_vllm, to_vllm_chat_part

__all__ = [
    "CachedFeatures",
    "EncoderCache",
    "read_ec_cache",
    "to_vllm",
    "to_vllm_cached",
    "to_vllm_cached_chat_part",
    "to_vllm_chat_part",
    "write_ec_cache",
]
