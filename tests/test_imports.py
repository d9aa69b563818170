"""Imports point downwards, what is banned is found, and importing the package touches nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen_vit"
CHECK = ROOT / "tools" / "check_imports"


def check_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "qwen_vit"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_package_keeps_to_its_directions() -> None:
    checked = check_imports(PACKAGE)
    assert (checked.returncode, checked.stdout) == (0, "")


# file, what is planted at its end, the word of the message that names it
PLANTED = (
    ("config.py", "import qwen_vit.encoder", "config imports encoder, which is above it"),
    ("layout.py", "from qwen_vit.model import VisionTower", "layout imports model, which is above"),
    ("layout.py", "from qwen_vit import model", "layout imports model, which is above"),
    ("layout.py", "from .model import VisionTower", "layout imports model, which is above"),
    (
        "layout.py",
        "def f():\n    import qwen_vit.cli.main",
        "layout imports cli, which is above it",
    ),
    ("encoder.py", "from qwen_vit import __version__", "encoder imports __init__, which is above"),
    (
        "kernels/attention.py",
        "import qwen_vit.encoder",
        "kernels imports encoder, which is above it",
    ),
    ("errors.py", "from qwen_vit.config import Grid", "imports in a circle: "),
    ("layout.py", "import qwen_vit.lay_out", "imports qwen_vit.lay_out, which is not there"),
    ("helpers.py", "", "helpers has no place"),
    ("model.py", "import triton.language as tl", "imports triton, which only kernels may"),
    (
        "encoder.py",
        "from huggingface_hub import HfApi",
        "imports huggingface_hub, which only check",
    ),
    ("integrations/hf.py", "import transformers", "imports transformers at module level"),
    ("integrations/hf.py", "if 1:\n    import torchvision", "imports torchvision at module level"),
    ("images/load.py", "def f():\n    import transformers", "imports transformers, which only"),
    (
        "images/load.py",
        "import importlib\nimportlib.import_module('triton')",
        "imports triton, which",
    ),
    ("images/load.py", "import pickle", "imports pickle"),
    ("checkpoint/load.py", "import torch\ntorch.load('x')", "torch.load"),
    ("checkpoint/load.py", "from torch import load", "torch.load"),
    ("checkpoint/load.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
    ("model.py", "F.scaled_dot_product_attention(q, k, v)", "scaled_dot_product_attention"),
    ("model.py", "from torch.nn.attention import flex_attention", "flex_attention"),
    ("model.py", "import flash_attn_interface", "flash_attn_interface"),
    ("model.py", "getattr(F, '_flash_attention_forward')", "_flash_attention_forward"),
    ("model.py", "nn.MultiheadAttention(8, 1)", "MultiheadAttention"),
    ("images/patches.py", "assert True", "assert"),
    ("images/patches.py", "try:\n    x = 1\nexcept:\n    x = 2", "bare except"),
)


@pytest.mark.parametrize(("file", "planted", "message"), PLANTED, ids=lambda text: text[:40])
def test_a_planted_violation_is_found_with_its_line(
    copy: Path, file: str, planted: str, message: str
) -> None:
    path = copy / file
    before = path.read_text().rstrip("\n") + "\n" if path.exists() else ""
    path.write_text(before + planted + "\n")
    checked = check_imports(copy)
    first = len(before.splitlines()) + 1
    lines = range(first, first + 1 + planted.count("\n"))
    assert checked.returncode == 1
    found = [line for line in checked.stdout.splitlines() if message in line]
    assert any(re.match(rf"{re.escape(str(path))}:(\d+): ", line) for line in found), checked.stdout
    if "circle" not in message:  # a circle is reported at whichever import of it comes first
        assert int(found[0].removeprefix(f"{path}:").partition(":")[0]) in lines


def test_what_is_allowed_is_not_reported(copy: Path) -> None:
    before = check_imports(copy).stdout
    with (copy / "integrations/hf.py").open("a") as file:
        file.write('\n\ndef f():\n    import transformers\n    """assert, pickle, flash_attn."""\n')
    assert check_imports(copy).stdout == before


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    checked = check_imports(tmp_path)
    assert checked.returncode == 2
    assert "is no package" in checked.stderr


# What the package is built on is imported first: what those libraries do is theirs.
WATCH = """
import json, os, sys, threading, warnings
import click, einops, huggingface_hub.errors, numpy, packaging.version, PIL.Image, PIL.ImageFile
import safetensors.torch, torch, tqdm, triton, triton.language
import triton.runtime.interpreter, triton.tools.tensor_descriptor

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "threads": threading.active_count(),
        "torch": [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.initial_seed(), torch.cuda.is_initialized(),
        ],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "jit": triton.knobs.runtime.interpret,
    }

WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.putenv")
events = []
sys.addaudithook(lambda name, _: events.append(name) if name.startswith(WATCHED) else None)
before, there = state(), set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    import qwen_vit
    from qwen_vit import *  # each name's own module, too
print(json.dumps({
    "before": before, "after": state(), "events": events, "file": qwen_vit.__file__,
    "warnings": [str(warning.message) for warning in caught],
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - there}),
}))
"""


def test_importing_touches_no_gpu_network_or_environment() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WATCH],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)  # and so nothing else was printed
    assert Path(seen["file"]).parent == PACKAGE
    assert seen["after"] == seen["before"]
    assert seen["events"] == seen["warnings"] == []
    assert not {"transformers", "torchvision"} & set(seen["new"])


UNKNOWN_TRITON = """
import sys
import triton
triton.__version__ = "9.9.0"
for name in ("hopper", "linear_hopper", "attention_hopper"):
    sys.modules[f"qwen_vit.kernels.{name}"] = None  # importing it fails
import numpy as np
from qwen_vit import VisionEncoder
encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
print(encoder.encode([np.zeros((56, 84, 3), np.uint8)])[0].embeds.shape)
"""


def test_a_triton_whose_lower_level_is_unknown_serves_without_it() -> None:
    """Gluon is experimental: a Triton to come may change it, or do without."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN_TRITON],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([6, 192])"
