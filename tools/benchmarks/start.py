"""Measure the seconds from a process's start to the first embedding."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from tools.common import ROOT

WARM_STARTS = 3


# A user's first lines. Each prints the seconds since the start of the process.
FIRST_LINES = """
import json, sys, time
begin = float(sys.argv[1])
done = {"python": time.monotonic() - begin}
import numpy as np
import torch
from qwen_vit import VisionEncoder
done["imports"] = time.monotonic() - begin
encoder = VisionEncoder.from_pretrained(sys.argv[2], device=sys.argv[3])
if sys.argv[3] == "cuda":
    torch.cuda.synchronize()
done["load"] = time.monotonic() - begin
image = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
[features] = encoder.encode([image])
features.embeds.cpu()
done["first embedding"] = time.monotonic() - begin
[features] = encoder.encode([image])
features.embeds.cpu()
done["second"] = time.monotonic() - begin
print(json.dumps(done))
"""


def start_once(folder: Path, device: str, cache: Path) -> dict[str, float]:
    """Return the seconds from starting a Python process until each of FIRST_LINES has run."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIRST_LINES, str(time.monotonic()), str(folder), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"a first embedding failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def starts(folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Measure starts with an empty and with a filled Triton cache, as medians."""
    for path in folder.iterdir():
        path.read_bytes()  # fills the page cache
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", *["warm"] * WARM_STARTS):
            runs.append(start_once(folder, device, Path(cache)))
            print(kind, runs[-1], file=sys.stderr)
    cold, *warm = runs
    return {
        "cold": cold,
        "warm": {name: statistics.median(run[name] for run in warm) for name in cold},
    }
