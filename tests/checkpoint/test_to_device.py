"""Test that tensors reach another device completely, in order, and within the pinned memory."""

import random
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_vit.checkpoint.convert import convert
from qwen_vit.checkpoint.load import Checkpoint, load_checkpoint
from qwen_vit.checkpoint.published_tensors import weights_hash
from qwen_vit.checkpoint.to_device import _through_slots, to_device
from qwen_vit.config import ImageConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import CheckpointError
from tests.support.checkpoints import WIDE, random_tensors, split_qkv, write_checkpoint
from tests.support.towers import CPU, gpu

TYPES = (torch.bfloat16, torch.float32, torch.float16, torch.uint8, torch.int64)
CUDA = torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = [CPU, pytest.param(CUDA, marks=[pytest.mark.gpu, NO_GPU])]


def mixed_tensors(seed: int, n: int = 40) -> list[torch.Tensor]:
    """Return tensors of 0 to 200 elements and of several types, some of which are views."""
    chance = random.Random(seed)
    tensors = []
    for _ in range(n):
        rows, columns = chance.choice([0, 1, 1, 2, 7, 20]), chance.choice([1, 3, 10])
        tensor = torch.tensor([chance.randrange(200) for _ in range(rows * columns)])
        tensor = tensor.view(rows, columns).to(chance.choice(TYPES))
        tensors.append(tensor.T if chance.random() < 0.3 else tensor)
    return [*tensors, torch.tensor(3.0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, 1), (1, 64), (3, 7), (2, 100), (2, 4096)])
def test_every_tensor_arrives_complete_and_in_order(
    device: torch.device, threads: int, piece_bytes: int
) -> None:
    for seed in range(5):
        tensors = mixed_tensors(seed)
        arrived = list(_through_slots(tensors, device, threads, piece_bytes))
        assert len(arrived) == len(tensors)
        for copied, original in zip(arrived, tensors, strict=True):
            assert copied.device == device
            assert (copied.dtype, copied.shape) == (original.dtype, original.shape)
            assert copied.is_contiguous()
            assert torch.equal(copied.cpu(), original)


@pytest.mark.parametrize("device", DEVICES)
def test_a_copied_tensor_does_not_change_when_its_slot_is_reused(device: torch.device) -> None:
    tensors = [torch.full((50,), float(i)) for i in range(60)]
    arrived = list(_through_slots(tensors, device, 2, 40))
    assert [set(tensor.tolist()) for tensor in arrived] == [{float(i)} for i in range(60)]


def test_the_number_of_slots_bounds_the_prefetched_tensors() -> None:
    requested = []

    def ask() -> Iterator[Tensor]:
        for i in range(100):
            requested.append(i)
            yield torch.zeros(25)  # each tensor fills one slot

    arriving = _through_slots(ask(), CPU, 3, 100)
    ahead = [len(requested) - i - 1 for i, _ in enumerate(arriving)]
    # The 3 threads have 2 slots each. The next tensor waits for a slot.
    assert ahead[:90] == [6] * 90


def test_an_error_of_the_source_is_raised_and_the_threads_end() -> None:
    def ask() -> Iterator[Tensor]:
        yield torch.zeros(10)
        raise CheckpointError("gone")

    before = threading.active_count()
    with pytest.raises(CheckpointError, match="gone"):
        list(_through_slots(ask(), CPU, 2, 8))
    arriving = _through_slots([torch.zeros(10)] * 50, CPU, 2, 8)
    assert isinstance(arriving, Generator)
    next(arriving)
    assert threading.active_count() > before
    arriving.close()
    assert threading.active_count() == before


def test_tensors_on_a_cpu_are_not_copied() -> None:
    tensors = mixed_tensors(0)
    assert all(a is b for a, b in zip(to_device(tensors, CPU), tensors, strict=True))


@gpu
@pytest.mark.parametrize("prefix", ["visual.", "thinker.visual."])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_makes_the_same_bits_of_a_checkpoint_as_a_cpu(
    tmp_path: Path, prefix: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    write_checkpoint(tmp_path, WIDE, prefix=prefix, dtype=stored)
    tensors = load_checkpoint(tmp_path).tensors
    on_cpu, on_gpu = (
        convert(tensors, WIDE, ImageConfig.from_json({}), dtype, device) for device in (CPU, CUDA)
    )
    assert list(on_cpu) == list(on_gpu)
    for name, tensor in on_gpu.items():
        assert (tensor.device, tensor.dtype) == (CUDA, on_cpu[name].dtype), name
        bits, expected = (t.contiguous().view(torch.uint8) for t in (tensor.cpu(), on_cpu[name]))
        assert torch.equal(bits, expected), name
    encoder = VisionEncoder.from_pretrained(tmp_path, device="cuda", dtype=dtype)
    for name, tensor in encoder.tower.state_dict().items():
        assert torch.equal(tensor.cpu(), on_cpu[name]), name


@gpu
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_are_on_a_gpu_already_give_the_same_bits(
    split: bool, dtype: torch.dtype
) -> None:
    """Test all tensors or every second tensor, for a tower on the device and for a tower on the
    CPU."""
    image_config = ImageConfig.from_json({})
    tensors = random_tensors(WIDE)
    expected = convert(tensors, WIDE, image_config, dtype)
    stored = split_qkv(tensors) if split else tensors
    for step in (1, 2):
        moved = {
            name: tensor.to(CUDA) if i % step == 0 else tensor
            for i, (name, tensor) in enumerate(stored.items())
        }
        checkpoint = Checkpoint.from_tensors(moved, WIDE)
        assert checkpoint.weights_sha256() == weights_hash(tensors)
        for device in (CPU, CUDA):
            state = convert(checkpoint.tensors, WIDE, image_config, dtype, device)
            assert list(state) == list(expected)
            for name, tensor in state.items():
                assert (tensor.device, tensor.dtype) == (device, expected[name].dtype), name
                assert torch.equal(tensor.cpu(), expected[name]), name


@gpu
def test_a_gpu_finds_weights_that_are_not_finite(tmp_path: Path) -> None:
    for name in ("blocks.1.norm2.weight", "merger.mlp.0.weight", "patch_embed.proj.weight"):
        tensors = random_tensors(WIDE)
        tensors[name].view(-1)[7] = float("nan")
        with pytest.raises(CheckpointError, match=f"^{name}: contains 1 NaN and 0 infinite"):
            convert(tensors, WIDE, ImageConfig.from_json({}), torch.bfloat16, CUDA)


@gpu
def test_a_load_on_another_stream_is_ordered_on_it() -> None:
    """Copy 70 MB, so that the copy reuses every slot, on a stream with other work."""
    tensors = [torch.randint(0, 255, (1_000_003,), dtype=torch.uint8) for _ in range(70)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy = torch.randn(8192, 8192, device=CUDA)
        for _ in range(20):
            busy = busy @ busy
        sums = [tensor.sum(dtype=torch.int64) for tensor in to_device(tensors, CUDA)]
    stream.synchronize()
    assert [s.item() for s in sums] == [t.sum(dtype=torch.int64).item() for t in tensors]
