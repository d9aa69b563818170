"""Write a vision tower's tensors from local and remote shards into one vision.safetensors."""

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from qwen_vit.checkpoint import ranges
from qwen_vit.checkpoint.load import Tower, load_checkpoint
from qwen_vit.checkpoint.ranges import Opener, Piece, RangeResponse
from qwen_vit.checkpoint.weight_files import VISION_FILE, RemoteFiles, StoredTensor
from qwen_vit.common.progress import shows_progress
from qwen_vit.common.safetensors_header import (
    DTYPE_BYTES,
    LENGTH_BYTES,
    START_BYTES,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
)
from qwen_vit.common.tensors import check_finite
from qwen_vit.errors import CheckpointError

__all__ = ["Shards", "write_tower"]

CHUNK_BYTES = 2**20


class Shards:
    """Read the shards of one checkpoint: local files, and remote files with range requests.

    The class reads each header once.
    """

    def __init__(
        self, local: Mapping[str, Path], remote: Iterable[str], open_remote: Opener, label: str
    ) -> None:
        self.local = dict(local)
        self.remote = frozenset(remote)
        self._open_remote = open_remote
        self._label = label
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._data_starts: dict[str, int] = {}
        self.file_bytes: dict[str, int] = {}

    def remote_files(self) -> RemoteFiles:
        return RemoteFiles(self.remote, self.header_of)

    def origins(self) -> dict[str, str]:
        return dict.fromkeys(self.local, "whole, from the cache") | dict.fromkeys(
            self.remote, "ranges"
        )

    def header_of(self, name: str) -> dict[str, TensorInfo]:
        if name not in self._headers:
            start, file_bytes = ranges.read(self.open_range, name, 0, START_BYTES)
            source = str(self.local.get(name, f"{self._label}: {name}"))
            length = header_length(start, file_bytes=file_bytes, source=source)
            data_start = LENGTH_BYTES + length
            if data_start > len(start):
                rest, _ = ranges.read(self.open_range, name, len(start), data_start)
                start += rest
            raw = start[LENGTH_BYTES:data_start]
            self._headers[name] = parse_header(raw, file_bytes=file_bytes, source=source)
            self._data_starts[name] = data_start
            self.file_bytes[name] = file_bytes
        return self._headers[name]

    def piece(self, tensor: StoredTensor, to: int) -> Piece:
        name = tensor.path.name
        self.header_of(name)
        start = self._data_starts[name] + tensor.info.start
        return Piece(name, start, start + tensor.info.end - tensor.info.start, to)

    @contextmanager
    def open_range(self, name: str, start: int, end: int) -> Iterator[RangeResponse]:
        if name not in self.local:
            with self._open_remote(name, start, end) as opened:
                yield opened
            return
        with self.local[name].open("rb") as file:
            file.seek(start)
            sizes = (min(CHUNK_BYTES, end - at) for at in range(start, end, CHUNK_BYTES))
            chunks = iter(map(file.read, sizes))
            yield RangeResponse(filter(None, chunks), os.fstat(file.fileno()).st_size)


def write_tower(tower: Tower, shards: Shards, folder: Path, label: str) -> None:
    """Write the tower's config files and its tensors, as stored, into an empty folder.

    The function then checks the result like any checkpoint: names, shapes, types and finite values.
    """
    for path in tower.settings:
        shutil.copyfile(path, folder / path.name)
    header, pieces = plan_file(tower, shards)
    total = pieces[-1].to + pieces[-1].end - pieces[-1].start
    with (folder / VISION_FILE).open("wb") as file:
        _reserve(file.fileno(), total)
        os.pwrite(file.fileno(), header, 0)
        with tqdm(
            desc=label, total=total - len(header), unit="B", unit_scale=True, file=sys.stderr,
            disable=not shows_progress(),
        ) as bar:  # fmt: skip
            ranges.fetch(pieces, shards.open_range, file.fileno(), bar.update)
    verify_download(folder, label)


def plan_file(tower: Tower, shards: Shards) -> tuple[bytes, list[Piece]]:
    """Return the new file's header, and each tensor's byte range in a shard with its offset in the
    new file."""
    # Write wide types first, as safetensors does, so that every tensor begins aligned.
    tensors = sorted(
        tower.stored(),
        key=lambda tensor: (-DTYPE_BYTES[tensor.info.dtype], tensor.path.name, tensor.info.start),
    )
    entries, position = {}, 0
    for tensor in tensors:
        size = tensor.info.end - tensor.info.start
        entries[tensor.name] = TensorInfo(
            tensor.info.dtype, tensor.info.shape, position, position + size
        )
        position += size
    header = build_header(entries)
    pieces = [shards.piece(tensor, len(header) + entries[tensor.name].start) for tensor in tensors]
    return header, pieces


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the file's disk space or, if the file system cannot, only set the file's size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def verify_download(folder: Path, label: str) -> None:
    at = VISION_FILE
    try:
        tensors = load_checkpoint(folder).tensors
        for at in tensors:
            check_finite(tensors[at], at)
    except CheckpointError as error:  # its name may be in this temporary folder
        raise CheckpointError.of(
            error,
            name=f"{label}: {at}",
            fact=f"damaged in transfer: {error.fact}",
            remedy="download the checkpoint again",
        ) from None
