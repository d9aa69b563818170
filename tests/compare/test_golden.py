"""Test that the oracle, Hugging Face's tower and the golden files agree, and that mistakes show."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qwen_vit import layout, model
from qwen_vit.checkpoint import convert
from qwen_vit.compare.tolerance import RELATIVE_TOLERANCE
from qwen_vit.kernels import attention, linear
from qwen_vit.layout import Layout, Segments
from qwen_vit.model import VisionTower
from tests.support.goldens import (
    TINY_FOLDER,
    Golden,
    assert_stages_close,
    fp32_budget,
    golden_names,
    load_golden,
    sha256,
    tiny_tower,
)
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.oracle import (
    Faults,
    Trace,
    read_checkpoint,
    relative_error,
    rms_norm_reference_casts,
    rms_norm_wrong_casts,
    vision_oracle,
)
from tests.support.towers import build_tower, layout_for, tower_trace
from tools.make_golden import stage_drift

BITE = 5  # a fault's error must exceed the tolerance by this factor
NAMES = ("clip_3x6x10", "mixed", "photograph_22x16", "photograph_6x10", "smallest_2x2")


@cache
def tiny() -> tuple[dict[str, torch.Tensor], SimpleNamespace]:
    return read_checkpoint(TINY_FOLDER)


@cache
def golden(name: str) -> Golden:
    return load_golden(name)


def oracle_trace(name: str, faults: Faults | None = None) -> Trace:
    tensors, config = tiny()
    rows, grids = golden(name).rows, golden(name).grids
    return vision_oracle(tensors, config, rows, grids, faults=faults or Faults())


def random_checkpoint(seed: int, **changes: object) -> tuple[dict[str, torch.Tensor], object]:
    """Return random float32 tensors for another architecture than weights/tiny."""
    config = SimpleNamespace(**{**vars(tiny()[1]), **changes})
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp, out = config.hidden_size, config.intermediate_size, config.out_hidden_size
    tensors = {"patch_embed.proj.weight": torch.randn(hidden, 3, 2, 14, 14, generator=generator)}
    tensors["patch_embed.proj.weight"] /= 34.3  # sqrt(1176)

    def dense(name: str, outputs: int, inputs: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=generator) / 2

    for i in range(config.depth):
        for norm in ("norm1", "norm2"):
            tensors[f"blocks.{i}.{norm}.weight"] = torch.rand(hidden, generator=generator) + 0.5
        dense(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        dense(f"blocks.{i}.attn.proj", hidden, hidden)
        dense(f"blocks.{i}.mlp.gate_proj", mlp, hidden)
        dense(f"blocks.{i}.mlp.up_proj", mlp, hidden)
        dense(f"blocks.{i}.mlp.down_proj", hidden, mlp)
    tensors["merger.ln_q.weight"] = torch.rand(hidden, generator=generator) + 0.5
    dense("merger.mlp.0", 4 * hidden, 4 * hidden)
    dense("merger.mlp.2", out, 4 * hidden)
    return tensors, config


def random_grids(seed: int, patches: int = 700) -> list[tuple[int, int, int]]:
    """Return grids with merged sides of 1 to 13 (0, 1, 2 and 3 mod 4) and at least `patches`
    patches."""
    generator = torch.Generator().manual_seed(seed)
    grids: list[tuple[int, int, int]] = []
    while sum(t * h * w for t, h, w in grids) < patches:
        t = int(torch.randint(1, 4, (), generator=generator))
        h, w = (2 * torch.randint(1, 14, (2,), generator=generator)).tolist()
        grids.append((t, h, w))
    return grids


def test_the_goldens_that_are_tested_are_those_in_the_folder() -> None:
    assert tuple(golden_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_was_made_of_the_weights_in_the_project(name: str) -> None:
    recorded = golden(name).facts["weights_sha256"]
    assert recorded == {file: sha256(TINY_FOLDER / file) for file in recorded}
    pixels = golden(name).pixels.numpy().tobytes()
    assert golden(name).facts["pixels_sha256"] == sha256(pixels)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_agrees_with_every_golden(name: str) -> None:
    # On these grids, Hugging Face's own error must be within 1e-5 too.
    assert_stages_close(oracle_trace(name), golden(name), RELATIVE_TOLERANCE)


@pytest.mark.parametrize("fault", Faults.names())
def test_each_injected_fault_breaks_a_golden(fault: str) -> None:
    """The merger, which every user uses, must show the fault, even if earlier stages hide it."""
    factors = {}
    for name in NAMES:
        faulty, then = oracle_trace(name, Faults(**{fault: True})), golden(name).trace["merger"]
        budget = fp32_budget(then, oracle_trace_of_merger(name))
        factors[name] = relative_error(faulty["merger"], then) / budget
    print(fault, {name: f"{factor:.0f}" for name, factor in factors.items()})
    assert max(factors.values()) >= BITE


@cache
def oracle_trace_of_merger(name: str) -> torch.Tensor:
    return oracle_trace(name)["merger"]


@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_agrees_with_transformers_on_random_grids(seed: int) -> None:
    tensors, config = tiny()
    grids = random_grids(seed)
    rows = torch.randn(
        sum(t * h * w for t, h, w in grids), 1176, generator=torch.Generator().manual_seed(seed)
    )
    theirs = hf_trace(hf_tower(tensors, config), rows, grids)
    print(grids)
    assert_stages_close(vision_oracle(tensors, config, rows, grids), theirs, RELATIVE_TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"depth": 2, "window_px": 56, "fullatt_block_indexes": (0,)}, id="window56"),
        pytest.param({"depth": 2, "num_heads": 5, "fullatt_block_indexes": ()}, id="no-full"),
        pytest.param(
            {"depth": 2, "hidden_size": 96, "num_heads": 1, "fullatt_block_indexes": (0, 1)},
            id="all-full",
        ),
        pytest.param({"depth": 2, "rope_theta": 500.0}, id="theta500"),
    ],
)
def test_the_oracle_agrees_with_transformers_on_another_architecture(
    changes: dict[str, object],
) -> None:
    tensors, config = random_checkpoint(7, **changes)
    grids = [(1, 6, 18), (2, 10, 4), (1, 2, 2)]
    rows = torch.randn(192, 1176, generator=torch.Generator().manual_seed(0))
    theirs = hf_trace(hf_tower(tensors, config), rows, grids)
    assert_stages_close(vision_oracle(tensors, config, rows, grids), theirs, RELATIVE_TOLERANCE)


def test_the_float32_oracle_is_nearer_to_the_truth_than_the_budget() -> None:
    tensors, config = tiny()
    case = golden("mixed")
    single = vision_oracle(tensors, config, case.rows, case.grids, dtype=torch.float32)
    assert_stages_close(single, oracle_trace("mixed"), RELATIVE_TOLERANCE)


def test_rotary_frequencies_of_the_bf16_reference_stay_float32() -> None:
    """A cast of the whole module also rounds its inv_freq buffer, which makes the reference
    worse."""
    tower = hf_tower(*tiny(), dtype=torch.bfloat16)
    assert tower.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


def norm_case() -> tuple[torch.Tensor, torch.Tensor]:
    weight = tiny()[0]["blocks.0.norm1.weight"]
    x = torch.randn(256, len(weight), generator=torch.Generator().manual_seed(0))
    return x.to(torch.bfloat16), weight


def test_rms_norm_in_bf16_rounds_before_the_weight_as_hugging_face_does() -> None:
    x, weight = norm_case()
    theirs = hf_tower(*tiny(), dtype=torch.bfloat16).blocks[0].norm1(x)
    assert torch.equal(rms_norm_reference_casts(x, weight), theirs)


def test_rms_norm_with_the_wrong_cast_order_shows_in_bf16() -> None:
    """float32 does not show the order. In bf16, at least a sixth of the values change by one
    rounding."""
    x, weight = norm_case()
    theirs = hf_tower(*tiny(), dtype=torch.bfloat16).blocks[0].norm1(x)
    moved = (rms_norm_wrong_casts(x, weight) != theirs).float().mean()
    print(f"{moved:.1%} of the values moved")
    assert moved > 1 / 6


@pytest.mark.parametrize("moved", ["golden", "now", "neither"])
def test_a_drift_of_either_side_is_detected(moved: str) -> None:
    """A golden file with an error of 3e-5 once passed, because its own error set the tolerance."""
    case, oracle = golden("smallest_2x2"), oracle_trace("smallest_2x2")
    off = {**case.trace, "block.4": case.trace["block.4"] * (1 + 3e-5)}
    then = replace(case, trace=off) if moved == "golden" else case
    now = off if moved == "now" else case.trace
    assert stage_drift(now, then, oracle) == (moved == "neither")


def test_the_error_of_a_wrong_reference_sets_no_budget() -> None:
    then, oracle = golden("mixed").trace["merger"], oracle_trace_of_merger("mixed")
    assert fp32_budget(then, oracle) == RELATIVE_TOLERANCE
    assert fp32_budget(then * (1 + 2e-5), oracle) == pytest.approx(4e-5, rel=0.1)
    with pytest.raises(AssertionError, match="not the same model"):
        fp32_budget(then.flip(0), oracle)


def test_a_stage_beyond_its_tolerance_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    right = {"patch_embed": torch.ones(2, 3), "merger": torch.ones(2, 3)}
    assert_stages_close(right, right)
    assert "merger        0.00e+00 of 1.0e-05" in capsys.readouterr().out
    for wrong in (1.0 + 2e-5, float("nan")):
        with pytest.raises(AssertionError, match=r"merger .* of 1.0e-05"):
            assert_stages_close({**right, "merger": torch.full((2, 3), wrong)}, right)


# The package's own tower ------------------------------------------------------------------------

STILLS = ("photograph_22x16", "photograph_6x10", "smallest_2x2")  # both frames are equal


@cache
def budgets(name: str) -> dict[str, float]:
    oracle = oracle_trace(name)
    return {stage: fp32_budget(then, oracle[stage]) for stage, then in golden(name).trace.items()}


@pytest.mark.parametrize("name", NAMES)
def test_our_tower_agrees_with_every_golden(name: str) -> None:
    case = golden(name)
    trace = tower_trace(tiny_tower(), case.rows, case.grids)
    assert_stages_close(trace, case, budgets(name))


@pytest.mark.parametrize("name", STILLS)
def test_our_tower_agrees_with_every_golden_from_uint8_pixels(name: str) -> None:
    case = golden(name)
    trace = tower_trace(tiny_tower(), case.pixels, case.grids)
    assert_stages_close(trace, case, budgets(name))


def other_segments(lengths: list[int]) -> Segments:
    """Return segments of other lengths over the same rows, for the interpreter."""
    tiling = attention.tiling(torch.device("cpu"), torch.float32, "full")
    return layout._segments(torch.tensor(lengths, dtype=torch.int32).numpy(), tiling)


def in_grid_order(right: Layout) -> Layout:
    """Return windows in grid order, each patch with its own position."""
    back = right.grid_index.long().argsort()
    units = torch.arange(len(right.merged_order), dtype=torch.int32)
    return replace(
        right,
        grid_index=right.grid_index[back],
        positions=right.positions[back],
        merged_order=units,
    )


def frames_merged(right: Layout) -> Layout:
    lengths = [grid.n_patches for grid in right.grids]
    return replace(right, frames=other_segments(lengths))


def images_merged(right: Layout) -> Layout:
    return replace(right, frames=other_segments([right.n_patches]))


def boundaries_late(right: Layout) -> Layout:
    lengths = right.windows.cu_seqlens.diff().tolist()
    if len(lengths) > 1:
        lengths = [lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1]
    return replace(right, windows=other_segments(lengths))


def inverse_order_skipped(right: Layout) -> Layout:
    return replace(right, merged_order=torch.arange(len(right.merged_order)))


LAYOUT_FAULTS: dict[str, Callable[[Layout], Layout]] = {
    "row and column swapped": lambda right: replace(right, positions=right.positions.flip(1)),
    "positions within the window": lambda right: replace(right, positions=right.positions % 8),
    "window order skipped": in_grid_order,
    "inverse order skipped": inverse_order_skipped,
    "inverse order not inverted": lambda right: replace(
        right, merged_order=right.merged_order.long().argsort()
    ),
    "frames merged": frames_merged,
    "images merged": images_merged,
    "window boundaries late": boundaries_late,
    "full blocks as window blocks": lambda right: replace(right, frames=right.windows),
    "window blocks as full blocks": lambda right: replace(right, windows=right.frames),
}


def largest_factor(tower: VisionTower, change: Callable[[Layout], Layout] = lambda x: x) -> float:
    """Return the largest ratio of the merger's error to its tolerance over all golden files."""
    factors = {}
    for name in ("smallest_2x2", "clip_3x6x10", "mixed"):
        case = golden(name)
        wrong = change(layout_for(case.grids, tower.config))
        trace = tower_trace(tower, case.rows, case.grids, layout=wrong)
        error = relative_error(trace["merger"], case.trace["merger"])
        factors[name] = error / budgets(name)["merger"]
    print({name: f"{factor:.1f}" for name, factor in factors.items()})
    return max(factors.values())


def test_without_a_fault_no_golden_breaks() -> None:
    assert largest_factor(tiny_tower()) <= 1


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_a_fault_in_our_layout_breaks_a_golden(fault: str) -> None:
    assert largest_factor(tiny_tower(), LAYOUT_FAULTS[fault]) >= BITE


BIASES = ("attn.qkv.bias", "attn.proj.bias", "mlp.gate_up.bias", "mlp.down.bias")
PARAMETERS = (*(f"blocks.4.{bias}" for bias in BIASES), "merger.fc1.bias", "merger.fc2.bias")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_bias_dropped_from_our_tower_breaks_a_golden(name: str) -> None:
    tower = build_tower(TINY_FOLDER)
    tower.get_parameter(name).data.zero_()
    assert largest_factor(tower) >= BITE


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def norm_without_eps(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return linear.rms_norm(x, weight, 0.0)


# (module, name, replacement). The replacement applies while a tower is built and run.
CODE_FAULTS = {
    "tanh GELU": (F, "gelu", tanh_gelu),
    "no eps": (model, "rms_norm", norm_without_eps),
    "natural exponent for base 2": (attention, "LOG2_E", 1.0),
    "rotary pairs not permuted": (convert, "rotary_permutation", torch.arange),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_a_fault_in_our_code_breaks_a_golden(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CODE_FAULTS[fault])
    assert largest_factor(build_tower(TINY_FOLDER)) >= BITE


@pytest.mark.parametrize("fault", ["cos and sin swapped", "angles in bf16", "one angle off"])
def test_a_fault_in_our_angles_breaks_a_golden(fault: str) -> None:
    tower = build_tower(TINY_FOLDER)
    cos, sin = tower._rotary_angles(1)
    tower.angles = {
        "cos and sin swapped": (sin, cos),
        "angles in bf16": (cos.bfloat16().float(), sin.bfloat16().float()),
        "one angle off": (cos.roll(1, dims=0), sin.roll(1, dims=1)),
    }[fault]
    assert largest_factor(tower) >= BITE
