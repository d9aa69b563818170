"""Test the candidates and the choice of tools.tune, and one small sweep on a GPU."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from qwen_vit.kernels.linear_hopper import HopperGemmTile
from tests.support import ROOT
from tests.support.towers import gpu
from tools.tune import sweep as sweep_module
from tools.tune.__main__ import as_table, chosen, main
from tools.tune.kernels import GEMMS, KERNELS
from tools.tune.sweep import propose_rows, sweep

TUNE = [sys.executable, "-m", "tools.tune"]


def run(*arguments: str) -> str:
    done = subprocess.run(
        [*TUNE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_table_is_swept() -> None:
    from qwen_vit.kernels import attention, linear, linear_hopper

    expected = {f"linear_hopper.TILES[{key}]" for key in linear_hopper.TILES}
    expected |= {f"linear.HOPPER_TILES[{key}]" for key in linear.HOPPER_TILES}
    expected |= {f"linear.FALLBACK_TILES[{bits}]" for bits in linear.FALLBACK_TILES}
    expected |= {f'attention.TILES["{kind}", {bits}]' for kind, bits in attention.TILES}
    expected |= {"attention_hopper.K_ROWS, NUM_STAGES"}
    assert {kernel.table for kernel in KERNELS.values()} == expected


def test_each_kind_of_gpu_sweeps_the_kernels_that_it_runs() -> None:
    other = [kernel.name for kernel in chosen([], False)]
    assert other == ["window-triton", "full-triton", "gemms-triton"]
    hopper = {kernel.name for kernel in chosen([], True)}
    assert hopper == {*GEMMS, "full"}


@pytest.mark.slow
def test_the_list_names_candidates_and_present_rows_without_a_gpu() -> None:
    [down] = json.loads(run("--list", "--json", "--only", "down", "--rows", "9216,1024"))
    assert down["table"] == "linear_hopper.TILES[('residual', True)]"
    assert list(down["present"]) == ["1024", "9216"]
    assert len(down["candidates"]) == len({str(each) for each in down["candidates"]}) > 4
    assert all(present in down["candidates"] for present in down["present"].values())
    assert "gate-up" in run("--list")


def test_a_sweep_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, ["--only", "window-triton"])
    assert done.exit_code == 1
    assert "needs an NVIDIA GPU: torch finds none; try --list" in done.stderr


def test_the_parent_of_candidates_does_not_touch_a_gpu() -> None:
    """A process cannot use CUDA if it was forked after a search for GPUs."""
    program = """
import torch
def looked(*_): raise SystemExit("looked for a GPU")
torch._C._cuda_getDeviceCount = torch.cuda.is_available = torch.cuda.device_count = looked
import tools.tune.__main__
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


WIDE, SQUARE, TALL = (
    HopperGemmTile(128, 256, 3, 2),
    HopperGemmTile(128, 128, 6, 2),
    HopperGemmTile(192, 128, 4, 3),
)


def test_limits_are_between_sizes_and_small_gains_change_nothing() -> None:
    kernel = KERNELS["down"]  # now SQUARE, then TALL from 1,536 rows, then WIDE from 6,144
    measured = {
        1024: {SQUARE: 10.0, TALL: 9.9, WIDE: 12.0},  # a gain of 1 % is too small
        4096: {SQUARE: 30.0, TALL: 30.0, WIDE: 25.0},
        9216: {SQUARE: 80.0, TALL: 90.0, WIDE: 70.0},
    }
    assert propose_rows(kernel, measured, 0.02) == {0: SQUARE, 2048: WIDE}
    assert propose_rows(kernel, measured, 0.0) == {0: TALL, 2048: WIDE}
    merger = KERNELS["merger-1"]  # now SQUARE at these sizes; one row is 4 patches
    assert propose_rows(merger, measured, 0.02) == {0: SQUARE, 512: WIDE}


def test_a_table_of_one_row_gets_the_best_tile_over_all_sizes() -> None:
    kernel = KERNELS["full"]
    present, other, third = kernel.present(1), *kernel.candidates[:2]
    measured = {
        1024: {present: 10.0, other: 12.0, third: 9.0},
        9216: {present: 100.0, other: 70.0},  # `third` failed at this size, so it is no candidate
    }
    assert propose_rows(kernel, measured, 0.02) == {0: other}
    measured[1024][other] = 15.0
    assert propose_rows(kernel, measured, 0.02) == {0: present}


def test_the_results_of_a_sweep_become_rows_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1024: {SQUARE: 10.0, WIDE: 8.0}, 9216: {SQUARE: 80.0, WIDE: 70.0}}
    problems = {"OutOfResources": 2}
    monkeypatch.setattr(
        sweep_module,
        "passing_candidates",
        lambda *_: ({SQUARE: [True] * 2, WIDE: [True] * 2}, problems),
    )
    monkeypatch.setattr(sweep_module, "time_candidates", lambda kernel, tiles, n: times[n])
    swept = sweep(KERNELS["down"], (1024, 9216), 1, 1.0, 0.02)
    text = as_table([json.loads(json.dumps(swept))])
    assert "down" in text
    assert "+25.0%" in text
    assert "2 skipped: OutOfResources" in text
    assert text.endswith(
        "linear_hopper.TILES[('residual', True)]  # down\n"
        "    (0, HopperGemmTile(rows=128, columns=256, num_stages=3, num_groups=2))"
    )


@gpu
def test_a_small_sweep_on_a_gpu_times_every_passing_candidate() -> None:
    document = json.loads(run("--only", "window-triton", "--rows", "256", "--json"))
    [window] = document["kernels"]
    [row] = window["rows"]
    assert row["same_bits"] in (True, False)
    assert 0 < row["best_us"] <= row["present_us"] < 1000
    assert len(row["all_us"]) + sum(window["skipped"].values()) == 6
