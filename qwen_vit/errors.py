"""The package's errors: each message names the thing, what was expected, and what to do."""

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ComparisonError",
    "ExportError",
    "HubError",
    "ImageError",
    "QwenVitError",
]


class QwenVitError(Exception):
    """The base of every error that this package raises on purpose."""


class ImageError(QwenVitError, ValueError):
    """An image, an array or a set of patches cannot be encoded.

    `code` is a stable, machine-readable reason such as `"truncated"` or `"not-an-image"`.

    >>> raise ImageError("cat.png is 12x4000: ratio 333 exceeds 200; crop it", code="ratio")
    Traceback (most recent call last):
    qwen_vit.errors.ImageError: cat.png is 12x4000: ratio 333 exceeds 200; crop it
    """

    def __init__(self, message: str, *, code: str = "invalid") -> None:
        super().__init__(message)
        self.code = code


class ArgumentError(QwenVitError, ValueError):
    """A device, a data type or an option does not fit this machine or this call."""


class CheckpointError(QwenVitError, ValueError):
    """A checkpoint's weights or configuration are missing, damaged or of another model."""


class ComparisonError(QwenVitError):
    """Two results cannot be compared: a golden file is damaged, or of another model or setting."""


class HubError(QwenVitError):
    """The Hugging Face Hub, or its cache, could not give what was asked for."""


class ExportError(QwenVitError):
    """Features could not be written, read or resumed."""
