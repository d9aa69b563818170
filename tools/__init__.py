"""Commands for those who work on qwen_vit: `python -m tools.NAME --help` at the checkout's top."""
