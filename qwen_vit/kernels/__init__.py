"""The Triton kernels: the only folder that imports triton."""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "qwen_vit needs Triton, on a CPU too, and Triton has wheels for Linux only (WSL works): "
        "pip install 'triton>=3.6'"
    ) from error
