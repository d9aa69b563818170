"""Read golden files with Hugging Face's fp32 stages for fixed pixels, and compare results with
them.

A golden is one safetensors file: `pixels` (uint8, grid order: (N, 588) for stills, whose two
frames are equal, or (N, 1176)), `grids` (S, 3), and the stages by the oracle's names. Its
metadata is one key of sorted JSON: safetensors writes several keys in random order.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_vit.compare import tolerance as differences
from qwen_vit.compare.oracle import Trace
from qwen_vit.compare.tolerance import MAX_FP32_ERROR, RELATIVE_TOLERANCE, relative_error
from qwen_vit.model import VisionTower
from tests.support import ROOT
from tests.support.oracle import pixel_rows
from tests.support.towers import GridTuple, build_tower

GOLDEN_FOLDER = ROOT / "tests" / "golden"
TINY_FOLDER = ROOT / "weights" / "tiny"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "rocket.jpg")
PATCH_PX, MERGE = 14, 2
FACTOR_PX = PATCH_PX * MERGE
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Golden:
    name: str
    pixels: Tensor
    grids: tuple[GridTuple, ...]
    trace: Trace
    facts: dict[str, Any]

    @property
    def rows(self) -> Tensor:
        """Return the float rows (N, 1176), which were the input of Hugging Face's tower."""
        return pixel_rows(self.pixels, MEAN, STD)


def golden_names() -> list[str]:
    return sorted(path.stem for path in GOLDEN_FOLDER.glob("*.safetensors"))


def load_golden(name: str) -> Golden:
    with safe_open(GOLDEN_FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
        facts = json.loads(file.metadata()["golden"])
    pixels, grids = tensors.pop("pixels"), tensors.pop("grids")
    trace = {stage: tensors[stage] for stage in facts["stages"]}
    return Golden(name, pixels, tuple(map(tuple, grids.tolist())), trace, facts)


def save_golden(golden: Golden) -> Path:
    path = GOLDEN_FOLDER / f"{golden.name}.safetensors"
    tensors = {"pixels": golden.pixels, "grids": torch.tensor(golden.grids), **golden.trace}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"golden": json.dumps(golden.facts, sort_keys=True)})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    return path


@cache
def tiny_tower() -> VisionTower:
    """Return the package's own tower with the packaged weights."""
    return build_tower(TINY_FOLDER)


def sha256(data: bytes | Path) -> str:
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()


def patch_pixels(rgb: np.ndarray) -> tuple[Tensor, GridTuple]:
    """Convert RGB uint8 (height, width, 3), with sides in multiples of 28, to pixels (N, 588) and
    the grid."""
    height, width, _ = rgb.shape
    patches = rearrange(
        np.ascontiguousarray(rgb),
        "(h mh ph) (w mw pw) c -> (h w mh mw) (c ph pw)",
        mh=MERGE,
        mw=MERGE,
        ph=PATCH_PX,
        pw=PATCH_PX,
    )
    return torch.from_numpy(patches.copy()), (1, height // PATCH_PX, width // PATCH_PX)


def read_rgb(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def resized(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    bicubic = Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(rgb).resize((width, height), bicubic))


def photograph(path: Path) -> np.ndarray:
    """Return RGB uint8 with each side at the nearest multiple of 28."""
    rgb = read_rgb(path)
    height, width = (round(side / FACTOR_PX) * FACTOR_PX for side in rgb.shape[:2])
    return resized(rgb, height, width)


def fp32_budget(reference: Tensor, oracle: Tensor) -> float:
    """Return the tolerance of an fp32 tower against Hugging Face's tower. An error above all
    rounding means that the reference is wrong, and must not raise the tolerance.
    """
    error = relative_error(reference, oracle)
    if not error <= MAX_FP32_ERROR:
        raise AssertionError(
            f"the reference is {error:.1e} from the float64 oracle, expected at most "
            f"{MAX_FP32_ERROR:.0e}: it is not the same model on the same input"
        )
    return differences.fp32_budget(error)


def assert_stages_close(
    trace: Mapping[str, Tensor],
    golden: Golden | Mapping[str, Tensor],
    tolerance: float | Mapping[str, float] = RELATIVE_TOLERANCE,
) -> None:
    """Compare every stage of the golden file, and print the error and the tolerance of each stage.

    >>> assert_stages_close({"merger": torch.ones(2, 3)}, {"merger": torch.ones(2, 3)})
    merger        0.00e+00 of 1.0e-05
    """
    expected = golden.trace if isinstance(golden, Golden) else golden
    failed = []
    for stage, theirs in expected.items():
        allowed = tolerance if isinstance(tolerance, float) else tolerance[stage]
        error = relative_error(trace[stage].cpu(), theirs.cpu())
        line = f"{stage:<12}  {error:.2e} of {allowed:.1e}"
        print(line)
        if not error <= allowed:
            failed.append(line)
    if failed:
        raise AssertionError("stages beyond their tolerance:\n" + "\n".join(failed))
