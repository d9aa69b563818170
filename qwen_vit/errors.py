"""Define the package's errors: each has a fact, what was expected, and a remedy.

Each part is an attribute: `name`, `fact`, `expected`, `remedy`. Only this module makes the message,
and no code parses it.
"""

import logging
from collections.abc import Sequence
from typing import Any, Self

__all__ = [
    "IMAGE_CODES",
    "ArgumentError",
    "CheckpointError",
    "ComparisonError",
    "ExportError",
    "HubError",
    "ImageError",
    "QwenVitError",
    "Wording",
    "check_choice",
    "display_name",
    "one_line",
    "plural",
    "with_options",
]

# Why an image cannot be encoded: `ImageError.code` and its meaning.
IMAGE_CODES = {
    "array-channels": "the channel axis holds neither 1, 3 nor 4 values",
    "array-dtype": "neither uint8 nor floating point",
    "array-layout": "an ambiguous channel axis: layout= decides",
    "array-not-finite": "NaN or infinity among the values",
    "array-range": "a floating-point value outside [0, 1]",
    "array-shape": "not one image: neither 2 nor 3 axes",
    "changed": "the object was replaced after it was listed",
    "damaged": "the decoder refuses the content",
    "directory": "the path is a directory",
    "empty-file": "0 bytes",
    "encrypted": "a video whose content is encrypted",
    "file-too-large": "more bytes than ImageLimits.max_file_bytes, or VideoLimits.max_file_bytes",
    "format": "an image, but of a format outside the allow-list",
    "grid": "a grid of patches that no image can have",
    "memory": "not enough memory to decode it",
    "missing": "no such file, or it vanished",
    "mode": "a pixel type without a known white level",
    "no-decoder": "a video whose codec this FFmpeg cannot decode",
    "no-pyav": "a video file, and the extra that reads it is not installed",
    "no-video": "a file with sound or data, but without frames of a video",
    "not-a-file": "a FIFO, socket or device: never opened",
    "not-an-image": "text, a web page, a git-lfs pointer or unknown bytes",
    "not-finite": "its embeddings hold NaN or infinity",
    "null": "a row of a Parquet file without an image, or without an id",
    "out-of-memory": "it alone does not fit the GPU's memory",
    "patches": "pixels and grids that do not belong together",
    "ratio": "one side is over 200 times the other",
    "reference": "Hugging Face's processor, the reference of `compare`, refuses it",
    "size-changes": "the frames of a video have several sizes",
    "slow": "far more scans, segments, frames or seconds of decoding than it needs or may take",
    "source-type": "not a path, bytes, PIL image, array or tensor",
    "too-many-frames": "more frames than VideoLimits.max_frames",
    "too-many-patches": "more patches in one call than rows can be counted",
    "too-many-pixels": "more pixels than ImageLimits or VideoLimits allow, by its header",
    "truncated": "the content ends early; it is never filled up",
    "unreadable": "the system refuses to read it, or its PIL file is closed; a retry may help",
    "url": "an address: nothing is downloaded here",
    "video-frames": "more frames are requested than the video has, or it has none",
    "video-range": "fewer than two frames between start and end",
    "zero-side": "a side of 0 pixels",
}


class Wording(str):
    """Keep a text that spells options for Python, and as `shell` for the command line.

    >>> words = "wait, or " + Wording("pass another folder", shell="pass another --out")
    >>> print(words, words.shell, sep="; ")
    wait, or pass another folder; wait, or pass another --out

    `+` keeps both spellings. Other operations of `str`, such as f-strings, keep only Python's.
    """

    shell: str

    def __new__(cls, python: str, *, shell: str) -> Self:
        words = super().__new__(cls, python)
        words.shell = shell
        return words

    def __add__(self, text: str) -> "Wording":
        return Wording(str(self) + str(text), shell=self.shell + _in_shell(text))

    def __radd__(self, text: str) -> "Wording":
        return Wording(text + str(self), shell=text + self.shell)

    @classmethod
    def joined(cls, separator: str, texts: Sequence[str]) -> Self:
        """Join several texts. Each may be a `Wording`.

        >>> print(Wording.joined(" or ", ["wait", with_options("lower {}", "part")]).shell)
        wait or lower --part
        """
        return cls(separator.join(texts), shell=separator.join(map(_in_shell, texts)))

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:  # for pickling
        return (str(self),), {"shell": self.shell}


def _in_shell(text: str) -> str:
    return text.shell if isinstance(text, Wording) else text


def with_options(text: str, *options: str | tuple[str, object], **values: object) -> Wording:
    """Put options into each {} of a text, as Python and as the command line spell them.

    >>> words = with_options("lower {}, or use {}", "max_pixels", ("dtype", "float32"))
    >>> print(words, words.shell, sep="; ")
    lower max_pixels, or use dtype="float32"; lower --max-pixels, or use --dtype float32

    Args:
        text: as for `str.format`.
        options: the Python name of each option whose flag has the same name, or its name and a
            value.
        values: other values that the text names.
    """
    named = [(option, None) if isinstance(option, str) else option for option in options]
    return Wording(
        text.format(*(_in_python(name, value) for name, value in named), **values),
        shell=text.format(*(_as_flag(name, value) for name, value in named), **values),
    )


def _in_python(name: str, value: object) -> str:
    if value is None:
        return name
    return f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"


def _as_flag(name: str, value: object) -> str:
    words = ",".join(map(str, value)) if isinstance(value, tuple) else value
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {words}"


class QwenVitError(Exception):
    """Keep the parts and make the message of every error that this package raises on purpose.

    >>> error = ExportError("a file", name="out", expected="a folder", remedy="pass another --out")
    >>> print(error)
    out: a file. Expected a folder. Pass another --out.
    >>> error.name, error.fact, error.expected, error.remedy
    ('out', 'a file', 'a folder', 'pass another --out')

    Args:
        fact: what is wrong, without a full stop.
        name: the file, image or argument of the fact. Odd characters are escaped.
        expected: what was expected instead; empty if the fact implies it.
        remedy: what to do about it, as an instruction.

    Any of them may be a `Wording`, which spells options for Python and for the command line.
    """

    def __init__(self, fact: str, *, name: str = "", expected: str = "", remedy: str = "") -> None:
        super().__init__(fact)
        self.fact, self.name, self.expected, self.remedy = fact, name, expected, remedy

    def __str__(self) -> str:
        return self.text()

    def text(self, *, in_shell: bool = False) -> str:
        """Return the message on one line. `in_shell` spells options as flags.

        >>> remedy = with_options("lower {}", "max_pixels")
        >>> ImageError("too large", name="a.png", remedy=remedy).text(in_shell=True)
        'a.png: too large. Lower --max-pixels.'
        """
        parts = (self.fact, self.expected, self.remedy)
        fact, expected, remedy = map(_in_shell, parts) if in_shell else parts
        fact = f"{display_name(self.name)}: {fact}" if self.name else fact
        if expected or remedy:
            expected = f"Expected {expected}" if expected else ""
            remedy = remedy[:1].upper() + remedy[1:]
            fact = " ".join(_sentence(part) for part in (fact, expected, remedy) if part)
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


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


class ImageError(QwenVitError, ValueError):
    """Report that an image, an array or a set of patches cannot be encoded.

    `code` is a stable, machine-readable reason such as `"truncated"`: a key of `IMAGE_CODES`.

    >>> raise ImageError("ratio of 333", name="a.png", expected="at most 200", code="ratio")
    Traceback (most recent call last):
    qwen_vit.errors.ImageError: a.png: ratio of 333. Expected at most 200.
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
        """Return the error without its traceback: the frames keep the file's bytes or the array."""
        return ImageError.of(self, code=self.code)


class ArgumentError(QwenVitError, ValueError):
    """Report that a device, a dtype or an option does not fit this machine or this call."""


class CheckpointError(QwenVitError, ValueError):
    """Report that a checkpoint is missing, damaged or belongs to another model."""


class ComparisonError(QwenVitError):
    """Report that results cannot be compared: a golden file is damaged or does not match."""


class HubError(QwenVitError):
    """Report that the Hugging Face Hub or its cache could not provide something."""


class ExportError(QwenVitError):
    """Report that features could not be written, read or resumed."""


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ArgumentError for a value outside the choices.

    >>> check_choice("output", "tokens", ("merged", "patch"))
    Traceback (most recent call last):
    qwen_vit.errors.ArgumentError: output is 'tokens'. Expected 'merged' or 'patch'.
    """
    if value not in choices:
        *most, last = map(repr, choices)
        raise ArgumentError(
            f"{name} is {value!r}", expected=f"{', '.join(most)} or {last}" if most else last
        )


def display_name(name: str) -> str:
    """Return a name that fits on one line of any terminal: escaped and shortened if necessary.

    >>> display_name("cat.png"), display_name("a\\tb")
    ('cat.png', "'a\\\\tb'")
    """
    text = name if name and name.isprintable() and name == name.strip() else ascii(name)
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]}"


def one_line(text: str) -> str:
    r"""Escape unprintable characters, because text from outside may move a terminal's cursor.

    Every error, log line and line of output uses this function.

    >>> print(one_line("a\tb\x1b[2J"))
    a\tb\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _escape_record(record: logging.LogRecord) -> bool:
    """Filter a log record: turn it into one printable line."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


logging.getLogger("qwen_vit").addFilter(_escape_record)


def plural(number: int, what: str) -> str:
    """Return a number and its noun.

    >>> plural(1, "shard"), plural(2, "shard")
    ('1 shard', '2 shards')
    """
    return f"{number:,} {what}" + ("" if number == 1 else "s")
