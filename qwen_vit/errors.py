"""The package's errors: each message names the thing, what was expected, and what to do."""

__all__ = [
    "IMAGE_CODES",
    "ArgumentError",
    "CheckpointError",
    "ComparisonError",
    "ExportError",
    "HubError",
    "ImageError",
    "QwenVitError",
    "shown",
]

# Why an image cannot be encoded: `ImageError.code`, and what it means.
IMAGE_CODES = {
    "array-channels": "the channel axis holds neither 1, 3 nor 4 values",
    "array-dtype": "neither uint8 nor floating point",
    "array-layout": "the channel axis cannot be told: layout= decides",
    "array-not-finite": "NaN or infinity among the values",
    "array-range": "a floating-point value outside [0, 1]",
    "array-shape": "not one image: neither 2 nor 3 axes",
    "damaged": "the decoder refuses the content",
    "directory": "the path is a directory",
    "empty-file": "0 bytes",
    "file-too-large": "more bytes than ImageLimits.max_file_bytes",
    "format": "an image, but of a format outside the allow-list",
    "grid": "a grid of patches that no image can have",
    "memory": "not enough memory to decode it",
    "missing": "no such file, or it vanished",
    "mode": "a pixel type without a known white level",
    "not-a-file": "a FIFO, socket or device: never opened",
    "not-an-image": "text, a web page, a git-lfs pointer or unknown bytes",
    "not-finite": "its embeddings hold NaN or infinity",
    "out-of-memory": "it alone does not fit the GPU's memory",
    "patches": "pixels and grids that do not belong together",
    "ratio": "one side is over 200 times the other",
    "reference": "Hugging Face's processor refuses it, with which it was to be compared",
    "source-type": "not a path, bytes, PIL image, array or tensor",
    "too-many-patches": "more patches in one call than rows can be counted",
    "too-many-pixels": "more pixels than ImageLimits.max_pixels, by its header",
    "truncated": "the content ends early; it is never filled up",
    "unreadable": "the system refuses to read it, or its PIL file is closed; a retry may help",
    "url": "an address: nothing is downloaded here",
    "zero-side": "a side of 0 pixels",
}


class QwenVitError(Exception):
    """The base of every error that this package raises on purpose."""


class ImageError(QwenVitError, ValueError):
    """An image, an array or a set of patches cannot be encoded.

    `code` is a stable, machine-readable reason such as `"truncated"`: a key of `IMAGE_CODES`.

    >>> raise ImageError("cat.png is 12x4000: ratio 333 exceeds 200; crop it", code="ratio")
    Traceback (most recent call last):
    qwen_vit.errors.ImageError: cat.png is 12x4000: ratio 333 exceeds 200; crop it
    """

    def __init__(self, message: str, *, code: str = "invalid") -> None:
        super().__init__(message)
        self.code = code

    def without_frames(self) -> "ImageError":
        """The same to keep: a traceback's frames hold the file's bytes, or the array."""
        return ImageError(str(self), code=self.code)


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


def shown(name: str) -> str:
    """A name on one line of any terminal: odd ones escaped, long ones shortened.

    >>> shown("cat.png"), shown("a\\tb")
    ('cat.png', "'a\\\\tb'")
    """
    text = name if name and name.isprintable() and name == name.strip() else ascii(name)
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]}"


def counted(number: int, what: str) -> str:
    """So many of a thing.

    >>> counted(1, "shard"), counted(2, "shard")
    ('1 shard', '2 shards')
    """
    return f"{number:,} {what}" + ("" if number == 1 else "s")
