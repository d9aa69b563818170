"""The `qwen-vit` command."""
