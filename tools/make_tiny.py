"""Make weights/tiny, a small random tower in the published format that makes mistakes visible.

Plain random weights leave softmax nearly uniform. Then tests cannot detect a wrong rotary
embedding. Therefore this command searches the scale of q and k on photographs, per head and block.
The average of a token's largest softmax weight must be TARGET_PEAK, midway between the least and
the most peaked photograph. Each branch adds a fixed share to the residual stream, so that every
block matters.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support import IMAGES
from tests.support.goldens import MEAN, PHOTOGRAPHS, STD, patch_pixels, photograph
from tests.support.oracle import pixel_rows, vision_oracle
from tests.support.towers import GridTuple
from tools.common import ROOT

TARGET_PEAK = 0.3  # the middle of the desired range, 0.2 to 0.4
STREAM_RMS = 0.03  # after the patch embedding; small, so that RMSNorm's epsilon matters
SEED = 1  # chosen from 0 to 5, for the smallest difference between photographs
QKV_BIAS_RMS = 1.5  # large, so that attention also depends on the position
BRANCH_SHARE = 0.5  # rms of a branch's output, as a share of the stream's rms

DEPTH, HIDDEN, HEADS, OUT = 5, 160, 2, 192
MLP = 428  # 4 mod 8, like the published 3420
MERGE, PATCH_PX, WINDOW_PX = 2, 14, 112
FULL_BLOCKS = (1, 3)  # the last block is a window block, unlike in published towers

VISION = {
    "depth": DEPTH,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_heads": HEADS,
    "in_chans": 3,
    "out_hidden_size": OUT,
    "patch_size": PATCH_PX,
    "spatial_merge_size": MERGE,
    "spatial_patch_size": PATCH_PX,
    "window_size": WINDOW_PX,
    "fullatt_block_indexes": list(FULL_BLOCKS),
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": OUT,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 1003520,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def oracle_config(depth: int) -> SimpleNamespace:
    return SimpleNamespace(
        depth=depth,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        window_px=WINDOW_PX,
        patch_px=PATCH_PX,
        spatial_merge_size=MERGE,
        fullatt_block_indexes=FULL_BLOCKS,
        rope_theta=10000.0,
    )


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Return every tensor by its bare name, in float64, before the search of scales."""
    generator = np.random.default_rng(seed)
    merged = HIDDEN * MERGE**2
    tensors = {}

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape))

    def dense(name: str, outputs: int, inputs: int, bias_rms: float = 0.5) -> None:
        tensors[f"{name}.weight"] = normal(outputs, inputs) / inputs**0.5
        tensors[f"{name}.bias"] = normal(outputs) * bias_rms

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (normal(HIDDEN) * 0.25).exp()

    tensors["patch_embed.proj.weight"] = normal(HIDDEN, 3, 2, 14, 14)
    for i in range(DEPTH):
        norm(f"blocks.{i}.norm1")
        norm(f"blocks.{i}.norm2")
        dense(f"blocks.{i}.attn.qkv", 3 * HIDDEN, HIDDEN, QKV_BIAS_RMS)
        dense(f"blocks.{i}.attn.proj", HIDDEN, HIDDEN)
        dense(f"blocks.{i}.mlp.gate_proj", MLP, HIDDEN)
        dense(f"blocks.{i}.mlp.up_proj", MLP, HIDDEN)
        dense(f"blocks.{i}.mlp.down_proj", HIDDEN, MLP)
    norm("merger.ln_q")
    dense("merger.mlp.0", merged, merged)
    dense("merger.mlp.2", OUT, merged)
    return tensors


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def peak_by_photograph(largest: Tensor, grids: list[GridTuple]) -> Tensor:
    """Return the mean of the largest softmax weights (N, H) by photograph and head."""
    return torch.stack([x.mean(0) for x in largest.split([t * h * w for t, h, w in grids])])


def coarse(scale: float) -> float:
    """Round to three significant digits, because sums differ in the last bit between machines."""
    return float(f"{scale:.3g}")


class Calibration:
    """Scale the tensors for weights/tiny in place, block by block."""

    def __init__(self, tensors: dict[str, Tensor], rows: Tensor, grids: list[GridTuple]) -> None:
        self.tensors, self.rows, self.grids = tensors, rows, grids

    def scale(self, name: str, factor: float) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in self.tensors:
                self.tensors[f"{name}.{kind}"] *= coarse(factor)

    def run(self, depth: int, changed: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the last stage before the merger, and the last block's largest softmax weights."""
        # Measure with the stored weights, which are rounded to bf16.
        tensors = {k: v.bfloat16() for k, v in (self.tensors | (changed or {})).items()}
        peaks: list[Tensor] = [torch.empty(0)]
        trace = vision_oracle(tensors, oracle_config(depth), self.rows, self.grids, peaks=peaks)
        return list(trace.values())[-2], peaks[-1]

    def calibrate(self) -> None:
        self.scale("patch_embed.proj", STREAM_RMS / rms(self.run(0)[0]))
        for i in range(DEPTH):
            attention, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
            self.calibrate_heads(i)
            self.calibrate_branch(i, f"{attention}.proj", disabled=(f"{mlp}.down_proj",))
            self.calibrate_branch(i, f"{mlp}.down_proj", disabled=())

    def calibrate_heads(self, i: int) -> None:
        """Bisect the scale of q and k of each head until the softmax has the target peak."""
        low, high = torch.full((HEADS,), 0.1), torch.full((HEADS,), 10.0)
        for _ in range(14):
            middle = (low * high).sqrt()
            _, largest = self.run(i + 1, self.scaled_heads(i, middle))
            peaks = peak_by_photograph(largest, self.grids)
            peaks = (peaks.amin(0) + peaks.amax(0)) / 2
            low = torch.where(peaks < TARGET_PEAK, middle, low)
            high = torch.where(peaks < TARGET_PEAK, high, middle)
        factors = torch.tensor([coarse(float(x)) for x in (low * high).sqrt()])
        self.tensors |= self.scaled_heads(i, factors)

    def scaled_heads(self, i: int, factors: Tensor) -> dict[str, Tensor]:
        names = [f"blocks.{i}.attn.qkv.{kind}" for kind in ("weight", "bias")]
        scale = torch.stack((factors, factors, torch.ones_like(factors)))  # q, k, v by head
        rows = scale.double().flatten().repeat_interleave(HIDDEN // HEADS)
        return {
            name: (self.tensors[name].mT * rows).mT.contiguous()
            if self.tensors[name].ndim == 2
            else self.tensors[name] * rows
            for name in names
        }

    def calibrate_branch(self, i: int, name: str, disabled: tuple[str, ...]) -> None:
        """Scale one output projection until the branch adds BRANCH_SHARE of the stream."""

        def stream(*without: str) -> Tensor:
            zeros = {
                f"{other}.{kind}": torch.zeros_like(self.tensors[f"{other}.{kind}"])
                for other in without
                for kind in ("weight", "bias")
            }
            return self.run(i + 1, zeros)[0]

        before = stream(name, *disabled)
        self.scale(name, BRANCH_SHARE * rms(before) / rms(stream(*disabled) - before))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "weights" / "tiny")
@click.option("--seed", type=int, default=SEED, show_default=True)
@click.option("--images", type=click.Path(path_type=Path, exists=True), default=IMAGES)
def main(out: Path, seed: int, images: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors to OUT."""
    photographs = [patch_pixels(photograph(images / name)) for name in PHOTOGRAPHS]
    rows = pixel_rows(torch.cat([pixels for pixels, _ in photographs]), MEAN, STD)
    grids = [grid for _, grid in photographs]
    calibration = Calibration(random_tensors(seed), rows, grids)
    calibration.calibrate()

    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", CONFIG), ("preprocessor_config", PREPROCESSOR)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tensors = {f"visual.{k}": v.bfloat16().contiguous() for k, v in calibration.tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read it

    bare = {name.removeprefix("visual."): tensor for name, tensor in tensors.items()}
    peaks: list[Tensor] = []
    trace = vision_oracle(bare, oracle_config(DEPTH), rows, grids, peaks=peaks)
    names = "".join(f"{Path(name).stem:>11}" for name in PHOTOGRAPHS)
    click.echo(f"largest softmax weight, mean\nblock  attention   all{names}   rms of the stream")
    for i, peak in enumerate(peaks):
        kind = "full" if i in FULL_BLOCKS else "window"
        each = "".join(f"{x:11.3f}" for x in peak_by_photograph(peak, grids).mean(1).tolist())
        click.echo(f"{i:>5}  {kind:<9} {peak.mean():.3f}{each} {rms(trace[f'block.{i}']):19.3f}")
    size = (out / "model.safetensors").stat().st_size
    click.echo(f"{out}: {len(tensors)} tensors, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
