"""Test that `guard_zones.py` detects writes beside a tensor, and missing writes."""

import pytest
import torch

from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import attention
from tests.support.attention_cases import axial_tables, random_case, segments_of
from tests.support.guard_zones import GuardedMemory
from tests.support.towers import CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_unwritten_value_is_counted(dtype: torch.dtype) -> None:
    with GuardedMemory() as memory:
        first = torch.empty((3, 5), dtype=dtype)
        second = torch.empty_like(first)
        indices = torch.empty(4, dtype=torch.int32)
    assert memory.unwritten() == 30
    first.zero_()
    second[1] = 1
    assert memory.unwritten() == 10
    assert memory.overruns() == 0
    assert len(memory.buffers) == 2, indices


@pytest.mark.parametrize("offset", [-1, 15])
def test_one_value_written_beside_a_tensor_is_detected(offset: int) -> None:
    with GuardedMemory() as memory:
        out = torch.empty((3, 5))
    beside = out.as_strided((1,), (1,), out.storage_offset() + offset)
    beside.fill_(1.0)
    assert memory.overruns() == 4


def test_memory_without_guards_ends_at_the_tensors_end() -> None:
    with GuardedMemory(guard=0) as memory:
        out = torch.empty((3, 5))
    assert out.untyped_storage().nbytes() == 60
    assert (memory.unwritten(), memory.overruns()) == (15, 0)


def test_the_attention_writes_all_of_its_result_and_nothing_else() -> None:
    lengths = [64, 12, 4]
    qkv, *_ = random_case(lengths, 80, 2)
    tables, _, _ = axial_tables(80, 80)
    segments = segments_of(lengths, kernels.tiling(CPU, qkv.dtype, "window"))
    with GuardedMemory() as memory:
        attention(qkv, tables, segments, kind="window", adjacent_pairs=True)
    assert len(memory.buffers) == 1
    assert (memory.unwritten(), memory.overruns()) == (0, 0)
