"""Check values against Hugging Face and float64, stage by stage, for `tools.checks.trust`."""

import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.compare.golden import load_golden
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.run import compare, compare_with_golden
from qwen_vit.compare.tolerance import (
    MAX_BF16_RATIO,
    RELATIVE_TOLERANCE,
    judge,
    relative_error,
)
from qwen_vit.config import ImageConfig, VisionConfig
from tests.support import IMAGES
from tests.support.checkpoints import SMALL, peaked_tensors
from tests.support.goldens import MEAN, PHOTOGRAPHS, STD, TINY_FOLDER
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.layouts import assert_equals_transformers
from tests.support.oracle import pixel_rows, vision_oracle
from tests.support.towers import (
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
from tools.random_tower import SHAPE, random_weights

HEADS, HEAD_DIMS = range(1, 21), (64, 72, 80, 96, 128)

WINDOWS_PX = (56, 84, 112, 140, 168, 196, 224)

PUBLISHED = {  # (intermediate size, output size); the other sizes are equal
    "3B": (3420, 2048),
    "7B": (3420, 3584),
    "32B": (3456, 5120),
    "72B": (3456, 8192),
}


@dataclass(slots=True)
class CheckCounts:
    """Hold a check's number of cases, worst value and failures so far."""

    unit: str  # the unit of `worst`
    allowed: str
    runs: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, figure: float, holds: bool, what: object) -> None:
        self.runs += 1
        self.worst = max(self.worst, figure)
        if not holds:
            self.failures.append(str(what))


def stage_by_stage(
    counts: CheckCounts,
    dtype: torch.dtype,
    ours: Trace,
    theirs: Trace,
    oracle: Callable[[], Trace],
    what: object,
) -> None:
    """Check every stage of one case with its tolerance. The result is the value that the tolerance
    bounds. The oracle runs only if necessary, because float32 within 1e-5 needs no oracle.
    """
    if dtype == torch.float32:
        distance = {name: relative_error(ours[name], theirs[name]) for name in theirs}
        if max(distance.values()) <= RELATIVE_TOLERANCE:
            counts.add(max(distance.values()), True, what)
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
    counts.add(worst, not problems, f"{what}: {'; '.join(problems[:2])}")


def policy_counts(dtype: torch.dtype) -> CheckCounts:
    if dtype == torch.float32:
        return CheckCounts("relative", "1e-5 (or 2x HF's own)")
    return CheckCounts("x HF's error", "1.01")


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32)


def layouts(count: int, seed: int, device: torch.device) -> CheckCounts:
    """Check random layouts on a small tower, with exact orders and segments, and values within the
    tolerance."""
    config = replace(
        SMALL, depth=2, num_heads=1, hidden_size=80, intermediate_size=37, out_hidden_size=8,
        fullatt_block_indexes=(1,),
    )  # fmt: skip
    tensors, counts = peaked_tensors(config, seed), policy_counts(torch.float32)
    ours, theirs = build_tower(tensors, config), hf_tower(tensors, config)
    for case in range(count):
        generator = random.Random(f"{seed} {case}")
        grids = random_grids(generator, generator.choice((1, 50, 200, 400)))
        layout = layout_for(grids, config)
        try:
            assert_equals_transformers(layout, grids, config.window_px)
        except AssertionError:
            counts.add(math.inf, False, f"{grids}: orders or segments differ")
            continue
        is_still = all(t == 1 for t, _, _ in grids)
        pixels = random_pixels(n_patches(grids), case) if is_still else None
        rows = (
            random_rows(n_patches(grids), case) if pixels is None else pixel_rows(pixels, MEAN, STD)
        )
        stage_by_stage(
            counts, torch.float32,
            trace_of(ours, rows if pixels is None else pixels, grids, layout=layout),
            hf_trace(theirs, rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), grids,
        )  # fmt: skip
    return counts


def unpublished(count: int, seed: int) -> Iterator[VisionConfig]:
    """Yield architectures that no checkpoint has, with all heads, head dims and windows."""
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
    """Check other heads, head dims, windows, MLP sizes and mixes of full and window blocks."""
    counts = policy_counts(dtype)
    for case, config in enumerate(unpublished(count, seed)):
        grids = random_grids(random.Random(f"{seed} {case}"), 300)
        tensors = peaked_tensors(config, seed + case)
        if dtype == torch.bfloat16:
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        rows = random_rows(n_patches(grids), case).to(device)
        stage_by_stage(
            counts, dtype,
            trace_of(build_tower(tensors, config, dtype=dtype, device=device), rows, grids),
            hf_trace(hf_tower(tensors, config, dtype, device), rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), config,
        )  # fmt: skip
    return counts


@cache
def tiny() -> tuple[dict[str, Tensor], VisionConfig]:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    return dict(encoder.checkpoint.tensors), encoder.config


def scaled(tensors: dict[str, Tensor], part: str, rows: slice, by: float) -> dict[str, Tensor]:
    """Return the weights with some rows multiplied, in tensors whose name contains `part`."""
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
        # The softmax is uniform, so attention returns the mean of the values.
        ", equal keys": scaled(tensors, ".qkv.", slice(C, 2 * C), 0.0),
        ", huge activations": scaled(tensors, ".down_proj.", everything, 2.0**13),
    }
    if dtype == torch.float32:  # in bf16, rounding selects the largest score
        towers[", scores times 16"] = scaled(tensors, ".qkv.", slice(0, C), 16.0)
    return towers


def adversarial_inputs() -> dict[str, Tensor]:
    """Return uint8 pixels (N, 588) or float rows (N, 1176) of one image of 30 x 46 patches."""
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
    """Check constant, saturated and huge inputs on weights/tiny and on towers with odd weights. A
    constant image repeats one token and has too few independent values for a useful ratio of two
    bf16 errors. In bf16, the tolerance therefore applies to each stage's geometric mean over all
    cases.
    """
    config, grids = tiny()[1], [(1, 30, 46)]
    counts, ratios = policy_counts(dtype), defaultdict[str, list[float]](list)
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
            stage_by_stage(counts, dtype, ours, theirs, truth, what)
            continue
        counts.add(0.0, all(bool(values.isfinite().all()) for values in ours.values()), what)
        for stage, right in truth().items():
            error, reference = (relative_error(t[stage], right) for t in (ours, theirs))
            if reference > 0:  # for black pixels, both results can be exact
                ratios[stage].append(error / reference)
    for stage, found in ratios.items():
        mean = math.exp(sum(math.log(max(ratio, 1e-3)) for ratio in found) / len(found))
        counts.worst = max(counts.worst, mean)
        if not mean <= MAX_BF16_RATIO:
            counts.failures.append(f"{stage}: {mean:.3f} in the mean, {max(found):.3f} at most")
    return counts


def photographs(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> CheckCounts:
    """Compare every photograph of the project with `qwen-vit compare`, on weights/tiny."""
    encoder = VisionEncoder.from_pretrained(TINY_FOLDER, device=device, dtype=dtype)
    counts = policy_counts(dtype)
    images = [str(IMAGES / name) for name in PHOTOGRAPHS[:count]]
    done = compare(encoder, images)
    for name, error in done.skipped:
        counts.add(math.inf, False, f"{name}: {error}")
    for image in done.images:
        worst = max(stage.verdict.measured for stage in image.stages)
        counts.add(worst, not image.problems, f"{image.id}: {image.problems[:2]}")
    return counts


def weight_faults(count: int, seed: int, device: torch.device) -> CheckCounts:
    """Check that the comparison finds a fault in any tensor of weights/tiny, at the right stage."""
    counts = CheckCounts("x the tolerance, at least", "1")
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
            counts.add(0.0, holds, f"{fault} in {fault.stage}: found in {named}")
    counts.worst = least
    return counts


def published_shapes(
    count: int, seed: int, device: torch.device, dtype: torch.dtype
) -> CheckCounts:
    """Check every stage of every published shape, with random weights and ten odd sizes."""
    counts, grids = policy_counts(dtype), INPUTS["ten odd sizes"]
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
            counts, dtype, trace_of(ours, pixels, grids),
            hf_trace(hf_tower(tensors, config, dtype, device), rows, grids),
            partial(vision_oracle, tensors, config, rows, grids), name,
        )  # fmt: skip
    return counts
