"""Identify files that users pass as images by mistake, from the first bytes."""

import re
from typing import NamedTuple

__all__ = ["JSON_SUFFIX", "LIST_SUFFIXES", "Lookalike", "find_lookalike"]

LIST_SUFFIXES = (".txt", ".lst")
JSON_SUFFIX = ".jsonl"  # of a list with one object per line

HEAD_BYTES = 1024
TEXT_SHOWN = 40  # characters: enough for "404 Not Found" or a path
# Each entry has a pattern for the first bytes in lower case, the kind, and the remedy. White space
# may precede the patterns of TEXTS.
TEXTS = (
    (rb"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull`"),
    (rb"<svg|<\?xml.*<svg", "an SVG drawing", "render it to PNG first"),
    (rb"<!doctype html|<html|<\?xml.*<html", "an HTML page", "download the file itself"),
    (rb"<\?xml", "an XML document", "fetch the file itself"),
)
IMAGES = (
    (rb"....jxl |\xff\x0a", "JPEG XL", "convert it to PNG"),
    (rb"8bps", "Photoshop", "export it as PNG"),
    (rb"\x00\x00\x02\x00[\x01-\x20]\x00", "a cursor", "convert it to PNG"),
    (rb"p7\s", "Netpbm's PAM", "convert it to PNG"),
)
OTHERS = (
    (rb"%pdf", "a PDF document", "render its pages to PNG first"),
    (rb"%!ps(?!-adobe[^\n]*epsf)", "a PostScript document", "render its pages to PNG first"),
    (rb"par1", "a Parquet file", "pass it to `qwen-vit export --column NAME`"),
    (
        rb".{4}\x00{4}\{[\s\"}]",
        "a safetensors file",
        "draw stored features with `qwen-vit show`, or describe the file with `qwen-vit info`",
    ),
    (rb"\x93numpy", "a NumPy file", "pass numpy.load(...) instead"),
    (rb".{257}ustar", "a tar", "pass it to export_features or `qwen-vit export`"),
    (rb"pk[\x03\x05][\x04\x06]", "a zip archive", "unpack it first"),
    (rb"\x1f\x8b", "a gzip archive", "unpack it first"),
    (rb"bzh[1-9]1ay&sy", "a bzip2 archive", "unpack it first"),
    (rb"\xfd7zxz\x00", "an xz archive", "unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (rb"rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (
        rb"....ftyp(?!avi[fs]|hei|hev|mif|msf)|....(?:moov|mdat)|\x1a\x45\xdf\xa3|riff....avi ",
        "a video",
        "give the file a video's extension, such as .mp4",
    ),
    (rb"id3[\x02-\x04]|\xff\xfb|riff....wave|flac[\x00\x80]", "an audio file", "omit the file"),
)


class Lookalike(NamedTuple):
    """Describe a file that is not a supported image.

    Attributes:
        code: the error's code, "not-an-image" for text and "format" for other files.
        what: the kind, such as "a PDF document".
        is_image: whether the file is an image of an unsupported format.
        remedy: an instruction, or an empty string for plain text, whose remedy depends on the
            caller.
        start: the first characters of plain text, or an empty string.
    """

    code: str
    what: str
    remedy: str
    is_image: bool = False
    start: str = ""

    def fact(self, expected: str) -> str:
        """Return the error's fact for a caller that expects "an image" or "a video".

        >>> find_lookalike(b"%PDF-1.7").fact("an image")
        'a PDF document, not an image'
        """
        if self.is_image and expected == "an image":
            return f"of an unsupported format ({self.what})"
        return f"{self.what}, not {expected}" + (
            f": it starts with {self.start!r}" if self.start else ""
        )


def find_lookalike(data: bytes) -> Lookalike | None:
    """Describe a file of a known kind or of text. Return None for other bytes.

    >>> find_lookalike(b"404 Not Found").fact("an image")
    "a text file, not an image: it starts with '404 Not Found'"
    >>> find_lookalike(b'{"id": 1}').what, find_lookalike(bytes(8))
    ('a JSON file', None)
    >>> find_lookalike(bytes([64, 0, 0, 0, 0, 0, 0, 0]) + b'{"a": {}}').what
    'a safetensors file'
    """
    head = data[:HEAD_BYTES].lower()
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what, remedy in TEXTS:
        if re.match(pattern, begin, re.DOTALL):
            return Lookalike("not-an-image", what, remedy)
    for pattern, what, remedy in IMAGES:
        if re.match(pattern, head, re.DOTALL):
            return Lookalike("format", what, remedy, is_image=True)
    for pattern, what, remedy in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return Lookalike("format", what, remedy)
    text = _as_text(data[:HEAD_BYTES])
    if not text:
        return None
    what = "a JSON file" if text[0] in "{[" else "a text file"
    start = " ".join(text[:TEXT_SHOWN].split())
    return Lookalike("not-an-image", what, "", start=start)


def _as_text(data: bytes) -> str:
    """Return the start of UTF-8 or UTF-16 text without outer white space, or an empty string."""
    is_wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data[: len(data) & ~1].decode("utf-16") if is_wide else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rest = error.object  # `data`, without the byte order mark of UTF-8
        if error.start < len(rest) - 3:  # otherwise the end of `data` cuts a character
            return ""
        text = rest[: error.start].decode("utf-16" if is_wide else "utf-8-sig")
    is_text = all(character.isprintable() or character.isspace() for character in text)
    return text.strip() if is_text else ""
