"""Test that parsing a safetensors header takes time in proportion to its length."""

import json
import time

import pytest

from qwen_vit.common.safetensors_header import parse_header
from qwen_vit.errors import CheckpointError


@pytest.mark.parametrize("dimensions", [65, 100_000])
def test_a_tensor_of_many_dimensions_is_refused_at_once(dimensions: int) -> None:
    """The check once multiplied 100,000 sizes of 2^62 for minutes."""
    entry = {"dtype": "F32", "shape": [2**62] * dimensions, "data_offsets": [0, 0]}
    header = json.dumps({"x": entry}).encode()
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=f"'x' has {dimensions} dimensions"):
        parse_header(header, file_bytes=8 + len(header), source="x.safetensors")
    assert time.process_time() - begin < 1


def test_64_dimensions_are_read() -> None:
    entry = {"dtype": "F32", "shape": [1] * 64, "data_offsets": [0, 4]}
    header = json.dumps({"x": entry}).encode()
    tensors = parse_header(header, file_bytes=12 + len(header), source="x.safetensors")
    assert tensors["x"].shape == (1,) * 64
