"""Run every kernel on a GPU under NVIDIA's compute-sanitizer, over many random layouts.

The first run has no sanitizer. Results are between guard zones and start as NaN. Kernels must not
change the guards, and must write every value. The bits must equal the bits without guards. This run
also fills Triton's cache. The next runs use memcheck, initcheck and synccheck, without CUDA graphs.
They disable caching, so that each allocation has exact bounds. Each layout runs one attention, of
alternating kinds, and one whole small tower. In bf16 and fp8, a tower of published width runs
Hopper's own kernels. Another tower in fp8 and narrow towers in bf16 and float32 run the plain
kernels. It prints a table, and exits with 1 if a result is wrong or missing.

\b
    python -m tools.checks.sanitize --layouts 100
    python -m tools.checks.sanitize --tool memcheck --layouts 20 --seconds 120
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import triton
from torch import Tensor

from qwen_vit import weight_format
from qwen_vit.config import VisionConfig
from qwen_vit.device import FP8_CAPABILITY
from qwen_vit.kernels import IS_KNOWN_GLUON, fp8, linear, plain_kernels
from qwen_vit.kernels import attention as kernels
from qwen_vit.kernels.attention import (
    RotaryTable,
    attention,
)
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.model import VisionTower, plan_layout
from qwen_vit.weight_format import Quantization
from tests.support.attention_cases import adjacent, axial_tables, random_case, segments_of
from tests.support.checkpoints import SMALL, random_tensors
from tests.support.guard_zones import GUARD_BYTES, GuardedMemory
from tests.support.towers import as_grids, build_tower, n_patches, random_pixels, random_rows
from tools.common import ROOT, append_row, ledger_options, ledger_row

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_hopper

TOOLS = ("guards", "memcheck", "initcheck", "synccheck")
ERROR_EXIT = 86
TAIL_ROWS = 5  # beyond the last segment of the public function: they stay as they are
BF16, FP32 = torch.bfloat16, torch.float32
# (what is called, head dim, dtype). At 80 in bf16 Hopper has kernels of its own.
ATTENTIONS = (
    ("window", 80, BF16),
    ("full", 80, BF16),
    ("window-triton", 80, BF16),
    ("full-triton", 80, BF16),
    ("public", 80, BF16),
    ("window", 64, BF16),
    ("full", 64, BF16),
    ("window", 80, FP32),
    ("full", 80, FP32),
    ("public", 128, FP32),
)
HEADS = 2
NARROW = replace(
    SMALL, depth=2, hidden_size=160, intermediate_size=140, num_heads=2, fullatt_block_indexes=(1,)
)
# its GEMMs have whole tiles of Hopper's kernels
PUBLISHED_WIDTH = replace(
    NARROW, hidden_size=1280, intermediate_size=640, num_heads=16, out_hidden_size=256
)


class TowerCase(NamedTuple):
    """Describe a small tower to run."""

    name: str
    config: VisionConfig
    dtype: torch.dtype
    quantization: Quantization | None = None
    is_plain: bool = False  # also on Hopper


TOWERS = (
    TowerCase("published width", PUBLISHED_WIDTH, BF16),
    TowerCase("narrow", NARROW, BF16),
    TowerCase("narrow", NARROW, FP32),
)
FP8_TOWERS = (
    TowerCase("fp8", PUBLISHED_WIDTH, BF16, "fp8"),
    TowerCase("fp8, plain kernels", PUBLISHED_WIDTH, BF16, "fp8", is_plain=True),
)


def on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype. On a CPU the kernels compute only in float32."""
    return FP32 if device.type == "cpu" else dtype


def name_of(*parts: object) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts)


def random_attention(
    case: int, device: torch.device
) -> tuple[str, int, Callable[[], Tensor]]:  # fmt: skip
    """Return (name, values that the call does not write, a call) of one layout."""
    what, head_dim, dtype = ATTENTIONS[case % len(ATTENTIONS)]
    dtype = on(device, dtype)
    generator = random.Random(case)
    kind = what.removesuffix("-triton")
    longest = 64 if kind == "window" else generator.choice((9, 150, 700))
    lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 6))]
    tail = TAIL_ROWS if what == "public" else 0
    qkv, cos, sin, edges = random_case(
        [*lengths, *[tail] * (tail > 0)], head_dim, HEADS, seed=case, device=device, dtype=dtype
    )
    name = name_of(what, head_dim, dtype)
    if what == "public":
        edges = edges[:-1].clone()
        call = lambda: fused_rope_varlen_attention(qkv, cos, sin, edges)  # noqa: E731
        return name, tail * HEADS * head_dim, call
    tables, _, _ = axial_tables(len(qkv), head_dim, case)
    assert tables.index is not None
    rotary = RotaryTable(tables.cos.to(device), tables.sin.to(device), tables.index.to(device))
    segments = segments_of(lengths, kernels.tiling(device, dtype, kind), device)
    pairs = adjacent(qkv)
    tiles = kernels.TILES[kind, dtype.itemsize * 8] if what != kind else None
    return (
        name,
        0,
        lambda: attention(pairs, rotary, segments, kind=kind, adjacent_pairs=True, tiles=tiles),
    )


@cache
def towers_on(device: torch.device) -> tuple[TowerCase, ...]:
    """Return the towers that the device can run."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return TOWERS + FP8_TOWERS * has_fp8


@cache
def tower_of(case: TowerCase, device: torch.device) -> VisionTower:
    return build_tower(
        random_tensors(case.config), case.config, dtype=on(device, case.dtype), device=device,
        quantization=case.quantization,
    )  # fmt: skip


def random_tower(
    case: int, device: torch.device
) -> tuple[str, int, Callable[[], Tensor]]:  # fmt: skip
    """Return a random tower call, like `random_attention`, with pixels or float rows, stills or
    clips, and with or without padding."""
    chosen = towers_on(device)[case % len(towers_on(device))]
    dtype = on(device, chosen.dtype)
    generator = random.Random(case)
    grids = as_grids(
        (1 if case % 2 else generator.choice((1, 2)), 2 * generator.randint(1, 9),
         2 * generator.randint(1, 9)) for _ in range(generator.randint(1, 3))
    )  # fmt: skip
    n = n_patches(grids)
    layout = plan_layout(
        grids, chosen.config, device, dtype, n + 4 * generator.choice((0, 0, 1, 20))
    )
    patches = (random_pixels(n, case) if case % 2 else random_rows(n, case)).to(device)
    tower, on_device = tower_of(chosen, device), layout.to(device)

    def call() -> Tensor:
        with torch.no_grad(), plain_kernels() if chosen.is_plain else nullcontext():
            tokens: Tensor = tower(patches, on_device)
        return tokens

    return name_of("tower,", chosen.name, dtype), 0, call


class TorchWithZeros:
    """Provide torch with an `empty` that returns zeros."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    empty = staticmethod(torch.zeros)


@contextmanager
def zeros_under_tma_stores() -> Iterator[None]:
    """Fill the results of GEMMs with zeros first, because initcheck does not detect stores of the
    TMA. The sums of squares also start as zeros. `guards` checks that the kernels write every value
    of both.
    """
    modules: list[Any] = [linear, fp8, weight_format, *([linear_hopper] if IS_KNOWN_GLUON else [])]
    for module in modules:
        module.torch = TorchWithZeros()
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch


@contextmanager
def counted_launches(seen: Counter[str]) -> Iterator[None]:
    def count(metadata: Any) -> None:
        seen[metadata.get()["name"]] += 1

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(count)
    try:
        yield
    finally:
        hook.remove(count)


def run_layouts(
    count: int, seconds: float, tool: str, device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """Run the layouts in this process, possibly under a sanitizer."""
    start = time.monotonic()
    found = {"attentions": 0, "towers": 0}
    problems: list[str] = []
    calls: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for case in range(count):
        if time.monotonic() - start > seconds:
            break
        for make, kind in ((random_attention, "attentions"), (random_tower, "towers")):
            name, left, call = make(case, device)
            plain = call() if tool == "guards" else None
            # initcheck must see reads of unwritten memory, so it gets plain memory
            memory = GuardedMemory(GUARD_BYTES if tool == "guards" else 0)
            with counted_launches(launches):
                if tool == "initcheck":
                    with zeros_under_tma_stores():
                        result = call()
                else:
                    with memory:
                        result = call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[kind] += 1
            calls[name] += 1
            unwritten, overruns = memory.unwritten(), memory.overruns()
            if tool != "initcheck" and unwritten != left:
                problems.append(f"{name}, layout {case}: {unwritten} values NaN, expected {left}")
            if overruns:
                problems.append(f"{name}, layout {case}: {overruns} bytes of guards overwritten")
            # as bits, so that the NaN of rows that are left alone compare as well
            rows = slice(0, len(result) - (TAIL_ROWS if left else 0))
            if plain is not None and not torch.equal(plain[rows], result[rows]):
                problems.append(f"{name}, layout {case}: other bits than without guards")
    return {
        **found,
        "wanted": count,
        "problems": problems,
        "calls": dict(calls),
        "launches": dict(launches),
        "seconds": round(time.monotonic() - start, 1),
    }


def find_sanitizer() -> str | None:
    """Find the sanitizer on the PATH, in toolkits, or in NVIDIA's Python packages."""
    found = shutil.which("compute-sanitizer")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    folders += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    folders += sorted(Path(torch.__file__).parent.parent.glob("nvidia/*"), reverse=True)
    folders.append(Path(triton.__file__).parent / "backends" / "nvidia")
    for folder in folders:
        for place in ("bin", "compute-sanitizer"):
            path = folder / place / "compute-sanitizer"
            if found is None and os.access(path, os.X_OK) and path.is_file():
                found = str(path)
    return found


def watched(
    tool: str, sanitizer: str | None, count: int, seconds: float, device: str, logs: Path | None
) -> dict[str, Any]:
    """Run the layouts in a child process, under a tool or only with guards. Return a row."""
    options = ["--child", tool, "--layouts", str(count), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "tools.checks.sanitize", *options, "--device", device]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    row: dict[str, Any] = {"tool": tool, "errors": None, "problems": []}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        if tool != "guards":
            if sanitizer is None:
                return row | {"problems": ["compute-sanitizer is not on this machine"]}
            command[:0] = [
                sanitizer, "--tool", tool, "--log-file", str(log), "--print-limit", "50",
                "--error-exitcode", str(ERROR_EXIT),
                *(("--report-api-errors", "no") if tool == "memcheck" else ()),
            ]  # fmt: skip
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
                timeout=2 * seconds + 120,
            )  # fmt: skip
            output, complaint, exit_code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            output, complaint, exit_code = "", f"hung: stopped after {error.timeout:g} s", None
        text = log.read_text(errors="replace") if log.exists() else ""
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{tool}.log").write_text(f"{text}\n{complaint}")
    row |= {"exit_code": exit_code, "process_seconds": round(time.monotonic() - start, 1)}
    return judged(row, output, complaint, text)


def judged(row: dict[str, Any], output: str, complaint: str, log: str) -> dict[str, Any]:
    """Add the child's and the tool's results to the row. A missing output is also a problem."""
    documents = [line for line in output.splitlines() if line.startswith('{"attentions"')]
    if documents:
        row |= json.loads(documents[-1])
        if row["attentions"] < row["wanted"]:
            row["problems"].append(f"{row['attentions']} of {row['wanted']} layouts in time")
    else:
        last = (complaint.strip() or output.strip() or "no output").splitlines()[-3:]
        row["problems"].append("no result: " + " | ".join(last))
    if row["tool"] != "guards":
        summary = re.search(r"ERROR SUMMARY: (\d+) error", log)
        if summary is None:
            first = [line.strip("= ") for line in log.splitlines() if line.strip("= ")][:3]
            row["problems"].append("no summary by the tool: " + " | ".join(first or ["no log"]))
        else:
            row["errors"] = int(summary[1])
            if row["errors"]:
                row["problems"] += kinds_of_error(log)
    return row


def kinds_of_error(log: str) -> list[str]:
    """Return lines such as `Invalid __global__ write of size 2 bytes, in _gemm: 12`, the most
    frequent first."""
    kinds: Counter[str] = Counter()
    what = None
    for line in (raw.lstrip("= ").rstrip() for raw in log.splitlines()):
        if re.match(r"(Invalid|Uninitialized|Barrier|Out-of-range|Misaligned|Program hit)", line):
            what = line
        elif what is not None and (place := re.match(r"at (?:0x[0-9a-f]+ in )?([^\s(+]+)", line)):
            kinds[f"{what}, in {place[1]}"] += 1
            what = None
    return [f"{kind}: {count}" for kind, count in kinds.most_common(8)] or [
        "of a kind that is not known here: --logs keeps them"
    ]


def as_table(rows: list[dict[str, Any]]) -> str:
    line = "{:<12}{:>12}{:>9}{:>10}{:>10}{:>8}"
    lines = [line.format("tool", "attentions", "towers", "launches", "errors", "s")]
    for row in rows:
        launches = sum(row.get("launches", {}).values())
        errors = "-" if row["errors"] is None else row["errors"]
        lines.append(
            line.format(
                row["tool"], row.get("attentions", 0), row.get("towers", 0), launches, errors,
                round(row.get("process_seconds", 0)),
            )
        )  # fmt: skip
        lines += [f"    {problem}" for problem in row["problems"][:10]]
    covered: Counter[str] = Counter()
    for row in rows:
        covered.update(row.get("launches", {}))
    lines.append("launches: " + ", ".join(f"{k} {n}" for k, n in sorted(covered.items())))
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Default: all.")
@click.option("--layouts", default=100, show_default=True)
@click.option(
    "--seconds",
    default=240.0,
    show_default=True,
    help="Set the time limit for the layouts of one tool.",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="Choose the device. A CPU runs only the guard checks.",
)
@click.option("--child", type=click.Choice(TOOLS), hidden=True)
@click.option(
    "--logs", type=click.Path(path_type=Path), help="Keep the tools' output in this folder."
)
@ledger_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(
    tools: tuple[str, ...], layouts: int, seconds: float, device: str | None, child: str | None,
    logs: Path | None, ledger: Path | None, commit: str, as_json: bool,
) -> None:  # fmt: skip
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if child is not None:
        print(json.dumps(run_layouts(layouts, seconds, child, torch.device(device))))
        return
    if device == "cpu" and tools != ("guards",):
        raise click.ClickException(
            "the sanitizer needs an NVIDIA GPU, and torch finds none; "
            "`--tool guards --device cpu` interprets the kernels between guards"
        )
    sanitizer = find_sanitizer()
    print(f"compute-sanitizer: {sanitizer or 'not on this machine'}", file=sys.stderr)
    rows = []
    for tool in tools or TOOLS:
        rows.append(watched(tool, sanitizer, layouts, seconds, device, logs))
        print(json.dumps(rows[-1]), file=sys.stderr)
    is_clean = all(not row["problems"] and not row["errors"] for row in rows)
    document = ledger_row("sanitize", commit, device, ("triton",), good=is_clean, rows=rows)
    print(json.dumps(document) if as_json else as_table(rows))
    append_row(document, ledger)
    sys.exit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
