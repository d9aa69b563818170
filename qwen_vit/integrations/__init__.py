"""Pass features to transformers, vLLM and SGLang, and replace their vision towers."""
