"""Provide commands for qwen_vit's developers: `python -m tools.NAME --help` in the checkout."""
