"""Test the counts, the output and the charts of benchmarks.tower, without a GPU."""

import itertools
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwen_vit.benchmark import TimedTower, in_batches, stage_work, tower_flops
from qwen_vit.compare.tolerance import RELATIVE_TOLERANCE, relative_error
from qwen_vit.config import Grid, VisionConfig
from qwen_vit.model import plan_layout
from qwen_vit.workloads import WORKLOADS
from tests.support.goldens import TINY_FOLDER
from tests.support.tower_timing import graph_of, launches, stage_runs
from tests.support.towers import CPU, build_tower, gpu, random_pixels
from tests.support.unfused_baseline import unfused_tower
from tools.benchmarks import start, tower_peers, tower_report

SHAPE = VisionConfig.from_json({"model_type": "qwen2_5_vl", "out_hidden_size": 3584})
GRIDS = [Grid(1, 18, 10), Grid(1, 4, 6)]


def test_the_operations_of_one_image_are_counted_by_layer() -> None:
    """The test counts by hand for 32 x 32 patches, with 16 windows of 64 and one frame of 1,024."""
    C, I, N = 1280, 3420, 1024  # noqa: E741
    work = stage_work(SHAPE, WORKLOADS["1 x 448^2"])
    assert work["qkv"].flops == 2 * N * C * 3 * C * 32
    assert work["gate-up"].flops == 2 * work["down"].flops == 2 * N * C * 2 * I * 32
    assert work["window"].flops == 28 * 16 * 4 * C * 64**2
    assert work["full"].flops == 4 * 4 * C * N**2
    assert work["merger"].flops == 2 * 256 * (5120 * 5120 + 5120 * 3584)
    assert tower_flops(SHAPE, WORKLOADS["1 x 448^2"]) == sum(w.flops for w in work.values())


def test_a_window_block_moves_each_byte_once() -> None:
    """The byte roofline of one layer at 9,216 patches is 94 MB, or 22 us at 4.25 TB/s."""
    work = stage_work(SHAPE, WORKLOADS["1 x 1344^2"])["window"]
    assert work.bytes / work.count == 9216 * 1280 * 4 * 2
    assert work.roofline_ms(1e18, 4.25e12) / work.count == pytest.approx(0.0222, rel=0.01)
    assert work.roofline_ms(1.0, 4.25e12) == 1e3 * work.flops  # GEMMs limit this roofline


@pytest.mark.parametrize("name", WORKLOADS)
def test_batches_hold_every_image_in_its_order(name: str) -> None:
    batches = in_batches(WORKLOADS[name])
    assert tuple(grid for batch in batches for grid in batch) == WORKLOADS[name]


def test_the_stages_are_those_of_the_tower_each_in_all_of_its_blocks() -> None:
    tower = build_tower(TINY_FOLDER)
    n = sum(grid.n_patches for grid in GRIDS)
    layout = plan_layout(GRIDS, tower.config, CPU, torch.float32)
    runs = stage_runs(tower, random_pixels(n, 0), layout)
    work = stage_work(tower.config, GRIDS)
    assert list(runs) == list(work)
    assert work["window"].count + work["full"].count == work["qkv"].count == tower.config.depth
    called: list[str] = []
    for name, module in tower.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name.split(".")[-1]))
    modules = {"qkv": "qkv", "proj": "proj", "gate-up": "gate_up", "down": "down"}
    for stage, module in (modules | {"patches": "patch_embed", "merger": "merger"}).items():
        called.clear()
        runs[stage]()
        assert called.count(module) == work[stage].count
    for stage in ("window", "full"):
        runs[stage]()


def stock_varlen(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int) -> Tensor:
    """Compute attention in PyTorch, segment by segment. `longest` must be correct, because
    FlashAttention-2 does not check it."""
    assert longest >= int(edges.diff().max())

    def segment_of(start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        q_part, k_part, v_part = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        return q_part, k_part, v_part

    parts = [
        scaled_dot_product_attention(*segment_of(start, end))
        for start, end in itertools.pairwise(edges.tolist())
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def test_without_fusion_the_tower_is_the_same() -> None:
    tower = build_tower(TINY_FOLDER)
    n = sum(grid.n_patches for grid in GRIDS)
    layout = plan_layout(GRIDS, tower.config, CPU, torch.float32)
    pixels = random_pixels(n, 0)
    unfused = unfused_tower(tower, stock_varlen, 180)
    assert relative_error(unfused(pixels, layout), tower(pixels, layout)) < RELATIVE_TOLERANCE


def made_up() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    rows = {
        name: {
            "roofline_ms": 2.0 * (i + 1), "ours_ms": 3.0 * (i + 1), "gemm_tflops": 700.0,
            "cool_roofline_ms": 1.0 * (i + 1), "cool_ms": 1.6 * (i + 1), "peak_mb": 2000.0,
            "HF sdpa_ms": 30.0 * (i + 1), "HF sdpa_peak_mb": 3000.0,
            "HF FA2 varlen_ms": 9.0 * (i + 1), "HF FA2 varlen_peak_mb": 2500.0,
            "RoPE + FA2_ms": 4.5 * (i + 1),
        }
        for i, name in enumerate(WORKLOADS)
    }  # fmt: skip
    kernel = {
        name: {
            "RoPE": 10.0 * 3**i, "window FA2": 20.0 * 3**i, "window ours": 15.0 * 3**i,
            "window TFLOP/s": 100.0, "full FA2": 40.0 * 3**i, "full ours": 25.0 * 3**i,
            "full TFLOP/s": 400.0,
        }
        for i, name in enumerate(list(WORKLOADS)[:5])
    }  # fmt: skip
    return rows, kernel


def test_a_compiled_peer_is_given_its_layout_and_has_one_graph() -> None:
    """Otherwise torch cuts the graph into seven parts, and the host waits between the parts."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

    def same_length(_: Any, q: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        return q.transpose(1, 2), None

    def by_segment(
        _: Any, q: Tensor, k: Tensor, v: Tensor, *, cu_seq_lens_q: Tensor, max_length_q: int,
        **__: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        lengths = cu_seq_lens_q.diff().tolist()
        assert max_length_q == max(lengths)
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = torch.cat([scaled_dot_product_attention(*part) for part in parts], dim=2)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("test_flash_attention_2", same_length)
    config = theirs.Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=64, intermediate_size=96, num_heads=2, out_hidden_size=64,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    tower = theirs.Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    tower.config._attn_implementation = "test_flash_attention_2"
    grid_thw, rows = torch.tensor([[1, 8, 12], [1, 10, 4]]), torch.randn(136, 1176)
    layout = tower_peers.their_layout(grid_thw, tower.config)
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        compiled: Any = torch.compile(tower, backend=counter)
        compiled(rows, grid_thw=grid_thw, **layout)
        assert counter.frame_count == 1
        ALL_ATTENTION_FUNCTIONS.register("test_flash_attention_2", by_segment)
        given = tower(rows, grid_thw=grid_thw, **layout).pooler_output
        assert torch.equal(given, tower(rows, grid_thw=grid_thw).pooler_output)


def test_both_tables_give_times_speedups_and_their_average() -> None:
    rows, kernel = made_up()
    tower = tower_report.tower_text(rows)
    assert (
        "1 x 448^2        3.00     2.00      700        1.50     1.60           30.0    10.0x"
        in tower
    )
    assert "average speedup against HF FA2 varlen: 3.0x" in tower
    assert "1 x 448^2                 2000           3000           2500" in tower
    attention = tower_report.attention_text(kernel)
    assert "1 x 448^2         0.0300   0.0150     2.0x      100" in attention
    assert attention.count("average speedup: 2.0x") == 2
    ours = {key: value for key, value in rows["1 x 448^2"].items() if " " not in key}
    alone = tower_report.tower_text({"1 x 448^2": ours})
    assert "HF" not in alone
    plain = ours | {"plain_ms": 4.0, "plain_roofline_ms": 2.5}
    assert "       4.00  1.60\n" in tower_report.tower_text({"1 x 448^2": plain})


def test_stages_and_starts_have_their_tables() -> None:
    row = {
        "ms": 1.0,
        "roofline_ms": 0.5,
        "blocks": 32,
        "mb": 100.0,
        "tflops": 600.0,
        "tb_per_s": 0.1,
    }
    text = tower_report.stages_text({"1 x 448^2": {"qkv": row, "down": row}})
    assert "qkv            32    1.000    50%    0.500        2.00      600      100   0.10" in text
    assert "sum                  2.000" in text
    started = {"cold": {"imports": 3.0, "second": 30.0}, "warm": {"imports": 2.0, "second": 6.0}}
    assert "warm                       2.00             6.00" in tower_report.starts_text(started)


@pytest.mark.parametrize("part", ["both", "tower", "attention"])
def test_the_chart_is_drawn(tmp_path: Path, part: str) -> None:
    rows, kernel = made_up()
    path = tmp_path / "charts" / "speed.png"
    tower_report.draw(
        {} if part == "attention" else rows, {} if part == "tower" else kernel, "made up", path
    )
    with Image.open(path) as image:
        assert image.width == 1008


@pytest.mark.slow
def test_a_start_is_timed_from_before_the_process(tmp_path: Path) -> None:
    done = start.start_once(TINY_FOLDER, "cpu", tmp_path)
    times = list(done.values())
    assert list(done) == ["python", "imports", "load", "first embedding", "second"]
    assert times == sorted(times)
    assert times[0] > 0
    with pytest.raises(click.ClickException, match="a first embedding failed"):
        start.start_once(tmp_path / "nothing", "cpu", tmp_path)


@gpu
def test_stages_run_in_graphs_and_launches_are_counted() -> None:
    device = torch.device("cuda", 0)
    tower = build_tower(TINY_FOLDER, dtype=torch.bfloat16, device=device)
    timed = TimedTower(tower, device, torch.bfloat16)
    pixels = random_pixels(sum(grid.n_patches for grid in GRIDS), 0).to(device)
    for run in stage_runs(tower, pixels, timed.layout(GRIDS).to(device)).values():
        graph_of(run)()
    torch.cuda.synchronize()
    seen = launches(timed.eager(pixels, GRIDS))
    if not seen:
        pytest.skip("this machine's driver shows no launches")
    assert seen["_window_attention"] >= stage_work(tower.config, GRIDS)["window"].count
    assert sum(seen.values()) > 5 * tower.config.depth


@gpu
def test_the_unfused_peer_computes_the_same_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    tower = build_tower(TINY_FOLDER, dtype=torch.bfloat16, device=device)
    timed = TimedTower(tower, device, torch.bfloat16)
    pixels = random_pixels(sum(grid.n_patches for grid in GRIDS), 0).to(device)
    unfused = unfused_tower(tower, tower_peers.flash_attention_2, 180)
    theirs = TimedTower(unfused, device, torch.bfloat16).eager(pixels, GRIDS)()
    # bf16 over five peaked blocks; a wrong rotation would give an error of 1.
    assert relative_error(theirs, timed.eager(pixels, GRIDS)()) < 0.05
    tower_peers.UnfusedAttention(timed).on(pixels, GRIDS)()
    torch.cuda.synchronize()
