"""Write the generated parts of the documentation: tables from the ledger, the code and the help.

A page marks such a part by `<!-- generated: NAME -->` and `<!-- end -->`. This command writes the
text between the marks. Therefore a table matches its ledger row, and an error page matches the
codes in the code. A test fails if a page is stale.

python -m tools.write_docs
"""

import json
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from qwen_vit.cli.main import COMMANDS, cli
from qwen_vit.errors import IMAGE_CODES
from tools.benchmarks.engines.chart import ARTICLE_MS, LABELS, newest_towers
from tools.common import ROOT

__all__ = ["LEDGER", "PAGES", "PARTS", "filled", "main", "path_to_docs"]

LEDGER = ROOT / "tools" / "benchmarks" / "ledger.jsonl"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PART = re.compile(r"(?<=<!-- generated: )([a-z ]+) -->\n(.*?)(?=<!-- end -->)", re.DOTALL)

METHOD = "performance.md#method"  # explains the ledger
SPEED, PARITY = "0ce6c52", "13a31d6"  # commits of the rows in the first tables
EXPORT, TRUST_CPU = "de66996", "f4dddd1"
TRUST_GPU = ("13a31d6", "0ce6c52", "53f6a3c", "af8cac3")


@cache
def ledger() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LEDGER.read_text("utf-8").splitlines()]


def rows(what: str, commit: str) -> list[dict[str, Any]]:
    return [row for row in ledger() if (row["what"], row["commit"]) == (what, commit)]


def table(head: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table that aligns columns after the first right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def source(*refs: str, row: dict[str, Any], command: str) -> str:
    """Return the line under a table: weights, machine, date, versions and ledger rows."""
    named = " and ".join(f"`{ref}`" for ref in refs)
    versions = row["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    plural = "s" if len(refs) > 1 else ""
    return (
        f"\nWe measured with random weights of the 7B shape on one {row['device']} "
        f"on {row['date']}. Versions: {packages}. "
        f"[Ledger row{plural}]({METHOD}) {named}. Command: `{command}`.\n"
    )


def ms(value: float) -> str:
    """Return a number with three digits, or with all digits before the point.

    >>> ms(3.185), ms(75.0), ms(20220.0)
    ('3.19', '75.0', '20,220')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def times(value: float, ours: float) -> str:
    return f"{ms(value)} ({value / ours:.1f}x)"


def speed(*, sizes: tuple[str, ...] = (), full: bool = True) -> str:
    [row] = rows("tower", SPEED)
    body = []
    for size, figures in row["rows"].items():
        if sizes and size not in sizes:
            continue
        ours = figures["ours_ms"]
        cells = [size, ms(ours)]
        if full:
            cells += [
                f"{ours / figures['floor_ms']:.2f}",
                f"{figures['rested_ms'] / figures['rested_floor_ms']:.2f}",
            ]
        cells += [times(figures["HF sdpa_ms"], ours), times(figures["HF FA2 varlen_ms"], ours)]
        cells.append(times(figures["compiled_ms"], ours) if "compiled_ms" in figures else "")
        body.append(cells)
    head = ["images", "qwen_vit", "Hugging Face, default", "Hugging Face, FlashAttention-2"]
    head.append("FlashAttention-2, compiled")
    if full:
        head[2:2] = ["x roofline", "cool GPU"]
    command = "python -m tools.benchmarks.tower"
    return table(head, body) + source(f"tower {SPEED}", row=row, command=command)


def parity() -> str:
    [row] = rows("parity", PARITY)
    stages, body = row["stages"], []
    for name in dict.fromkeys(stage.rpartition(", ")[0] for stage in stages):
        first, last = stages[f"{name}, patch_embed"], stages[f"{name}, merger"]
        worst = max(
            value["ratio_worst"]
            for stage, value in stages.items()
            if stage.rpartition(", ")[0] == name
        )
        pairs = [f"{each['ours']:.2e} / {each['hf']:.2e}" for each in (first, last)]
        body.append([name, *(pair.replace("e-0", "e-") for pair in pairs), f"{worst:.2f}"])
    head = ["input", "patch embedding", "merged tokens", "worst ratio"]
    command = "python -m tools.checks.parity"
    return table(head, body) + source(f"parity {PARITY}", row=row, command=command)


def attention() -> str:
    [row] = rows("tower", SPEED)
    body = []
    for size, figures in row["attention_us_per_layer"].items():
        rotation = figures["RoPE"]
        pairs = [
            f"{ms(figures[f'{kind} ours'])} / {ms(rotation + figures[f'{kind} FA2'])}"
            for kind in ("window", "frame")
        ]
        body.append([size, *pairs, f"{figures['frame TFLOP/s']:.0f}"])
    head = ["images", "window attention, us", "full attention, us", "full attention, TFLOP/s"]
    command = "python -m tools.benchmarks.tower"
    return table(head, body) + source(f"tower {SPEED}", row=row, command=command)


def export_speed() -> str:
    row = rows("export", EXPORT)[0]
    rates = row["images_per_s"]
    names = {
        "`qwen-vit export`": "export",
        "the encoder alone": "encoder alone",
        "Hugging Face, default processor": "Hugging Face, default",
        "Hugging Face, Pillow processor": "Hugging Face, Pillow",
    }
    body = [
        [
            label,
            f"{rates[name]:.1f}",
            f"{round(rates[name] * 3600, -3 if rates[name] > 50 else -2):,.0f}",
            f"{1e6 / rates[name] / 3600:.1f}",
        ]
        for label, name in names.items()
    ]  # fmt: skip
    head = ["program", "images/s", "images per GPU-hour", "GPU-hours per million images"]
    command = "python -m tools.benchmarks.export"
    return table(head, body) + source(f"export {EXPORT}", row=row, command=command)


def engine_towers(*, full: bool = True) -> str:
    towers = newest_towers(ledger())
    settings = [name for name in LABELS if name in towers]
    body = []
    for size, ours in towers["plugin"].items():
        if size == "commit" or not (full or size == "1 x 896^2"):
            continue
        cells = [size, ms(ours["ms"])]
        for setting in settings:
            cell = towers[setting].get(size)
            cells.append(f"{ms(cell['ms'])} ({cell['ratio']:.2f}x)" if cell else "")
        article = ARTICLE_MS.get(size)
        body.append([*cells, ms(article) if article else ""])
    used = {f"engines towers {towers[name]['commit']}": None for name in (*settings, "plugin")}
    [*_, row] = [row for row in ledger() if f"{row['what']} {row['commit']}" in used]
    named = [LABELS[name] for name in settings]
    head = ["images", "qwen_vit plugin", *named, "article, not measured here"]
    command = "python -m tools.benchmarks.engines towers"
    return table(head, body) + source(*used, row=row, command=command)


def engine_requests() -> str:
    [*_, row] = [row for row in ledger() if row["what"] == "engines requests"]
    ways = row["ways"]
    order = ("default", "plugin", "features")
    body = [
        [
            size,
            *(ms(ways[way][size]["alone_ms"]) for way in order),
            *(ms(ways[way][size]["images_per_s"]) for way in order),
            ms(ways["features"][size]["images_per_s_parts_included"]),
        ]
        for size in ways["default"]
        if size != "ready_s"
    ]
    named = ("vLLM, default", "qwen_vit plugin", "features")
    head = ["images", *(f"{way}: ms" for way in named), *(f"{way}: images/s" for way in named)]
    command = "python -m tools.benchmarks.engines requests"
    return table([*head, "features, encoding included"], body) + source(
        f"engines requests {row['commit']}", row=row, command=command
    )


def engine_answers() -> str:
    judged = [row for row in ledger() if row["what"] == "engines towers"]
    [*_, row] = [row for row in judged if "plugin" in (row.get("answers") or {})]
    answers = row["answers"]
    body = [
        [
            name,
            f"{answers[key]['logprob_rms']:.4f}",
            f"{answers[key]['logprob_rms_of_tower']:.4f}",
            f"{answers[key]['tower_error']:.4f}",
            str(answers[key]["first_tokens_of_float64"]),
        ]
        for name, key in (("vLLM's tower", "default"), ("our tower, plugin", "plugin"))
    ]
    head = [
        "tower",
        "error against float64 (RMS)",
        "the tower's part of this error",
        "error of the embeddings",
    ]
    head += [f"first tokens equal to float64, of {answers['requests']}"]
    command = "python -m tools.benchmarks.engines towers --answers-only --weights 3"
    return table(head, body) + source(f"engines towers {row['commit']}", row=row, command=command)


def newest_videos() -> dict[str, Any]:
    """Return the newest row with every part of the video benchmark."""
    return [row for row in ledger() if row["what"] == "video" and "times_transformers" in row][-1]


def video_speed() -> str:
    row = newest_videos()
    body = [
        [label, f"{row[key]:.2f}", f"{row[key] / row['tower_clips_per_s']:.2f}"]
        for label, key in (
            ("`encode_iter`, from files to features", "whole_clips_per_s"),
            ("the tower alone", "tower_clips_per_s"),
            ("PyAV alone, on all cores", "pyav_clips_per_s"),
            ("torchcodec alone, on all cores", "torchcodec_clips_per_s"),
            ("transformers, processor and tower", "transformers_clips_per_s"),
        )
    ]
    head = ["program", "clips/s", "x tower alone"]
    command = "python -m tools.benchmarks.video"
    return table(head, body) + source(f"video {row['commit']}", row=row, command=command)


TRUST_WORDS = (
    ("planted faults found", "injected faults found"),
    ("kernel against oracle", "attention against float64"),
    ("frame", "full"),
    ("bitwise, ", "same bits, "),
    ("HF's own", "Hugging Face's own error"),
    ("HF's", "Hugging Face's"),
)


def in_plain_words(text: str) -> str:
    """Convert a name from an old row to the terms of these pages."""
    for old, new in TRUST_WORDS:
        text = text.replace(old, new)
    return text


def trust(device: str, *commits: str) -> str:
    checks: dict[str, list[str]] = {}  # later rows replace earlier rows
    for commit in commits:
        for row in rows("trust", commit):
            for check, found in row["rows"].items():
                worst, unit = found["worst"], found["unit"]
                bits = unit.endswith("with other bits")
                result = "exact" if bits and not worst else f"{worst:.3g} {unit}"
                allowed = "exact" if bits else found["allowed"]
                checks[check] = [f"{found['runs']:,}", result, allowed, str(found["failures"])]
    body = [[*map(in_plain_words, [check, *cells])] for check, cells in checks.items()]
    head = ["check", "cases", "worst", "allowed", "failures"]
    named = ", ".join(f"`trust {commit}`" for commit in commits)
    plural = "s" if len(commits) > 1 else ""
    where = f"\nWe ran these checks on {device}. [Ledger row{plural}]({METHOD}) {named}.\n"
    return table(head, body) + where


def stacks() -> str:
    newest = {row["stack"]: row for row in ledger() if row["what"] == "stack"}
    packages = list(next(iter(newest.values()))["with_packages"])
    body = [
        [
            stack, *row["with_packages"].values(), row["versions"]["torch"],
            str(row["tests"]["passed"]), str(len(row["failed"])),
        ]
        for stack, row in newest.items()
    ]  # fmt: skip
    named = ", ".join(sorted({f"`stack {row['commit']}`" for row in newest.values()}))
    dates = ", ".join(sorted({row["date"] for row in newest.values()}))
    head = ["stack", *packages, "torch", "passed", "failed"]
    command = "python -m tools.checks.stacks --run newest"
    return (
        table(head, body)
        + f"\nWe ran these tests on a CPU on {dates}. [Ledger rows]({METHOD}) {named}. "
        f"Command: `{command}`.\n"
    )


def image_codes() -> str:
    body = [[f"`{code}`", meaning] for code, meaning in sorted(IMAGE_CODES.items())]
    return table(["code", "meaning"], body).replace("---:", "---")


def checkpoints() -> str:
    published = tomllib.loads((ROOT / "weights" / "published.toml").read_text("utf-8"))
    body = [
        [
            f"`{each['repo']}`", each["licence"], f"{each['bytes'] / 1e9:.2f} GB",
            str(each["vision"]["out_hidden_size"]),
        ]
        for each in published["checkpoint"]
    ]  # fmt: skip
    return table(["checkpoint", "licence", "tower size in bfloat16", "token width"], body)


def command_line() -> str:
    runner = CliRunner()
    parts = []
    for name in ("", *sorted(COMMANDS)):
        arguments = [name, "--help"] if name else ["--help"]
        done = runner.invoke(
            cli, arguments, prog_name="qwen-vit", terminal_width=88, catch_exceptions=False
        )
        title = f"qwen-vit {name}".strip()
        parts.append(f"## {title}\n\n```text\n{done.output.rstrip()}\n```\n")
    return "\n" + "\n".join(parts) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "attention": attention,
    "checkpoints": checkpoints,
    "command line": command_line,
    "engine answers": engine_answers,
    "engine requests": engine_requests,
    "engine towers": engine_towers,
    "export speed": export_speed,
    "image codes": image_codes,
    "parity": parity,
    "engine tower": lambda: engine_towers(full=False),
    "short speed": lambda: speed(
        sizes=("1 x 448^2", "1 x 896^2", "1 x 1344^2", "32 x 448^2", "256 mixed"), full=False
    ),
    "speed": speed,
    "stacks": stacks,
    "trust on a cpu": lambda: trust("a CPU, in float32", TRUST_CPU),
    "video speed": video_speed,
    "trust on a gpu": lambda: trust("one NVIDIA H200", *TRUST_GPU),
}


def filled(text: str, docs: str = "") -> str:
    """Return a page with new generated parts. `docs` is the path from the page to docs/.

    >>> filled("no part"), "truncated" in filled("<!-- generated: image codes -->\\n<!-- end -->")
    ('no part', True)
    """

    def part(match: re.Match[str]) -> str:
        made = PARTS[match[1]]().replace(f"({METHOD})", f"({docs}{METHOD})")
        return f"{match[1]} -->\n{made}"

    return PART.sub(part, text)


def path_to_docs(page: Path) -> str:
    return "docs/" if page == ROOT / "README.md" else ""


@click.command(help=__doc__)
def main() -> None:
    for page in PAGES:
        before = page.read_text("utf-8")
        after = filled(before, path_to_docs(page))
        if after != before:
            page.write_text(after, "utf-8")
            print(f"wrote {Path(page).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
