"""Build the errors that several checks of an encoded image raise."""

from qwen_vit.common.storage import is_remote
from qwen_vit.errors import TO_ENCODE, ImageError, Wording

__all__ = ["address_remedy", "damaged", "lacks_parts", "too_much_memory", "too_slow", "truncated"]


def truncated(file_format: str, name: str, what: str = "it ends early") -> ImageError:
    """Return the error for a file that lacks a part of its pixels.

    >>> print(truncated("PNG", "a.png"))
    a.png: a truncated PNG: it ends early. Download the file again.
    """
    return ImageError(
        f"a truncated {file_format}: {what}",
        name=name,
        remedy="download the file again",
        code="truncated",
    )


def damaged(file_format: str, name: str, reason: str) -> ImageError:
    """Return the error for a file with contradictory content.

    >>> damaged("JPEG", "a.jpg", "bad Huffman code").fact
    'a damaged JPEG (bad Huffman code)'
    """
    return ImageError(
        f"a damaged {file_format} ({reason})",
        name=name,
        remedy="download the file again, or open and save the file in an image editor",
        code="damaged",
    )


def lacks_parts(file_format: str, name: str) -> ImageError:
    """Return the error for a damaged file that lacks a part of its pixels.

    >>> print(lacks_parts("JPEG", "a.jpg"))
    a.jpg: a damaged JPEG: parts of its picture are missing. Download the file again.
    """
    return ImageError(
        f"a damaged {file_format}: parts of its picture are missing",
        name=name,
        remedy="download the file again",
        code="damaged",
    )


def too_slow(fact: str, name: str, expected: str) -> ImageError:
    """Return the error for a file that needs far more decoding work than other images of its size.

    >>> print(too_slow("a JPEG of 5,000 scans", "a.jpg", "at most 100"))
    a.jpg: a JPEG of 5,000 scans. Expected at most 100. Open and save the file in an image editor.
    """
    return ImageError(
        fact,
        name=name,
        expected=expected,
        remedy="open and save the file in an image editor",
        code="slow",
    )


def too_much_memory(name: str) -> ImageError:
    """Return the error for a file whose decoding runs out of memory.

    >>> print(too_much_memory("a.png"))
    a.png: does not fit into memory when decoded. Make the image smaller.
    """
    return ImageError(
        "does not fit into memory when decoded",
        name=name,
        remedy="make the image smaller",
        code="memory",
    )


def address_remedy(address: str) -> str:
    """Return the remedy for an address that a caller passes in place of a path.

    >>> address_remedy("file:///data/a.png"), address_remedy("https://example.org/a.png")
    ('pass the path that follows file://', 'download it first, or pass limits with its allow_urls')
    """
    scheme = address.partition(":")[0].lower()
    if is_remote(address):
        return Wording("download it first, or use export_features", shell="download it first")
    return {
        "file": "pass the path that follows file://",
        "data": "pass its bytes: base64.b64decode(address.partition(',')[2])",
        "https": Wording(
            "download it first, or pass limits with its allow_urls",
            shell="download it first, or pass --allow-urls HOST",
        )
        + TO_ENCODE,
    }.get(scheme, "download it first")
