"""Record Hugging Face's fp32 stages for weights/tiny, or report their error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen_vit.compare.tolerance import RELATIVE_TOLERANCE
from tests.support import IMAGES
from tests.support.goldens import (
    GOLDEN_FOLDER,
    TINY_FOLDER,
    Golden,
    golden_names,
    load_golden,
    patch_pixels,
    read_rgb,
    resized,
    save_golden,
    sha256,
)
from tests.support.huggingface import hf_tower, hf_trace
from tests.support.oracle import Trace, read_checkpoint, relative_error, vision_oracle
from tests.support.towers import GridTuple

ATTENTION = "sdpa"
MAX_BYTES = 3_000_000


@dataclass(frozen=True, slots=True)
class Crop:
    """Return a photograph's pixels without a resize, because the rounding of a resize could
    change."""

    image: str
    top: int
    left: int
    height: int
    width: int

    def rgb(self, images: Path) -> np.ndarray:
        whole = read_rgb(images / self.image)
        return whole[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, slots=True)
class Resized:
    """Resize a whole photograph to a small size."""

    image: str
    height: int
    width: int

    def rgb(self, images: Path) -> np.ndarray:
        return resized(read_rgb(images / self.image), self.height, self.width)


@dataclass(frozen=True, slots=True)
class RandomClip:
    """Return noise of t x h x w patches, whose two frames in a patch differ."""

    seed: int
    t: int
    h: int
    w: int

    def pixels(self) -> Tensor:
        shape = (self.t * self.h * self.w, 1176)
        noise = np.random.default_rng(self.seed).bytes(shape[0] * shape[1])
        return torch.from_numpy(np.frombuffer(noise, np.uint8).reshape(shape).copy())


Part = Crop | Resized | RandomClip

# Windows have 8x8 patches. 22, 14 and 6 rows and 10 columns all leave partial windows.
CASES: dict[str, tuple[Part, ...]] = {
    "smallest_2x2": (Crop("astronaut.png", 84, 196, 28, 28),),
    "photograph_6x10": (Resized("chelsea.png", 84, 140),),
    "photograph_22x16": (Crop("astronaut.png", 0, 112, 308, 224),),
    "clip_3x6x10": (RandomClip(1, 3, 6, 10),),
    "mixed": (
        Crop("chelsea.png", 84, 140, 28, 28),
        RandomClip(2, 2, 6, 4),
        Resized("astronaut.png", 140, 196),
    ),
}


def case_pixels(parts: tuple[Part, ...], images: Path) -> tuple[Tensor, tuple[GridTuple, ...]]:
    """Return pixels and grids. If the batch has a clip, stills get a second frame."""
    pixels, grids = [], []
    for part in parts:
        if isinstance(part, RandomClip):
            grid, patches = (part.t, part.h, part.w), part.pixels()
        else:
            patches, grid = patch_pixels(part.rgb(images))
        pixels.append(patches)
        grids.append(grid)
    if any(isinstance(part, RandomClip) for part in parts):
        pixels = [two_frames(patches) for patches in pixels]
    return torch.cat(pixels), tuple(grids)


def two_frames(pixels: Tensor) -> Tensor:
    if pixels.shape[1] == 1176:
        return pixels
    return pixels.view(len(pixels), 3, 1, 196).expand(-1, -1, 2, -1).reshape(len(pixels), 1176)


def check_against_processor(golden: Golden, parts: tuple[Part, ...], images: Path) -> float:
    """Return the largest difference between our rows and the rows of Hugging Face's Pillow
    processor."""
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    worst, start = 0.0, 0
    for part, (t, h, w) in zip(parts, golden.grids, strict=True):
        rows = golden.rows[start : start + t * h * w]
        start += t * h * w
        if isinstance(part, RandomClip):
            continue
        theirs = processor(images=[part.rgb(images)], return_tensors="pt")
        if theirs["image_grid_thw"].tolist() != [[t, h, w]]:
            raise SystemExit(f"{golden.name}: the processor's grid is not {(t, h, w)}")
        worst = max(worst, float((theirs["pixel_values"] - rows).abs().max()))
    if worst > 1e-6:
        raise SystemExit(f"{golden.name}: rows differ from the processor's by {worst:.1e}")
    return worst


def weight_hashes() -> dict[str, str]:
    return {name: sha256(TINY_FOLDER / name) for name in ("config.json", "model.safetensors")}


def golden_stages(config: Any) -> tuple[str, ...]:
    blocks = range(config.depth)
    first_full = min(config.fullatt_block_indexes)
    first_window = min(i for i in blocks if i not in config.fullatt_block_indexes)
    shown = dict.fromkeys(f"block.{i}" for i in (first_window, first_full, config.depth - 1))
    return ("patch_embed", *shown, "merger")


def record(images: Path) -> None:
    tensors, config = read_checkpoint(TINY_FOLDER)
    tower, stages = hf_tower(tensors, config, attn=ATTENTION), golden_stages(config)
    GOLDEN_FOLDER.mkdir(exist_ok=True)
    for name, parts in CASES.items():
        pixels, grids = case_pixels(parts, images)
        bare = Golden(name, pixels, grids, {}, {})
        difference = check_against_processor(bare, parts, images)
        full = hf_trace(tower, bare.rows, grids)
        trace = {stage: full[stage] for stage in stages}
        names = sorted({part.image for part in parts if not isinstance(part, RandomClip)})
        facts = {
            "attention": ATTENTION,
            "device": "cpu",
            "dtype": "float32",
            "grids": grids,
            "images_sha256": {image: sha256(images / image) for image in names},
            "inputs": [repr(part) for part in parts],
            "pixels_sha256": sha256(pixels.numpy().tobytes()),
            "processor": "Qwen2VLImageProcessorPil, rows within 1e-6" if names else "none: noise",
            "stages": stages,
            "versions": {
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "weights_sha256": weight_hashes(),
        }
        path = save_golden(Golden(name, pixels, grids, trace, facts))
        click.echo(f"{path.name}: {path.stat().st_size:,} bytes, processor {difference:.1e} away")
    total = sum(path.stat().st_size for path in GOLDEN_FOLDER.glob("*.safetensors"))
    click.echo(f"all: {total:,} bytes of at most {MAX_BYTES:,}")
    if total > MAX_BYTES:
        raise SystemExit("the goldens are too large: take smaller grids")


def stage_drift(now: Trace, golden: Golden, oracle: Trace) -> bool:
    """Print each stage's drift and budget. Return whether all stages are within the budget."""
    within = True
    for stage, then in golden.trace.items():
        drift = relative_error(now[stage], then)
        error, error_now = (relative_error(x, oracle[stage]) for x in (then, now[stage]))
        # Use the smaller of the two errors, so that a drift cannot raise its own budget.
        budget = max(RELATIVE_TOLERANCE, 2 * min(error, error_now))
        verdict = "ok" if drift <= budget else "DRIFTED"
        click.echo(
            f"  {stage:<12} drift {drift:.1e} of {budget:.1e}   "
            f"(against float64: golden {error:.1e}, now {error_now:.1e})  {verdict}"
        )
        within &= drift <= budget
    return within


def check(images: Path) -> bool:
    """Recompute every golden file with the installed packages. Return whether no stage drifted."""
    tensors, config = read_checkpoint(TINY_FOLDER)
    tower, within = hf_tower(tensors, config, attn=ATTENTION), True
    if golden_names() != sorted(CASES):
        click.echo(
            f"tests/golden contains {golden_names()}, expected {sorted(CASES)}; record again"
        )
        return False
    for name, parts in CASES.items():
        golden = load_golden(name)
        versions = golden.facts["versions"]
        click.echo(
            f"{name}: made with torch {versions['torch']}, transformers {versions['transformers']}"
        )
        if golden.facts["weights_sha256"] != weight_hashes():
            click.echo(
                "  weights/tiny has changed since then: run python -m tools.make_golden again"
            )
            within = False
        pixels, grids = case_pixels(parts, images)
        if grids != golden.grids or not torch.equal(pixels, golden.pixels):
            click.echo("  the photographs now give other pixels: check the images and Pillow")
            within = False
        oracle = vision_oracle(tensors, config, golden.rows, golden.grids)
        within &= stage_drift(hf_trace(tower, golden.rows, golden.grids), golden, oracle)
    return within


@click.command()
@click.option(
    "--check", "only_check", is_flag=True, help="Recompute and report without writing files."
)
@click.option("--images", type=click.Path(path_type=Path, exists=True), default=IMAGES)
def main(only_check: bool, images: Path) -> None:
    """Write tests/golden/*.safetensors. With --check, exit with 1 if a stage exceeds its budget."""
    if not only_check:
        record(images)
    elif not check(images):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
