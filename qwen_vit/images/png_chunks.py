"""Remove large, faulty or unused PNG chunks that could make Pillow reject the file.

The PNG specification allows a decoder to skip ancillary chunks. Pillow rejects a whole file if one
such chunk is damaged, or if text or a colour profile inflates to more than 1 MiB.
"""

import struct
import zlib

__all__ = ["without_needless_chunks"]

SIGNATURE_BYTES, FRAME_BYTES = 8, 12  # a chunk's length, kind and checksum
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
TEXT = (b"tEXt", b"zTXt", b"iTXt")  # may contain the orientation, as Exif or XMP
NEEDED = (b"tRNS", b"eXIf", *TEXT, *ANIMATION)
MAX_BYTES, MAX_TEXT_BYTES = 2**20, 2**22  # bytes of one inflated chunk; of all text


def without_needless_chunks(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Return the file without needless chunks, and a note on each large or faulty kind.

    The function keeps critical chunks and transparency even if they are faulty, because the pixels
    depend on them.
    """
    dropped: dict[bytes, str] = {}
    pieces, at, kept_from, text_bytes = [], SIGNATURE_BYTES, 0, 0
    spans: list[tuple[bytes, int, int]] = []
    while at + FRAME_BYTES <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + FRAME_BYTES + length
        if end > len(data) or kind == b"IEND":
            break
        if kind[0] & 0x20 and kind != b"tRNS":
            spans.append((kind, at, end))
        at = end
    needless: list[tuple[int, int]] = []
    for kind, start, end in spans:
        n_bytes = _inflated_bytes(kind, data[start + 8 : end - 4])
        fault = "faulty" if _is_faulty(kind, data, start, end) else ""
        text_bytes += n_bytes if kind in TEXT else 0
        if n_bytes > MAX_BYTES or text_bytes > MAX_TEXT_BYTES:
            fault = fault or "large"
            text_bytes -= n_bytes if kind in TEXT else 0
        if kind in ANIMATION and fault == "large":
            fault = ""
        if fault:
            dropped.setdefault(kind, fault)
        if fault or kind not in NEEDED:
            needless.append((start, end))
    if any(kind in dropped for kind in ANIMATION):  # an animation's chunks depend on each other
        needless += [(start, end) for kind, start, end in spans if kind in ANIMATION]
    for start, end in sorted(set(needless)):
        pieces.append(data[kept_from:start])
        kept_from = end
    notes = tuple(
        f"{fault} {kind.decode('ascii', 'replace')} passed over" for kind, fault in dropped.items()
    )
    return b"".join([*pieces, data[kept_from:]]) if pieces else data, notes


def _is_faulty(kind: bytes, data: bytes, start: int, end: int) -> bool:
    [checksum] = struct.unpack_from(">I", data, end - 4)
    if zlib.crc32(data[start + 4 : end - 4]) != checksum:
        return True
    if kind != b"zTXt":
        return False
    _, _, packed = data[start + 8 : end - 4].partition(b"\0")
    return packed[:1] not in (b"", b"\0")  # 0 is the only defined compression method


def _inflated_bytes(kind: bytes, body: bytes) -> int:
    """Return a chunk's inflated size in bytes, or a number above MAX_BYTES."""
    packed = b""
    if kind in (b"zTXt", b"iCCP"):
        packed = body.partition(b"\0")[2][1:]
    elif kind == b"iTXt":
        flags, _, _ = body.partition(b"\0")[2][:2], None, None
        if flags[:1] == b"\1":
            parts = body.partition(b"\0")[2][2:].split(b"\0", 2)
            packed = parts[2] if len(parts) == 3 else b""
    if not packed:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_BYTES + 1))
    except zlib.error:  # Pillow reads such text as empty
        return len(body)
