"""Map published names to a tower's tensors, from files at each look-up or from memory.

Qwen2.5-Omni stores q, k and v as three tensors instead of one. A look-up joins them.
"""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vit.checkpoint.tower_names import part_names
from qwen_vit.checkpoint.weight_files import StoredTensor
from qwen_vit.errors import CheckpointError

__all__ = ["GivenTensors", "LazyTensors", "PublishedTensors", "weights_hash"]

Part = TypeVar("Part")


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 of the names, types, shapes and bytes. The hash does not depend on the files
    or the device.

    >>> weights_hash({"a": torch.zeros(2)}) == weights_hash({"a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        head = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(head).encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PublishedTensors(Mapping[str, Tensor], Generic[Part]):
    """Map published names to tensors."""

    def __init__(self, parts: Mapping[str, tuple[Part, ...]]) -> None:
        self._parts = parts
        self._sha256: str | None = None

    def sha256(self) -> str:
        if self._sha256 is None:
            self._sha256 = weights_hash(self)
        return self._sha256

    def stored_as(self, name: str) -> tuple[str, ...]:
        return part_names(name, split=len(self._parts[name]) > 1)

    def as_stored(self) -> Iterator[tuple[str, Tensor]]:
        for name in self:
            parts = self.stored_as(name)
            yield from zip(parts, self[name].chunk(len(parts)), strict=True)

    def on_host(self) -> "PublishedTensors[Any]":
        """Return a map of names to host tensors, so that the GPU keeps only converted weights."""
        return self

    @abstractmethod
    def locate(self, name: str) -> str: ...

    @abstractmethod
    def _read(self, part: Part) -> Tensor: ...

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._read(part) for part in self._parts[name]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class LazyTensors(PublishedTensors[StoredTensor]):
    """Read a tensor from its file at each lookup.

    An open file is mapped into memory, so its content remains readable after another process
    deletes or replaces the path. A pickle contains paths and no open files, so an unpickled object
    opens the files again.
    """

    def __init__(self, sources: Mapping[str, tuple[StoredTensor, ...]]) -> None:
        super().__init__(sources)
        self._open_files: dict[Path, tuple[Any, os.stat_result]] = {}

    def locate(self, name: str) -> str:
        return " with ".join(
            f"{source.path} ({self._open(source)[1].st_size} bytes): {source.name}"
            for source in self._parts[name]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}  # safetensors' handles cannot be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the content never changes, and the path may now name another file

    def _read(self, part: StoredTensor) -> Tensor:
        try:
            file, opened = self._open(part)
            if _is_overwritten(part.path, opened):
                raise CheckpointError(
                    "was overwritten after qwen_vit opened it",
                    name=str(part.path),
                    expected="the loaded weights",
                    remedy="load the model again. To replace a file, write a new file and rename "
                    "it",
                )
            tensor: Tensor = file.get_tensor(part.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"changed or became unreadable during reading ({error})",
                name=str(part.path),
                remedy="check the disk, and download the file again",
            ) from None
        return tensor

    def _open(self, source: StoredTensor) -> tuple[Any, os.stat_result]:
        opened = self._open_files.get(source.path)
        if opened is None:
            file = safe_open(source.path, framework="pt", device="cpu")
            # If two threads open it at once, both use the first result. A lock would be wrong: a
            # process that is forked while another thread has the lock would wait forever.
            opened = self._open_files.setdefault(source.path, (file, source.path.stat()))
        return opened


def _is_overwritten(path: Path, opened: os.stat_result) -> bool:
    """Return whether the open file is still at its path, with another size or modification time.

    The file's memory map may then show changed bytes.
    """
    try:
        now = path.stat()
    except OSError:
        return False  # the path was deleted, and the map keeps the file
    same_file = (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
    return same_file and (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns)


class GivenTensors(PublishedTensors[Tensor]):
    """Map names to tensors that the caller loaded, on any device."""

    def on_host(self) -> "GivenTensors":
        return GivenTensors(
            {name: tuple(part.cpu() for part in parts) for name, parts in self._parts.items()}
        )

    def locate(self, name: str) -> str:
        return name

    def _read(self, part: Tensor) -> Tensor:
        return part
