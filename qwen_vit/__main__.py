"""`python -m qwen_vit` is `qwen-vit`."""

from qwen_vit.cli import main

if __name__ == "__main__":
    main()
