"""Test checks.sanitize with a fake compute-sanitizer, whose output must appear in the report."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tools.checks.sanitize import run_tool, zeros_under_tma_stores

WATCHES = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 == --log-file ]] && log=$2
    shift 2
done
cat >"$log" <<'END'
{output}
END
{then}
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
ERRORS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 2 bytes
=========     at _gemm+0x70 in linear.py:120
=========     by thread (5,0,0) in block (3,0,0)
=========     Address 0x7f2a is out of bounds
========= Invalid __global__ write of size 2 bytes
=========     at 0x90 in _gemm
========= Uninitialized __global__ memory read of size 4 bytes
=========     at _rms_norm(float *)+0x10
========= ERROR SUMMARY: 3 errors"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported."


def sanitizer(folder: Path, output: str, then: str = 'exec "$@"') -> str:
    path = folder / "compute-sanitizer"
    path.write_text(WATCHES.format(output=output, then=then))
    path.chmod(0o755)
    return str(path)


def test_a_clean_run_counts_its_layouts(tmp_path: Path) -> None:
    row = run_tool("memcheck", sanitizer(tmp_path, CLEAN), 1, 60, "cpu", tmp_path / "logs")
    assert (row["problems"], row["errors"], row["exit_code"]) == ([], 0, 0)
    assert (row["attentions"], row["towers"]) == (1, 1)
    assert "ERROR SUMMARY" in (tmp_path / "logs" / "memcheck.log").read_text()


def test_errors_are_counted_by_kind_and_kernel(tmp_path: Path) -> None:
    row = run_tool("memcheck", sanitizer(tmp_path, ERRORS, "exit 86"), 1, 60, "cpu", None)
    assert row["errors"] == 3
    assert row["problems"][1:] == [
        "Invalid __global__ write of size 2 bytes, in _gemm: 2",
        "Uninitialized __global__ memory read of size 4 bytes, in _rms_norm: 1",
    ]


def test_a_failing_or_missing_sanitizer_is_an_error(tmp_path: Path) -> None:
    row = run_tool("synccheck", sanitizer(tmp_path, REFUSED, "exit 1"), 1, 60, "cpu", None)
    assert "no summary by the tool" in row["problems"][1]
    assert "Device not supported" in row["problems"][1]
    missing = run_tool("synccheck", None, 1, 60, "cpu", None)
    assert missing["problems"] == ["compute-sanitizer is not on this machine"]


def test_layouts_beyond_the_time_limit_count_as_missing(tmp_path: Path) -> None:
    row = run_tool("initcheck", sanitizer(tmp_path, CLEAN), 2, 0, "cpu", None)
    assert row["problems"] == ["0 of 2 layouts in time"]


def test_initcheck_gets_zeros_only_where_the_tma_writes() -> None:
    """initcheck once counted 814,916 reads of a GEMM's result as reads of unwritten memory."""
    linear: Any = import_module("qwen_vit.kernels.linear")
    attention: Any = import_module("qwen_vit.kernels.attention")

    with zeros_under_tma_stores():
        assert torch.equal(
            linear.torch.empty((2, 3), dtype=torch.bfloat16), torch.zeros(2, 3).bfloat16()
        )
        assert linear.torch.float32 is torch.float32
        assert attention.torch is torch
    assert linear.torch is torch
