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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import triton

from qwen_vit import weight_format
from qwen_vit.kernels import IS_KNOWN_GLUON, fp8, linear
from tests.support.guard_zones import GUARD_BYTES, GuardedMemory
from tools.checks.sanitize_cases import TAIL_ROWS, random_attention, random_tower
from tools.common import ROOT, append_row, ledger_options, ledger_row

if IS_KNOWN_GLUON:
    from qwen_vit.kernels import linear_hopper

TOOLS = ("guards", "memcheck", "initcheck", "synccheck")
ERROR_EXIT = 86


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
            # initcheck gets plain memory, to detect reads of unwritten values.
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
            # Compare bits, because unwritten rows contain NaN.
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


def run_tool(
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
    return add_results(row, output, complaint, text)


def add_results(row: dict[str, Any], output: str, complaint: str, log: str) -> dict[str, Any]:
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
        rows.append(run_tool(tool, sanitizer, layouts, seconds, device, logs))
        print(json.dumps(rows[-1]), file=sys.stderr)
    is_clean = all(not row["problems"] and not row["errors"] for row in rows)
    document = ledger_row("sanitize", commit, device, ("triton",), good=is_clean, rows=rows)
    print(json.dumps(document) if as_json else as_table(rows))
    append_row(document, ledger)
    sys.exit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
