"""The language model is trained behind our frozen tower as behind transformers' own, frozen.

With checkpointed activations, PEFT, accelerate, two processes and torch.compile; whoever wants to
train the tower itself is refused or warned.
"""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen_vit import VisionEncoder
from qwen_vit.compare.tolerance import relative_error
from qwen_vit.errors import ArgumentError
from tests.support.hf_models import (
    FAMILIES,
    GRIDS,
    make_model,
    tower_name,
    tower_of,
    vision_inputs,
    with_our_tower,
)
from tests.support.towers import random_rows

ROUNDING = 1e-5  # both towers are in float32; a float32 loss has about 1e-7


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def originals(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model, encoder = make_model(family, tmp_path_factory.mktemp("model"))
    return model, with_our_tower(copy.deepcopy(model), encoder)


@pytest.fixture
def both(originals: tuple[Any, Any]) -> tuple[Any, Any]:
    """A model with its own tower, frozen, and the same with ours; to be trained."""
    model, swapped = copy.deepcopy(originals)
    for each in (model, swapped):
        each.requires_grad_(True).train()
        tower_of(each).requires_grad_(False)
    return model, swapped


def loss_of(model: Any, family: str) -> Tensor:
    inputs = vision_inputs(family)
    return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


def gradients(model: Any, family: str) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, family).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ones: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ones
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        assert relative_error(one, others[name]) < 10 * ROUNDING, name


def logits_of(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**vision_inputs(family), use_cache=False).logits


# Gradients and optimisers


def test_the_language_model_gets_the_gradients_that_it_gets_behind_its_own_tower(
    both: tuple[Any, Any], family: str
) -> None:
    model, swapped = both
    assert_near(gradients(swapped, family), gradients(model, family))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(
    both: tuple[Any, Any], family: str, use_reentrant: bool
) -> None:
    _, swapped = both
    expected = gradients(swapped, family)
    swapped.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    swapped.enable_input_require_grads()
    assert swapped.is_gradient_checkpointing
    assert_near(gradients(swapped, family), expected)


@pytest.mark.parametrize("optimiser", ["AdamW", "SGD"])
def test_no_optimiser_sees_or_changes_the_tower(
    both: tuple[Any, Any], family: str, optimiser: str
) -> None:
    """Not by weight decay either, which needs no gradient where a parameter has one of zeros."""
    model, swapped = both
    before, merged = tower_of(swapped).state_dict(), merged_of(swapped)
    first = float(loss_of(model, family))
    losses = []
    for each in both:
        steps = getattr(torch.optim, optimiser)(each.parameters(), lr=1e-2, weight_decay=0.5)
        for _ in range(3):
            loss = loss_of(each, family)
            loss.backward()
            steps.step()
            steps.zero_grad(set_to_none=False)
        losses.append(float(loss_of(each, family)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != pytest.approx(first, rel=1e-2)
    after = tower_of(swapped).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(merged_of(swapped), merged)


def merged_of(model: Any) -> Tensor:
    with torch.no_grad():
        return tower_of(model)(random_rows(104, 3), grid_thw=torch.tensor(GRIDS)).pooler_output


def test_the_tower_has_no_parameters_and_buffers(both: tuple[Any, Any]) -> None:
    """So counts of parameters are those of the other parts."""
    model, swapped = both
    tower = tower_of(swapped)
    assert [*tower.parameters(), *tower.buffers()] == []
    own = sum(p.numel() for p in tower_of(model).parameters())
    assert swapped.num_parameters() == model.num_parameters() - own
    assert sum(t.numel() for t in tower.state_dict().values()) == own


def test_a_training_says_once_that_the_tower_is_frozen(
    both: tuple[Any, Any], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, swapped = both
    caplog.set_level(logging.WARNING, "qwen_vit")
    logits_of(swapped.train(), family)
    loss_of(swapped.eval(), family)
    assert caplog.messages == []
    for _ in range(2):
        loss_of(swapped.train(), family)
    assert caplog.messages == ["the vision tower is frozen in this training: it has no gradients"]


def test_gradients_of_the_tower_are_refused(both: tuple[Any, Any]) -> None:
    tower = tower_of(both[1])
    assert tower.requires_grad_(False) is tower
    for module in (tower, tower.merger, tower.blocks[0].attn.qkv if hasattr(
        tower.blocks[0].attn, "qkv") else tower.blocks[0].attn.q):  # fmt: skip
        with pytest.raises(
            ArgumentError, match=r"computes no gradients\. Expected .*False.* Train"
        ):
            module.requires_grad_()
    rows, grids = random_rows(104, 3).requires_grad_(), torch.tensor(GRIDS)
    with pytest.raises(
        ArgumentError, match=r"pixel rows require gradients, .*\. Pass pixel_values"
    ):
        tower(rows, grid_thw=grids)
    with torch.no_grad():
        assert not tower(rows, grid_thw=grids).pooler_output.requires_grad


@pytest.mark.parametrize("put", [nn.Linear(2, 2), nn.Parameter(torch.ones(2))], ids=type)
def test_parts_of_the_tower_cannot_be_replaced(both: tuple[Any, Any], put: Any) -> None:
    """They are names: what is put there would not run, and not be saved."""
    tower = tower_of(both[1])
    with pytest.raises(
        ArgumentError, match=r"merger of .* cannot be replaced by a .*\. Train tran"
    ):
        tower.merger = put
    with pytest.raises(ArgumentError, match=r"norm1 of .* cannot be replaced"):
        tower.blocks[0].norm1 = put


# PEFT


def adapted(model: Any, **options: Any) -> Any:
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    torch.manual_seed(0)  # for the adapters' weights
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def test_adapters_of_the_language_model_train_save_load_and_merge(
    both: tuple[Any, Any], family: str, originals: tuple[Any, Any], tmp_path: Path
) -> None:
    model, swapped = (adapted(each) for each in both)
    assert_near(gradients(swapped, family), gradients(model, family))
    swapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    expected = logits_of(swapped.eval(), family)
    for original in originals:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
        assert relative_error(logits_of(loaded, family), expected) < ROUNDING
        merged = loaded.merge_and_unload()
        assert relative_error(logits_of(merged, family), expected) < ROUNDING
        merged.save_pretrained(tmp_path / type(tower_of(original)).__name__)
    whole = FAMILIES[family].model_class.from_pretrained(tmp_path / "HFTower")
    assert relative_error(logits_of(whole, family), expected) < ROUNDING


AIMED = {
    "list": {"target_modules": ["q_proj", "gate_proj"]},  # both towers and language models have it
    "tower alone": {"target_modules": r".*visual.*mlp.*"},
    "the whole tower": {"target_modules": r".*visual"},
}


@pytest.mark.parametrize("aim", AIMED)
def test_adapters_for_the_tower_are_refused_with_the_way_out(
    both: tuple[Any, Any], family: str, aim: str
) -> None:
    with pytest.raises(ValueError, match=r"qwen_vit's vision tower .*exclude_modules=.*merge"):
        adapted(copy.deepcopy(both[1]), **AIMED[aim])
    if aim == "list":
        model, swapped = (
            adapted(each, **AIMED[aim], exclude_modules=r".*visual.*") for each in both
        )
        assert_near(gradients(swapped, family), gradients(model, family))


def test_all_linear_layers_are_those_of_the_language_model(both: tuple[Any, Any]) -> None:
    names = [name for name, _ in adapted(both[1], target_modules="all-linear").named_parameters()]
    assert any("gate_proj.lora_A" in name for name in names)
    assert not any("visual" in name for name in names)


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter"])
def test_an_adapter_that_was_trained_with_the_tower_is_refused(
    both: tuple[Any, Any], loader: str, tmp_path: Path
) -> None:
    """Without the tower's part the answers would be wrong."""
    model, swapped = both
    adapted(model, target_modules=["gate_proj"]).save_pretrained(tmp_path)
    loaders = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(swapped, tmp_path),
        "load_adapter": lambda: swapped.load_adapter(str(tmp_path)),
    }
    with pytest.raises(ValueError, match=r"vision tower .*merge the adapter into the checkpoint"):
        loaders[loader]()


def test_fully_trained_parts_of_the_tower_are_refused_and_the_whole_warns(
    both: tuple[Any, Any], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArgumentError, match=r"merger of .* replaced by a ModulesToSaveWrapper"):
        adapted(copy.deepcopy(both[1]), modules_to_save=["merger"])
    model = adapted(both[1], modules_to_save=["visual"])
    loss_of(model, family)
    assert "the vision tower is frozen in this training: it has no gradients" in caplog.messages


# accelerate


def test_a_dispatched_model_with_offloaded_layers_answers_the_same(
    both: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    """The tower stays where it is, wherever the map puts it."""
    _, swapped = both
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


def test_a_map_of_devices_is_inferred_and_checked(both: tuple[Any, Any]) -> None:
    """The tower's state must be covered, and takes no memory of the budget."""
    _, swapped = both
    size = sum(p.nbytes for p in swapped.parameters())
    device_map = accelerate.infer_auto_device_map(swapped, max_memory={"cpu": size // 2, "disk": 0})
    accelerate.utils.modeling.check_device_map(swapped, device_map)
    assert set(device_map.values()) == {"cpu", "disk"}


def test_hooks_on_the_tower_run_around_it(both: tuple[Any, Any], family: str) -> None:
    _, swapped = both
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
    """accelerate keeps what the first Accelerator of a process was given, such as Trainer's."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_prepares_and_unwraps_the_model(
    both: tuple[Any, Any], family: str, tmp_path: Path
) -> None:
    _, swapped = both
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
    # Omni's audio tower gets no input here
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
    family: str, originals: tuple[Any, Any], tmp_path: Path
) -> None:
    """DistributedDataParallel over gloo; as one process does with the mean of both gradients."""
    model, swapped = copy.deepcopy(originals)
    model.save_pretrained(tmp_path / "model")
    mp.start_processes(ddp_worker, (tmp_path, family), nprocs=2, start_method="spawn")
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
    """FSDP2, whose state looks every name up among the modules."""
    model, _ = make_model("qwen2_5_vl", tmp_path / "model")
    mp.start_processes(fsdp_worker, (tmp_path,), nprocs=2, start_method="spawn")
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# torch.compile


def test_a_compiled_model_answers_the_same(both: tuple[Any, Any], family: str) -> None:
    """The graph breaks at the tower, whose kernels are compiled already."""
    _, swapped = both
    expected = logits_of(swapped, family)
    torch._dynamo.reset()
    compiled = torch.compile(swapped, backend="eager")
    assert relative_error(logits_of(compiled, family), expected) < ROUNDING
    names = {key.removeprefix("_orig_mod.") for key in compiled.state_dict()}
    assert names == set(swapped.state_dict())


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(both: tuple[Any, Any], family: str) -> None:
    _, swapped = both
    expected = gradients(swapped, family)
    torch._dynamo.reset()
    compiled = torch.compile(swapped, backend="aot_eager")
    compiled.zero_grad()
    loss_of(compiled, family).backward()
    made = {n: p.grad for n, p in swapped.named_parameters() if p.grad is not None}
    assert_near(made, expected)


@pytest.mark.slow
def test_inductor_compiles_what_is_around_the_tower(both: tuple[Any, Any], family: str) -> None:
    _, swapped = both
    expected = logits_of(swapped, family)
    torch._dynamo.reset()
    swapped.compile()
    assert relative_error(logits_of(swapped, family), expected) < ROUNDING


def test_a_compiled_tower_alone_is_the_tower(both: tuple[Any, Any]) -> None:
    tower = tower_of(both[1])
    torch._dynamo.reset()
    compiled = torch.compile(tower, backend="eager")
    with torch.no_grad():
        made = compiled(random_rows(104, 3), grid_thw=torch.tensor(GRIDS)).pooler_output
    assert torch.equal(made, merged_of(both[1]))


def test_a_whole_graph_is_refused_by_torch(both: tuple[Any, Any], family: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(tower_of(both[1]), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(random_rows(104, 3), grid_thw=torch.tensor(GRIDS))
