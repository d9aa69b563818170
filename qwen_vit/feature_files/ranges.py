"""Read the tensors of a feature file in object storage by ranges."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from qwen_vit.common.safetensors_header import LENGTH_BYTES, TensorInfo, header_length, parse_header
from qwen_vit.common.store_path import StorePath

__all__ = ["RangedTensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
}  # fmt: skip


class RangedTensors:
    """Offer some methods of `safetensors.safe_open` for an object, through range requests."""

    def __init__(self, path: StorePath) -> None:
        self._path = path
        size = path.stat().st_size
        start = path.read(0, LENGTH_BYTES)
        length = header_length(start, file_bytes=size, source=str(path))
        raw = path.read(LENGTH_BYTES, LENGTH_BYTES + length)
        self.tensors = parse_header(raw, file_bytes=size, source=str(path))
        self._metadata = json.loads(raw).get("__metadata__")
        self._data = LENGTH_BYTES + length

    def metadata(self) -> dict[str, str] | None:
        return self._metadata  # type: ignore[no-any-return]

    def get_tensor(self, name: str) -> Tensor:
        info = self.tensors[name]
        return self._read(info, 0, math.prod(info.shape)).view(info.shape)

    def get_slice(self, name: str) -> "_Rows":
        return _Rows(self, self.tensors[name])

    def _read(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Read the values from `first` to `last` as a flat tensor."""
        dtype, begin = DTYPES[info.dtype], self._data + info.start
        if last <= first:
            return torch.empty(0, dtype=dtype, device="cpu")
        data = self._path.read(begin + first * dtype.itemsize, begin + last * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype)


class _Rows:
    def __init__(self, file: RangedTensors, info: TensorInfo) -> None:
        self._file, self._info = file, info

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        shape: Any = self._info.shape
        first, last, _ = rows.indices(shape[0])
        width = math.prod(shape[1:])
        return self._file._read(self._info, first * width, last * width).view(-1, *shape[1:])
