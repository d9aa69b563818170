"""Provide the Triton kernels. Only this folder imports triton."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

try:
    import triton as _triton
except ImportError as error:
    raise ImportError(
        "qwen_vit needs Triton, also on a CPU. Triton has wheels for Linux only (WSL works): "
        "pip install 'triton>=3.6'"
    ) from error

__all__ = ["IS_KNOWN_GLUON", "TRITON_VERSION", "plain_kernels", "uses_hopper_kernels"]

TRITON_VERSION = tuple(int(part) for part in _triton.__version__.split(".")[:2])

# True if the Hopper kernels were tested with this Triton's Gluon. Gluon may change with each
# version. For an untested version, qwen_vit does not import Gluon and runs the plain kernels.
IS_KNOWN_GLUON = (3, 6) <= TRITON_VERSION <= (3, 9)

_is_plain = ContextVar("is_plain", default=False)


def uses_hopper_kernels() -> bool:
    """Return whether Triton's version and this context allow the Hopper kernels, on any GPU."""
    return IS_KNOWN_GLUON and not _is_plain.get()


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Run the plain Triton kernels inside this `with` block, as on GPUs other than Hopper.

    Only benchmarks and tests use this block. A CUDA graph keeps the kernels that it captured.
    """
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)
