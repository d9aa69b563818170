"""vLLM: features for its engine and for its server."""

from qwen_vit.integrations.vllm.features import to_vllm, to_vllm_chat_part

__all__ = ["to_vllm", "to_vllm_chat_part"]
