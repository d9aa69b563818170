"""Pass features, and the encoder itself, to transformers, vLLM and SGLang."""
