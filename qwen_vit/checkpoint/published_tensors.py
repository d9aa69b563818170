"""A tower's tensors under their published names: read from files as they are asked for, or given.

A published tensor may be stored as three (q, k and v of Qwen2.5-Omni); they are joined at look-up.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vit.checkpoint.weight_files import StoredTensor
from qwen_vit.errors import CheckpointError

__all__ = ["GivenTensors", "LazyTensors", "PublishedTensors", "weights_hash"]

Part = TypeVar("Part")


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 of the names, types, shapes and bytes, whatever files or device hold them.

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
    """Published names -> tensors, each made of its parts when it is looked up."""

    def __init__(self, parts: Mapping[str, tuple[Part, ...]]) -> None:
        self._parts = parts
        self._sha256: str | None = None

    def sha256(self) -> str:
        """`weights_hash`, computed once."""
        if self._sha256 is None:
            self._sha256 = weights_hash(self)
        return self._sha256

    @abstractmethod
    def locate(self, name: str) -> str:
        """Where a published tensor is stored, for messages."""

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
    """Tensors of files, read at each look-up.

    A copy or a pickle holds paths and no open file: it opens the files again where it is used.
    """

    def __init__(self, sources: Mapping[str, tuple[StoredTensor, ...]]) -> None:
        super().__init__(sources)
        # maps, so what was opened stays whatever becomes of it; and each file's size in bytes
        self._open_files: dict[Path, tuple[Any, int]] = {}

    def locate(self, name: str) -> str:
        """Each part's file, the file's size, and the name there."""
        return " with ".join(
            f"{source.path} ({self._open(source)[1]} bytes): {source.name}"
            for source in self._parts[name]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}  # safetensors' handles can be neither copied

    def _read(self, part: StoredTensor) -> Tensor:
        try:
            tensor: Tensor = self._open(part)[0].get_tensor(part.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"changed or became unreadable while it was read ({error})",
                name=str(part.path),
                remedy="check the disk, and download the file again",
            ) from None
        return tensor

    def _open(self, source: StoredTensor) -> tuple[Any, int]:
        opened = self._open_files.get(source.path)
        if opened is None:
            file = safe_open(source.path, framework="pt", device="cpu")
            # Of two threads that open it at once, both use the first one's. No lock: a process
            # that is forked while another thread holds one would wait for ever.
            opened = self._open_files.setdefault(source.path, (file, source.path.stat().st_size))
        return opened


class GivenTensors(PublishedTensors[Tensor]):
    """Tensors that someone else loaded, on any device."""

    def locate(self, name: str) -> str:
        """The name: there is no file."""
        return name

    def _read(self, part: Tensor) -> Tensor:
        return part
