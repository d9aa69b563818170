"""Define the package's errors. Each error has a fact, and usually an expected value or a remedy.

Each part is an attribute: `name`, `fact`, `expected`, `remedy`. A missing part is an empty string.
Only this module builds the message, and no code parses it.
"""

import logging
from collections.abc import Sequence
from typing import Any, Self

__all__ = [
    "FLOAT16_OVERFLOWS",
    "IMAGE_CODES",
    "TO_ENCODE",
    "ArgumentError",
    "CheckpointError",
    "ComparisonError",
    "ExportError",
    "HubError",
    "ImageError",
    "QwenVitError",
    "UnreadableError",
    "Wording",
    "display_name",
    "one_line",
    "plural",
    "with_options",
]

# Why an image cannot be encoded: `ImageError.code` and its meaning.
IMAGE_CODES = {
    "array-channels": "the array's channel axis does not have 1, 3 or 4 values",
    "array-dtype": "the dtype is neither uint8 nor floating point, or the tensor is not dense",
    "array-layout": "the array's channel axis is ambiguous; pass layout=",
    "array-not-finite": "the array contains NaN or infinity",
    "array-range": "a floating-point array has a value outside [0, 1]",
    "array-shape": "the array is not one image, because it has neither 2 nor 3 axes",
    "changed": "the object in storage changed after the listing",
    "damaged": "the content contradicts its format, or an id in a Parquet file is too long",
    "directory": "the path is a directory",
    "empty-file": "the file has 0 bytes",
    "encrypted": "the content of the video is encrypted",
    "file-too-large": "the file exceeds max_file_bytes of ImageLimits or VideoLimits",
    "format": "the format is unsupported or not enabled, or its decoder is not installed",
    "grid": "no image can have this grid of patches, or grid_thw has a wrong type or shape",
    "memory": "the host has too little memory to load the image, or a decoder crashed",
    "missing": "the file, object, row or address does not exist, or a tar or table has changed",
    "mode": "the pixel type has no known white level, or Pillow cannot read it correctly",
    "no-decoder": "PyAV's FFmpeg cannot decode the codec of the video",
    "no-pyav": "the file is a video, and PyAV (the extra `video`) is not installed",
    "no-video": "the file has sound or data, but no video frames",
    "not-a-file": "the path is a FIFO, socket or device, or a tar's member is not a plain file",
    "not-an-image": "the content is text, a web page, a git-lfs pointer or unknown bytes",
    "not-finite": "the features contain NaN or infinity",
    "null": "the Parquet row has no image or no id",
    "out-of-memory": "the GPU has too little memory to encode or compare this image alone",
    "patches": "pixels or patches have a wrong type, shape or number, or do not fit the encoder",
    "ratio": "one side is over 200 times the other side",
    "reference": "Hugging Face's processor, the reference of `compare`, rejects the image",
    "size-changes": "the frames of the video have several sizes",
    "slow": "the input has too many scans, segments, pages, rows or id bytes, or takes too long",
    "source-type": "the input's type is unsupported, or a dict does not contain exactly one image",
    "too-many-streams": "the video file has more than 100 streams of video, sound or subtitles",
    "too-many-frames": "the video has more frames than VideoLimits.max_frames",
    "too-many-patches": "one call has more patches than int32 can count or n_rows allows",
    "too-many-pixels": "the image has more pixels than ImageLimits, VideoLimits or Pillow allow",
    "truncated": "the content ends early, or a tar is damaged; qwen_vit never fills missing parts",
    "unreadable": "the system, a server or pyarrow cannot read the file, or it is already closed",
    "url": "the input is an address (URL) that qwen_vit does not open",
    "video-frames": "the video, or its chosen part, has no frames or fewer than requested",
    "video-range": "the video has fewer than two frames between start and end",
    "zero-side": "a side has 0 pixels",
}


class Wording(str):
    """Hold a text with the options' names in Python, and in `shell` the text with their flags.

    >>> words = "wait, or " + Wording("pass another folder", shell="pass another --out")
    >>> print(words, words.shell, sep="; ")
    wait, or pass another folder; wait, or pass another --out

    `options` are the Python names of the options that `with_options` put into the text. `+` keeps
    both spellings and the options. Other operations of `str`, such as f-strings, keep only Python's
    spelling.
    """

    shell: str
    options: tuple[str, ...]

    def __new__(cls, python: str, *, shell: str, options: tuple[str, ...] = ()) -> Self:
        words = super().__new__(cls, python)
        words.shell, words.options = shell, options
        return words

    def __add__(self, text: str) -> "Wording":
        options = self.options + _options_of(text)
        return Wording(str(self) + str(text), shell=self.shell + _in_shell(text), options=options)

    def __radd__(self, text: str) -> "Wording":
        return Wording(text + str(self), shell=text + self.shell, options=self.options)

    @classmethod
    def joined(cls, separator: str, texts: Sequence[str]) -> Self:
        """Join several texts. Each text may be a `Wording`.

        >>> print(Wording.joined(" or ", ["wait", with_options("lower {}", "part")]).shell)
        wait or lower --part
        """
        return cls(
            separator.join(texts),
            shell=separator.join(map(_in_shell, texts)),
            options=tuple(name for text in texts for name in _options_of(text)),
        )

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:  # for pickling
        return (str(self),), {"shell": self.shell, "options": self.options}


def _in_shell(text: str) -> str:
    return text.shell if isinstance(text, Wording) else text


def _options_of(text: str) -> tuple[str, ...]:
    return text.options if isinstance(text, Wording) else ()


def with_options(text: str, *options: str | tuple[str, object], **values: object) -> Wording:
    """Put an option into each {} of a text, in Python's and in the command line's spelling.

    >>> words = with_options("lower {}, or use {}", "max_pixels", ("dtype", "float32"))
    >>> print(words, words.shell, sep="; ")
    lower max_pixels, or use dtype="float32"; lower --max-pixels, or use --dtype float32

    Args:
        text: a template, as for `str.format`.
        options: the Python name of each option, or its name and a value. The option's flag must
            have the same name.
        values: other values that the text names.
    """
    named = [(option, None) if isinstance(option, str) else option for option in options]
    return Wording(
        text.format(*(_in_python(name, value) for name, value in named), **values),
        shell=text.format(*(_as_flag(name, value) for name, value in named), **values),
        options=tuple(name for name, _ in named),
    )


def _in_python(name: str, value: object) -> str:
    if value is None:
        return name
    return f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"


def _as_flag(name: str, value: object) -> str:
    words = ",".join(map(str, value)) if isinstance(value, tuple) else value
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {words}"


FLOAT16_OVERFLOWS = "activations of the published 3B model overflow float16 in the last block"
# Add it to an option that other commands lack, such as `show` and `compare`.
TO_ENCODE = Wording("", shell=" to `qwen-vit encode` or `qwen-vit export`")


class QwenVitError(Exception):
    """Hold the parts of an error that this package raises on purpose, and build its message.

    >>> error = ExportError("a file", name="out", expected="a folder", remedy="pass another --out")
    >>> print(error)
    out: a file. Expected a folder. Pass another --out.
    >>> error.name, error.fact, error.expected, error.remedy
    ('out', 'a file', 'a folder', 'Pass another --out.')

    Args:
        fact: the fault, without a full stop.
        name: the file, image or argument of the fact. The message escapes unprintable characters.
        expected: the expected value, or an empty string if the fact or the remedy implies it.
        remedy: an instruction for the user, or an empty string. The class makes it a sentence.

    Each part may be a `Wording`, which spells options for Python and for the command line.
    """

    def __init__(self, fact: str, *, name: str = "", expected: str = "", remedy: str = "") -> None:
        super().__init__(fact)
        self.fact, self.name, self.expected = fact, name, expected
        self.remedy = _as_sentence(remedy)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, in_shell: bool = False) -> str:
        """Return the message on one line.

        >>> remedy = with_options("lower {}", "max_pixels")
        >>> ImageError("too large", name="a.png", remedy=remedy).text(in_shell=True)
        'a.png: too large. Lower --max-pixels.'

        Args:
            in_shell: whether to spell options as flags.

        Returns:
            The name, the fact, the expected value and the remedy, without missing parts.
        """
        parts = (self.fact, self.expected, self.remedy)
        fact, expected, remedy = map(_in_shell, parts) if in_shell else parts
        fact = f"{display_name(self.name)}: {fact}" if self.name else fact
        if expected or remedy:
            expected = f"Expected {expected}" if expected else ""
            fact = " ".join(_with_stop(part) for part in (fact, expected, remedy) if part)
        return one_line(fact)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:  # Exception's own would keep only the fact
        return _same_error, (type(self), self.args, dict(self.__dict__))

    @classmethod
    def of(cls, error: "QwenVitError", **changes: str) -> Self:
        """Create an error of this class from another error, with changes.

        >>> damaged = CheckpointError("not JSON", name="export.json", remedy="fetch it again")
        >>> print(ExportError.of(damaged, remedy="pass another --out"))
        export.json: not JSON. Pass another --out.

        Args:
            error: the other error.
            changes: new values for some of its parts.

        Returns:
            An error of this class.
        """
        facts = {"name": error.name, "expected": error.expected, "remedy": error.remedy, **changes}
        return cls(facts.pop("fact", error.fact), **facts)


def _same_error(
    kind: type[QwenVitError], arguments: tuple[Any, ...], facts: dict[str, Any]
) -> QwenVitError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(facts)
    return error


def _with_stop(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _as_sentence(text: str) -> str:
    if not text:
        return ""
    if isinstance(text, Wording):
        shell = _as_sentence(text.shell)
        return Wording(_as_sentence(str(text)), shell=shell, options=text.options)
    return _with_stop(text[:1].upper() + text[1:])


class ImageError(QwenVitError, ValueError):
    """Report that qwen_vit cannot encode an image, a video, an array or a set of patches.

    >>> raise ImageError("ratio of 333", name="a.png", expected="at most 200", code="ratio")
    Traceback (most recent call last):
    qwen_vit.errors.ImageError: a.png: ratio of 333. Expected at most 200.

    The other arguments are those of `QwenVitError`.

    Args:
        code: a stable, machine-readable reason such as `"truncated"`. In the package's own errors,
            it is a key of `IMAGE_CODES`.
    """

    def __init__(
        self,
        fact: str,
        *,
        name: str = "",
        expected: str = "",
        remedy: str = "",
        code: str = "invalid",
    ) -> None:
        super().__init__(fact, name=name, expected=expected, remedy=remedy)
        self.code = code

    def without_frames(self) -> "ImageError":
        """Return a copy without the traceback, whose frames would keep the file's bytes or the
        array."""
        return ImageError.of(self, code=self.code)


class ArgumentError(QwenVitError, ValueError):
    """Report that an argument does not fit this machine or this call, or that a package is
    missing."""


class CheckpointError(QwenVitError, ValueError):
    """Report that a checkpoint is missing, damaged, unsupported, or belongs to another model."""


class ComparisonError(QwenVitError):
    """Report that qwen_vit cannot compare results, for example because a golden file is damaged."""


class HubError(QwenVitError):
    """Report that the Hugging Face Hub or its cache could not provide a file."""


class ExportError(QwenVitError):
    """Report that qwen_vit could not list inputs, could not write, read or resume features, or
    that features are damaged."""


class UnreadableError(ExportError):
    """Report that features are missing, cannot be read or have another schema.

    For damaged features, qwen_vit raises ExportError instead.
    """


def display_name(name: str) -> str:
    """Return a name as printable text of at most 400 characters, escaped or shortened if necessary.

    >>> display_name("cat.png"), display_name("a\\tb")
    ('cat.png', "'a\\\\tb'")
    """
    text = name if name and name.isprintable() and name == name.strip() else ascii(name)
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]}"


def one_line(text: str) -> str:
    r"""Escape unprintable characters, because text in a file may move a terminal's cursor.

    The package's errors, the lines of its log and the commands' output pass through this function.

    >>> print(one_line("a\tb\x1b[2J"))
    a\tb\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


logging.getLogger("qwen_vit").addFilter(_escape_record)


def plural(number: int, what: str) -> str:
    """Return a number and its noun.

    >>> plural(1, "shard"), plural(2, "shard")
    ('1 shard', '2 shards')
    """
    return f"{number:,} {what}" + ("" if number == 1 else "s")
