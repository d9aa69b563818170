"""Test accelerate, DDP and FSDP with a model that has our tower."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_vit import VisionEncoder
from qwen_vit.compare.tolerance import relative_error
from tests.support.hf_models import (
    FAMILIES,
    make_model,
    tower_name,
    tower_of,
    vision_inputs,
    with_our_tower,
)
from tests.support.hf_training import ROUNDING, logits_of, loss_of

# accelerate


def test_a_dispatched_model_with_offloaded_layers_gives_the_same_answer(
    trainable: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    """The tower does not move, for any device map."""
    _, swapped = trainable
    swapped.eval()
    expected, state = logits_of(swapped, family), dict(swapped.state_dict())
    name = tower_name(swapped)
    layers = next(n for n, m in swapped.named_modules() if isinstance(m, nn.ModuleList) and "layers"
                  in n and "audio" not in n and "visual" not in n)  # fmt: skip
    device_map = {
        n: "cpu" for n, m in swapped.named_modules() if n and not any(m.children())
        and not n.startswith((f"{name}.", f"{layers}.1."))
    } | {name: "disk", f"{layers}.1": "disk"}  # fmt: skip
    dispatched = accelerate.dispatch_model(
        swapped, device_map, main_device="cpu", offload_dir=tmp_path / "offloaded"
    )
    assert next(dispatched.get_submodule(f"{layers}.1").parameters()).is_meta
    assert torch.equal(logits_of(dispatched, family), expected)
    dispatched.save_pretrained(tmp_path / "saved")
    loaded = FAMILIES[family].model_class.from_pretrained(tmp_path / "saved")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_a_map_of_devices_is_inferred_and_checked(trainable: tuple[Any, Any]) -> None:
    """The device map must cover the tower's state, which needs no memory of the budget."""
    _, swapped = trainable
    size = sum(p.nbytes for p in swapped.parameters())
    device_map = accelerate.infer_auto_device_map(swapped, max_memory={"cpu": size // 2, "disk": 0})
    accelerate.utils.modeling.check_device_map(swapped, device_map)
    assert set(device_map.values()) == {"cpu", "disk"}


def test_hooks_of_the_tower_run(trainable: tuple[Any, Any], family: str) -> None:
    _, swapped = trainable
    expected = logits_of(swapped, family)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(tower_of(swapped), hook)
    copied = copy.deepcopy(swapped)
    for each in (swapped, copied):
        assert torch.equal(logits_of(each, family), expected)
    accelerate.hooks.remove_hook_from_module(tower_of(swapped), recurse=True)
    assert torch.equal(logits_of(swapped, family), expected)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the settings of a process's first Accelerator, such as Trainer's
    settings."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_prepares_and_unwraps_the_model(
    trainable: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    _, swapped = trainable
    state = tower_of(swapped).state_dict()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimiser = accelerator.prepare(swapped, torch.optim.AdamW(swapped.parameters(), 1e-3))
    accelerator.backward(loss_of(model, family))
    optimiser.step()
    accelerator.save_model(model, tmp_path)
    saved = accelerator.get_state_dict(model)
    name = tower_name(accelerator.unwrap_model(model))
    for key, tensor in state.items():
        assert torch.equal(saved[f"{name}.{key}"], tensor)


# Two processes


def ddp_worker(rank: int, folder: Path, family: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    model = FAMILIES[family].model_class.from_pretrained(folder / "model")
    encoder = VisionEncoder.from_pretrained(folder / "model", device="cpu")
    with_our_tower(model, encoder).train()
    # Omni's audio tower gets no input, so its parameters get no gradient.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    steps = torch.optim.SGD(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        inputs = vision_inputs(family, seed=10 * step + rank)
        wrapped(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        steps.step()
        steps.zero_grad()
    torch.save(wrapped.state_dict(), folder / f"{rank}.pt")
    if rank == 0:
        wrapped.module.save_pretrained(folder / "saved")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_model_and_keep_the_tower(
    family: str, both: tuple[Any, Any], tmp_path: Path
) -> None:
    """Train with DistributedDataParallel over gloo, and compare with one process and the mean
    gradient."""
    model, swapped = copy.deepcopy(both)
    model.save_pretrained(tmp_path / "model")
    start_processes(ddp_worker, (tmp_path, family), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    swapped.requires_grad_(True).train()
    steps = torch.optim.SGD(swapped.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        for rank in range(2):
            inputs = vision_inputs(family, seed=10 * step + rank)
            (swapped(**inputs, labels=inputs["input_ids"], use_cache=False).loss / 2).backward()
        steps.step()
        steps.zero_grad()
    saved = FAMILIES[family].model_class.from_pretrained(tmp_path / "saved")
    for name, tensor in swapped.state_dict().items():
        if "visual" in name:
            assert torch.equal(saved.state_dict()[name], model.state_dict()[name]), name
        else:
            assert relative_error(saved.state_dict()[name], tensor) < ROUNDING, name


def fsdp_worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    with_our_tower(model, VisionEncoder.from_pretrained(folder / "model", device="cpu")).train()
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss_of(model, "qwen2_5_vl").backward()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save(state, folder / "state.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_has_the_whole_tower_in_its_state(tmp_path: Path) -> None:
    """Test FSDP2, which searches every name of the state among the modules."""
    model, _ = make_model("qwen2_5_vl", tmp_path / "model")
    start_processes(fsdp_worker, (tmp_path,), nprocs=2, start_method="spawn")
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
