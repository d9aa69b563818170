"""The Triton kernels: the only folder that imports triton."""

try:
    import triton as _triton
except ImportError as error:
    raise ImportError(
        "qwen_vit needs Triton, also on a CPU. Triton has wheels for Linux only (WSL works): "
        "pip install 'triton>=3.6'"
    ) from error

__all__ = ["IS_KNOWN_GLUON"]

# Whether the kernels for Hopper were tested with this Triton's Gluon. Gluon may change with each
# version. An unknown one is not even imported, and the plain kernels run.
IS_KNOWN_GLUON = _triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
