"""Define the `qwen-vit` command."""
