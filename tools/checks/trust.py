"""Whether to trust the numbers: thousands of random cases against Hugging Face and float64.

Prints one table and one JSON line; exits 1 where anything fails. On a CPU the values are checked
in float32, on a GPU in bf16 and float32, and bit for bit. `--fraction 0.02` runs a sample.

\b
    python -m tools.checks.trust --device cpu --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.trust --device cuda --ledger tools/benchmarks/ledger.jsonl
"""

import math
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.compare.golden import load_golden
from qwen_vit.compare.huggingface import package_versions
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.tolerance import (
    MAX_BF16_RATIO,
    RELATIVE_TOLERANCE,
    judge,
    relative_error,
)
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.graphs import GraphRunner, bucket_for
from qwen_vit.kernels.rope_varlen_attention import fused_rope_varlen_attention
from qwen_vit.metadata import DECODERS
from qwen_vit.model import VisionTower, plan_layout
from tests.support import IMAGES
from tests.support.attention_cases import (
    attention_oracle,
    random_case,
    stock_attention,
    tower_attention,
)
from tests.support.checkpoints import SMALL, peaked_tensors
from tests.support.goldens import MEAN, PHOTOGRAPHS, STD, TINY_FOLDER
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.layouts import assert_equals_transformers
from tests.support.oracle import pixel_rows, vision_oracle
from tests.support.towers import (
    GridTuple,
    as_grids,
    build_tower,
    layout_for,
    n_patches,
    random_grids,
    random_pixels,
    random_rows,
)
from tests.support.towers import tower_trace as trace_of
from tests.support.weight_faults import every_fault, inject_fault
from tools.checks.parity import INPUTS
from tools.common import four_digits, ledger_options, ledger_row, publish
from tools.random_tower import SHAPE, random_weights

CPU = torch.device("cpu")
HEADS, HEAD_DIMS = range(1, 21), (64, 72, 80, 96, 128)
WINDOWS_PX = (56, 84, 112, 140, 168, 196, 224)
PUBLISHED = {  # intermediate and output size; the rest is the same
    "3B": (3420, 2048),
    "7B": (3420, 3584),
    "32B": (3456, 5120),
    "72B": (3456, 8192),
}
KERNEL_LARGEST, KERNEL_MEAN = 1.25, 1.05
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(slots=True)
class CheckCounts:
    """What a check has seen so far: how many cases, the worst figure, and what failed."""

    unit: str  # of the figure
    allowed: str
    runs: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, figure: float, holds: bool, what: object) -> None:
        self.runs += 1
        self.worst = max(self.worst, figure)
        if not holds:
            self.failures.append(str(what))


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table: how many cases in full, the device it needs, and what runs them."""

    name: str
    device: str
    count: int
    run: Callable[[int, int, torch.device], CheckCounts]


def stage_by_stage(
    tally: CheckCounts,
    dtype: torch.dtype,
    ours: Trace,
    theirs: Trace,
    oracle: Callable[[], Trace],
    what: object,
) -> None:
    """One case: every stage by the numbers policy. The figure is what the policy bounds.

    The oracle is asked only where it decides: float32 within 1e-5 needs no allowance.
    """
    if dtype == torch.float32:
        distance = {name: relative_error(ours[name], theirs[name]) for name in theirs}
        if max(distance.values()) <= RELATIVE_TOLERANCE:
            tally.add(max(distance.values()), True, what)
            return
    truth, worst, problems = oracle(), 0.0, []
    for name, right in truth.items():
        verdict = judge(
            dtype,
            distance=relative_error(ours[name], theirs[name]),
            ours=relative_error(ours[name], right),
            theirs=relative_error(theirs[name], right),
        )
        worst = max(worst, verdict.measured)
        if not verdict.passed:
            problems.append(f"{name}: {verdict.problem}")
    tally.add(worst, not problems, f"{what}: {'; '.join(problems[:2])}")


def policy_counts(dtype: torch.dtype) -> CheckCounts:
    if dtype == torch.float32:
        return CheckCounts("relative", "1e-5 (or 2x HF's own)")
    return CheckCounts("x HF's error", "1.01")


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32)


# Values ------------------------------------------------------------------------------------------


def layouts(count: int, seed: int, device: torch.device) -> CheckCounts:
    """Random layouts: orders and segments exact, values by the policy, on a small tower."""
    config = replace(
        SMALL, depth=2, num_heads=1, hidden_size=80, intermediate_size=37, out_hidden_size=8,
        fullatt_block_indexes=(1,),
    )  # fmt: skip
    tensors, tally = peaked_tensors(config, seed), policy_counts(torch.float32)
    ours, theirs = build_tower(tensors, config), hf_tower(tensors, config)
    for case in range(count):
        generator = random.Random(f"{seed} {case}")
        grids = random_grids(generator, generator.choice((1, 50, 200, 400)))
        layout = layout_for(grids, config)
        try:
            assert_equals_transformers(layout, grids, config.window_px)
        except AssertionError:
            tally.add(math.inf, False, f"{grids}: orders or segments differ")
            continue
        is_still = all(t == 1 for t, _, _ in grids)
        pixels = random_pixels(n_patches(grids), case) if is_still else None
        rows = (
            random_rows(n_patches(grids), case) if pixels is None else pixel_rows(pixels, MEAN, STD)
        )
        stage_by_stage(
            tally, torch.float32,
            trace_of(ours, rows if pixels is None else pixels, grids, layout=layout),
            hf_trace(theirs, rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), grids,
        )  # fmt: skip
    return tally


def unpublished(count: int, seed: int) -> Iterator[VisionConfig]:
    """Architectures that no checkpoint has; heads, head dims and windows each come round."""
    generator = random.Random(seed)
    pairs = [(heads, head_dim) for heads in HEADS for head_dim in HEAD_DIMS]
    generator.shuffle(pairs)
    for case in range(count):
        heads, head_dim = pairs[case % len(pairs)]
        depth = generator.randint(1, 3)
        yield replace(
            SMALL,
            depth=depth,
            num_heads=heads,
            hidden_size=heads * head_dim,
            intermediate_size=generator.randint(1, 400),
            out_hidden_size=8 * generator.randint(1, 12),
            window_px=WINDOWS_PX[case % len(WINDOWS_PX)],
            fullatt_block_indexes=tuple(i for i in range(depth) if generator.random() < 0.5),
        )


def configs(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """Other heads, head dims, windows, MLP sizes and mixes of full and window blocks."""
    tally = policy_counts(dtype)
    for case, config in enumerate(unpublished(count, seed)):
        grids = random_grids(random.Random(f"{seed} {case}"), 300)
        tensors = peaked_tensors(config, seed + case)
        if dtype == torch.bfloat16:
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        rows = random_rows(n_patches(grids), case).to(device)
        stage_by_stage(
            tally, dtype,
            trace_of(build_tower(tensors, config, dtype=dtype, device=device), rows, grids),
            hf_trace(hf_tower(tensors, config, dtype, device), rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), config,
        )  # fmt: skip
    return tally


@cache
def tiny() -> tuple[dict[str, Tensor], VisionConfig]:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    return dict(encoder.checkpoint.tensors), encoder.config


def scaled(tensors: dict[str, Tensor], part: str, rows: slice, by: float) -> dict[str, Tensor]:
    """The weights and biases whose name holds `part`, some of their rows multiplied."""
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if part in name:
            changed[name] = tensor.clone()
            changed[name][rows] *= by
    return changed


def adversarial_towers(dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    tensors, config = tiny()
    everything, C = slice(None), config.hidden_size
    towers = {
        "": tensors,
        # uniform softmax: the mean of the values comes out
        ", equal keys": scaled(tensors, ".qkv.", slice(C, 2 * C), 0.0),
        ", huge activations": scaled(tensors, ".down_proj.", everything, 2.0**13),
    }
    if dtype == torch.float32:  # in bf16 rounding decides which key wins, for anyone
        towers[", scores times 16"] = scaled(tensors, ".qkv.", slice(0, C), 16.0)
    return towers


def adversarial_inputs() -> dict[str, Tensor]:
    """uint8 pixels (N, 588) or float rows (N, 1176) of one image of 30 x 46 patches."""
    n = 30 * 46
    bright = torch.zeros(n, 588, dtype=torch.uint8)
    bright[n // 2, 300] = 255
    checks = torch.zeros(n, 588, dtype=torch.uint8)
    checks[:, ::2] = 255
    one_patch = random_pixels(1, 0).expand(n, -1).contiguous()
    return {
        "all black": torch.zeros(n, 588, dtype=torch.uint8),
        "all white": torch.full((n, 588), 255, dtype=torch.uint8),
        "constant grey": torch.full((n, 588), 128, dtype=torch.uint8),
        "a single bright value": bright,
        "saturated checks": checks,
        "the same patch everywhere": one_patch,
        "rows of zeros": torch.zeros(n, 1176),
        "rows times 1,000": random_rows(n, 1) * 1e3,
        "rows times 1e-4": random_rows(n, 2) * 1e-4,
        "one huge row": random_rows(n, 3).index_fill_(0, torch.tensor([7]), 1e3),
    }


def adversarial(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """Constant, saturated and huge inputs on weights/tiny; on towers with odd weights as well.

    A constant image is one token repeated: too few independent values for a ratio of two bf16
    errors to mean much. So in bf16 the policy holds for each stage's geometric mean over all cases.
    """
    config, grids = tiny()[1], [(1, 30, 46)]
    tally, ratios = policy_counts(dtype), defaultdict[str, list[float]](list)
    cases = [
        (what + suffix, weights, patches)
        for suffix, weights in adversarial_towers(dtype).items()
        for what, patches in adversarial_inputs().items()
    ]
    for what, weights, patches in cases[:: max(1, len(cases) // count)]:
        is_pixels = patches.dtype == torch.uint8
        rows = (pixel_rows(patches, MEAN, STD) if is_pixels else patches).to(device)
        ours = trace_of(
            build_tower(weights, config, dtype=dtype, device=device),
            patches if is_pixels else rows, grids,
        )  # fmt: skip
        theirs = hf_trace(hf_tower(weights, config, dtype, device), rows, grids)
        truth = partial(vision_oracle, weights, config, rows, grids)
        if dtype == torch.float32:
            stage_by_stage(tally, dtype, ours, theirs, truth, what)
            continue
        tally.add(0.0, all(bool(values.isfinite().all()) for values in ours.values()), what)
        for stage, right in truth().items():
            error, reference = (relative_error(t[stage], right) for t in (ours, theirs))
            if reference > 0:  # black pixels times nothing: both exact
                ratios[stage].append(error / reference)
    for stage, found in ratios.items():
        mean = math.exp(sum(math.log(max(ratio, 1e-3)) for ratio in found) / len(found))
        tally.worst = max(tally.worst, mean)
        if not mean <= MAX_BF16_RATIO:
            tally.failures.append(f"{stage}: {mean:.3f} in the mean, {max(found):.3f} at most")
    return tally


def photographs(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """Every photograph of the project through `qwen-vit compare`, on weights/tiny."""
    encoder = VisionEncoder.from_pretrained(TINY_FOLDER, device=device, dtype=dtype)
    tally = policy_counts(dtype)
    images = [str(IMAGES / name) for name in PHOTOGRAPHS[:count]]
    done = compare(encoder, images)
    for name, error in done.skipped:
        tally.add(math.inf, False, f"{name}: {error}")
    for image in done.images:
        worst = max(stage.verdict.measured for stage in image.stages)
        tally.add(worst, not image.problems, f"{image.id}: {image.problems[:2]}")
    return tally


def weight_faults(count: int, seed: int, device: torch.device) -> CheckCounts:
    """A fault in any one tensor of weights/tiny: found, and its stage named, against a golden."""
    tally = CheckCounts("x the tolerance, at least", "1")
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=30_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        compare(encoder, [IMAGES / "chelsea.png"], save_golden=path)
        golden, least = load_golden(path), math.inf
        faults = list(every_fault(encoder.checkpoint.tensors))
        for case, fault in enumerate(random.Random(seed).sample(faults, min(count, len(faults)))):
            done = compare_with_golden(inject_fault(encoder, fault, seed + case), golden)
            found = [stage for stage in done.images[0].stages if not stage.verdict.passed]
            named = found[0].name if found else "nothing"
            if found:
                least = min(least, found[0].verdict.measured / found[0].verdict.allowed)
            changed = done.facts["golden"]["changed_weights"]
            holds = not done.passed and named == fault.stage and changed == (fault.tensor,)
            tally.add(0.0, holds, f"{fault} in {fault.stage}: found in {named}")
    tally.worst = least
    return tally


def published_shapes(
    count: int, seed: int, device: torch.device, dtype: torch.dtype
) -> CheckCounts:
    """Every published shape, random weights, ten odd sizes in one batch, every stage."""
    tally, grids = policy_counts(dtype), INPUTS["ten odd sizes"]
    for name, (intermediate, out) in list(PUBLISHED.items())[:count]:
        config = VisionConfig.from_json(
            {**SHAPE, "intermediate_size": intermediate, "out_hidden_size": out}
        )
        tensors = random_weights(config, seed, device)
        pixels = random_pixels(n_patches(grids), seed).to(device)
        rows = pixel_rows(pixels.cpu(), MEAN, STD).to(device)
        on_host = {key: tensor.cpu() for key, tensor in tensors.items()}
        ours = build_tower(on_host, config, ImageConfig.from_json({}), dtype, device)
        stage_by_stage(
            tally, dtype, trace_of(ours, pixels, grids),
            hf_trace(hf_tower(tensors, config, dtype, device), rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), name,
        )  # fmt: skip
    return tally


# Bits, on a GPU ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bitwise:
    """A tower of the 7B shape and depth 2, one window and one full block, and images for it."""

    tower: VisionTower
    graphs: GraphRunner
    device: torch.device
    dtype: torch.dtype
    grids: list[GridTuple]
    pixels: list[Tensor]

    @classmethod
    def make(cls, seed: int, device: torch.device, dtype: torch.dtype) -> "Bitwise":
        config = VisionConfig.from_json({**SHAPE, "depth": 2, "fullatt_block_indexes": [1]})
        tensors = random_weights(config, seed, device)
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        tower = build_tower(on_host, config, ImageConfig.from_json({}), dtype, device)
        generator = random.Random(seed)
        grids = [(1, 2, 2), (1, 32, 32), (1, 46, 74), (1, 2, 60), (1, 58, 2), (1, 8, 8)]
        grids += [
            (1, 2 * generator.randint(1, 24), 2 * generator.randint(1, 24)) for _ in range(18)
        ]
        pixels = [random_pixels(n_patches([g]), i).to(device) for i, g in enumerate(grids)]
        return cls(tower, GraphRunner(tower, device), device, dtype, grids, pixels)

    def run(self, chosen: list[int], padding: int | None) -> Tensor:
        """Merged tokens of a batch: launched one by one with padding rows, or by a graph (None)."""
        grids = as_grids(self.grids[i] for i in chosen)
        pixels = torch.cat([self.pixels[i] for i in chosen])
        n_rows = bucket_for(len(pixels)) if padding is None else len(pixels) + padding
        layout = plan_layout(grids, self.tower.config, self.device, self.dtype, n_rows)
        merged = self.graphs.run(pixels, layout) if padding is None else None
        if merged is not None:
            return merged
        with torch.no_grad():
            tokens: Tensor = self.tower(pixels, layout.to(self.device))
        return tokens


def batches(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """Random batches, with padding rows or by a graph: each image has the bits it has alone."""
    tally, case = CheckCounts("images with other bits", "0"), Bitwise.make(seed, device, dtype)
    alone = [case.run([i], 0) for i in range(len(case.grids))]
    generator = random.Random(seed)
    wrong = torch.zeros(count, dtype=torch.int32, device=device)  # read once, at the end
    seen = []
    for run in range(count):
        chosen = generator.choices(range(len(case.grids)), k=generator.randint(1, 8))
        padding = generator.choice((None, None, 0, 4, 148, 2000))
        seen.append((chosen, padding))
        parts = case.run(chosen, padding).split([len(alone[i]) for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            wrong[run] += (part != alone[i]).any()
    for (chosen, padding), images in zip(seen, wrong.tolist(), strict=True):
        what = f"{[case.grids[i] for i in chosen]}, padding {padding}"
        tally.add(images, images == 0, what)
    return tally


def repeats(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """The same batch again and again, launched one by one and by a graph in turn."""
    tally, case = CheckCounts("values with other bits", "0"), Bitwise.make(seed, device, dtype)
    chosen = [1, 3, 2, 5]
    first = case.run(chosen, 0)
    wrong = torch.zeros(count, dtype=torch.int64, device=device)
    for run in range(count):
        wrong[run] = (case.run(chosen, None if run % 2 else 0) != first).sum()
    for run, values in enumerate(wrong.tolist()):
        tally.add(values, values == 0, f"repeat {run}")
    return tally


# The kernel alone --------------------------------------------------------------------------------


def kernel(count: int, seed: int, device: torch.device, kind: str) -> CheckCounts:
    """The bf16 kernel and PyTorch's bf16 attention with fp32 RoPE, both against float64.

    Bounded over all layouts together: the largest error anywhere, and the mean over all values.
    """
    tally = CheckCounts("x torch's mean error", f"{KERNEL_MEAN}, largest {KERNEL_LARGEST}")
    largest, total = [0.0, 0.0], [0.0, 0.0]
    for case in range(count):
        generator = random.Random(f"{seed} {case} {kind}")
        longest = 64 if kind == "window" else generator.choice((40, 300, 1500))
        lengths = [generator.randint(1, longest) for _ in range(generator.randint(1, 12))]
        arguments = random_case(
            lengths, 80, 4, seed=seed + case, device=device, dtype=torch.bfloat16
        )
        qkv, cos, sin, _ = arguments
        truth, stock = attention_oracle(*arguments), stock_attention(*arguments)
        if kind == "alone":
            ours = fused_rope_varlen_attention(*arguments)
        else:
            ours = tower_attention(qkv, cos, sin, lengths, kind)
        for side, result in enumerate((ours, stock)):
            error = (result.double() - truth).abs()
            largest[side] = max(largest[side], float(error.max()))
            total[side] += float(error.sum())
        tally.runs += 1
    tally.worst, ratio = total[0] / total[1], largest[0] / largest[1]
    if not (tally.worst <= KERNEL_MEAN and ratio <= KERNEL_LARGEST):
        tally.failures.append(f"mean {tally.worst:.3f}, largest {ratio:.3f} times torch's")
    tally.allowed += f" (is {ratio:.3f})"
    return tally


# -------------------------------------------------------------------------------------------------


def checks() -> Iterable[Check]:
    fp32 = torch.float32
    yield Check("random layouts, small tower, fp32", "cpu", 10_000, layouts)
    yield Check("unpublished configs, fp32", "cpu", 400, partial(configs, dtype=fp32))
    yield Check("adversarial inputs, fp32", "cpu", 40, partial(adversarial, dtype=fp32))
    yield Check("photographs, fp32", "cpu", 3, partial(photographs, dtype=fp32))
    yield Check("weight faults found", "cpu", 132, weight_faults)
    # on a GPU each config is compiled anew, which takes most of the time
    for dtype, n_batches, n_configs in ((torch.bfloat16, 10_000, 6), (fp32, 300, 2)):
        name = DTYPE_NAMES[dtype]
        for what, count, run in (
            ("batch equals alone, bitwise", n_batches, batches),
            ("repeats, bitwise", n_batches, repeats),
            ("published shapes, depth 32", len(PUBLISHED), published_shapes),
            ("adversarial inputs", 40, adversarial),
            ("photographs", 3, photographs),
            ("unpublished configs", n_configs, configs),
        ):
            yield Check(f"{what}, {name}", "cuda", count, partial(run, dtype=dtype))
    for kind in ("window", "full", "alone"):
        yield Check(
            f"kernel against oracle, {kind}, bf16", "cuda", 1_000,
            partial(kernel, kind=kind),
        )  # fmt: skip


def row_of(check: Check, tally: CheckCounts, seconds: float) -> dict[str, Any]:
    return {
        "runs": tally.runs,
        "worst": four_digits(tally.worst) if math.isfinite(tally.worst) else None,
        "unit": tally.unit,
        "allowed": tally.allowed,
        "failures": len(tally.failures),
        "examples": tally.failures[:3],
        "seconds": round(seconds, 1),
    }


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option("--fraction", default=1.0, show_default=True, help="Of each check's cases.")
@click.option("--only", multiple=True, help="Checks whose name holds this; may be repeated.")
@click.option("--seed", default=0, show_default=True)
@ledger_options
def main(
    device: str | None, fraction: float, only: tuple[str, ...], seed: int, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    """Run the checks of one device, print a table, and exit 1 where one of them fails."""
    has_gpu = torch.cuda.is_available()
    chosen = device or ("cuda" if has_gpu else "cpu")
    if chosen == "cuda" and not has_gpu:
        raise click.ClickException("--device cuda needs an NVIDIA GPU: torch sees none")
    place = torch.device("cuda", 0) if chosen == "cuda" else CPU
    names = [check.name for check in checks() if check.device == chosen]
    for word in only:
        if not any(word in name for name in names):
            raise click.UsageError(
                f"no check on {chosen} has {word!r} in its name; there are: {'; '.join(names)}"
            )
    rows: dict[str, dict[str, Any]] = {}
    print(
        f"{'check':<44}{'cases':>7}{'failed':>8}{'worst':>10}  {'what':<26}{'allowed':<32}{'s':>6}"
    )
    for check in checks():
        if check.device != chosen or (only and not any(word in check.name for word in only)):
            continue
        start = time.perf_counter()
        count = max(1, math.ceil(check.count * fraction))
        try:
            tally = check.run(count, seed, place)
        except Exception as error:  # noqa: BLE001 a check that dies is a failure; the others go on
            tally = CheckCounts("-", "-", failures=[f"died: {type(error).__name__}: {error}"])
        row = rows[check.name] = row_of(check, tally, time.perf_counter() - start)
        print(
            f"{check.name:<44}{row['runs']:>7,}{row['failures']:>8}{tally.worst:>10.2e}  "
            f"{row['unit']:<26}{row['allowed']:<32}{row['seconds']:>6.0f}",
            flush=True,
        )
        for example in row["examples"]:
            print(f"    {example}", flush=True)
    good = all(row["runs"] and not row["failures"] for row in rows.values())
    line = ledger_row(
        "trust",
        commit,
        place,
        (*(name for name in package_versions() if name not in DECODERS), "triton"),
        fraction=fraction,
        seed=seed,
        good=good,
        rows=rows,
    )
    publish(line, ledger)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
