"""Provide the Triton kernels. Only this folder imports triton."""

try:
    import triton as _triton
except ImportError as error:
    raise ImportError(
        "qwen_vit needs Triton, also on a CPU. Triton has wheels for Linux only (WSL works): "
        "pip install 'triton>=3.6'"
    ) from error

__all__ = ["IS_KNOWN_GLUON"]

# True if the Hopper kernels were tested with this Triton's Gluon. Gluon may change with each
# version. For an untested version, qwen_vit does not import Gluon and runs the plain kernels.
IS_KNOWN_GLUON = _triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])
