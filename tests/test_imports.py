"""Test that the import contracts find violations, and that importing the package has no effect."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "qwen_vit"
PROGRAMS = Path(sys.executable).parent
OTHER_ATTENTION = re.compile(
    "scaled_dot_product|flash_?attn|flash_?attention|flex_?attention|efficient_?attention"
    "|multi_?head_?attention|xformers|sageattention",
    re.IGNORECASE,
)
# These modules import public names and commands by name, at the first use.
MAY_IMPORT_BY_NAME = {PACKAGE / "__init__.py", PACKAGE / "cli" / "main.py"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the package and its settings, to inject faults."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "qwen_vit", ignore=ignored)
    return tmp_path


def run(folder: Path, *command: str) -> tuple[int, str]:
    """Return the exit code and the output of a program of this environment, with lines of any
    length."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "1000"}
    done = subprocess.run(
        [str(PROGRAMS / command[0]), *command[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def append(path: Path, text: str) -> int:
    """Add lines to a new or existing file, and return the number of the first line."""
    before = path.read_text().rstrip("\n") + "\n" if path.exists() else ""
    path.write_text(before + text + "\n")
    return len(before.splitlines()) + 1


DIRECTIONS, CYCLES = "Imports point downwards", "No cycles, at any depth"
PUBLIC = "The public names are above every module but the command line"
PLACES = "Third parties have a place of their own"
ALONE = "The package runs without its tests and tools"
# (file, lines to append, the broken contract, a part of the report)
BROKEN = (
    ("config.py", "import qwen_vit.encoder", DIRECTIONS, "config -> qwen_vit.encoder"),
    ("layout.py", "from qwen_vit.model import VisionTower", DIRECTIONS, "layout -> qwen_vit.model"),
    ("layout.py", "from qwen_vit import model", DIRECTIONS, "layout -> qwen_vit.model"),
    ("layout.py", "from .model import VisionTower", DIRECTIONS, "layout -> qwen_vit.model"),
    ("layout.py", "def f():\n    import qwen_vit.cli.main", DIRECTIONS, "-> qwen_vit.cli.main"),
    ("kernels/attention.py", "import qwen_vit.encoder", DIRECTIONS, "kernels.attention -> "),
    ("errors.py", "from qwen_vit.config import Grid", DIRECTIONS, "errors -> qwen_vit.config"),
    ("common/tensors.py", "from qwen_vit.layout import Layout", DIRECTIONS, "common.tensors -> "),
    ("encoder.py", "from qwen_vit.downstream import to_hf", DIRECTIONS, "-> qwen_vit.downstream"),
    ("helpers.py", "", DIRECTIONS, "helpers"),
    ("images/load.py", "import qwen_vit.inputs.listing", CYCLES, ".images"),
    ("compare/tolerance.py", "import qwen_vit.compare.run", CYCLES, ".run"),
    ("encoder.py", "from qwen_vit import __version__", PUBLIC, "qwen_vit.encoder -> qwen_vit"),
    ("model.py", "import triton.language as tl", PLACES, "qwen_vit.model -> triton"),
    ("encoder.py", "from huggingface_hub import HfApi", PLACES, "encoder -> huggingface_hub"),
    ("images/load.py", "def f():\n    import transformers", PLACES, "load -> transformers"),
    ("export/run.py", "def f():\n    import torchvision", PLACES, "run -> torchvision"),
    ("compare/run.py", "def f():\n    import pyarrow.parquet", PLACES, "run -> pyarrow"),
    ("inputs/listing.py", "def f():\n    import ray", PLACES, "listing -> ray"),
    ("features.py", "def f():\n    from matplotlib import pyplot", PLACES, "-> matplotlib"),
    ("cli/info.py", "def f():\n    import jinja2", PLACES, "info -> jinja2"),
    ("model.py", "from tests.support import towers", ALONE, "qwen_vit.model -> tests"),
)


def test_the_package_keeps_its_contracts() -> None:
    code, output = run(ROOT, "lint-imports", "--no-cache", "--no-logo")
    assert code == 0, output
    for contract in (DIRECTIONS, CYCLES, PUBLIC, PLACES, ALONE):
        assert f"{contract} KEPT" in output


@pytest.mark.parametrize(("file", "added", "contract", "named"), BROKEN, ids=lambda text: text[:40])
def test_an_import_that_breaks_a_contract_is_found(
    copy: Path, file: str, added: str, contract: str, named: str
) -> None:
    append(copy / "qwen_vit" / file, added)
    code, output = run(copy, "lint-imports", "--no-cache", "--no-logo")
    assert code == 1, output
    assert f"{contract} BROKEN" in output
    assert named in output


# (file, lines to append, the broken rule, a part of the message)
BANNED = (
    ("integrations/hf.py", "import transformers", "TID253", "transformers"),
    ("integrations/hf.py", "import torchvision.transforms", "TID253", "torchvision"),
    ("compare/report.py", "from jinja2 import Template", "TID253", "jinja2"),
    ("compare/report.py", "import matplotlib.pyplot", "TID253", "matplotlib"),
    ("export/manifest.py", "import pyarrow", "TID253", "pyarrow"),
    ("export/ray_cluster.py", "import ray", "TID253", "ray"),
    ("images/load.py", "import pickle", "TID251", "no pickle"),
    ("images/load.py", "def f():\n    from marshal import loads", "TID251", "no pickle"),
    ("inputs/listing.py", "import cloudpickle, dill, joblib, shelve", "TID251", "no pickle"),
    ("checkpoint/load.py", "import torch\ntorch.load('x')", "TID251", "no pickle"),
    ("checkpoint/load.py", "from torch import load", "TID251", "no pickle"),
    ("model.py", "from torch.nn import attention", "TID251", "the only attention"),
    ("model.py", "from torch.nn.attention import flex_attention", "TID251", "the only attention"),
    ("model.py", "import flash_attn_interface", "TID251", "the only attention"),
    ("model.py", "from flash_attn import flash_attn_func", "TID251", "the only attention"),
    ("model.py", "import xformers.ops", "TID251", "the only attention"),
    ("model.py", "torch.nn.MultiheadAttention(8, 1)", "TID251", "the only attention"),
    (
        "model.py",
        "import torch.nn.functional as F\nF.scaled_dot_product_attention(q, k, v)",
        "TID251",
        "the only attention",
    ),
    ("layout.py", "from .model import VisionTower", "TID252", "relative"),
    ("images/patches.py", "assert True", "S101", "assert"),
    ("images/patches.py", "try:\n    x = 1\nexcept:\n    x = 2", "E722", "bare `except`"),
)


@pytest.mark.parametrize(("file", "added", "rule", "named"), BANNED, ids=lambda text: text[:40])
def test_a_banned_construct_is_found_with_its_line(
    copy: Path, file: str, added: str, rule: str, named: str
) -> None:
    first = append(copy / "qwen_vit" / file, added)
    code, output = run(copy, "ruff", "check", "--no-cache", "--output-format=concise", "qwen_vit")
    assert code == 1
    found = [line for line in output.splitlines() if f": {rule} " in line]
    assert any(named in line for line in found), output
    lines = {int(line.split(":")[1]) for line in found if line.startswith(f"qwen_vit/{file}:")}
    assert lines
    assert lines <= set(range(first, first + 1 + added.count("\n")))


def test_allowed_code_is_not_reported(copy: Path) -> None:
    path = copy / "qwen_vit" / "integrations" / "hf.py"
    append(path, '\n\ndef f():\n    import transformers\n    """assert, pickle, flash_attn."""\n')
    rules = "--select=E722,S101,TID251,TID252,TID253"
    assert run(copy, "ruff", "check", "--no-cache", "--quiet", rules, "qwen_vit") == (0, "")
    code, output = run(copy, "lint-imports", "--no-cache", "--no-logo")
    assert code == 0, output


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [
        (path, ast.parse(path.read_bytes(), str(path))) for path in sorted(PACKAGE.rglob("*.py"))
    ]


def identifiers(node: ast.AST) -> tuple[str, ...]:
    """Return the names that a node uses or defines, including the strings of getattr."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            return (name,)
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return (name,)
        case ast.Import(names=names):
            return tuple(part for alias in names for part in (alias.name, alias.asname or ""))
        case ast.ImportFrom(module=target, names=names):
            return (target or "", *(alias.name for alias in names))
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
            return (name,)
        case _:
            return ()


def other_attentions(tree: ast.Module) -> list[str]:
    names = (name for node in ast.walk(tree) for name in identifiers(node))
    return [name for name in names if OTHER_ATTENTION.search(name)]


@pytest.mark.parametrize(
    "text",
    [
        "F.scaled_dot_product_attention(q, k, v)",
        "from torch.nn.attention.flex_attention import flex_attention",
        "getattr(F, '_flash_attention_forward')(q)",
        "import vllm.vllm_flash_attn as attend",
        "def flash_attn_func(q): ...",
        "class MultiHeadAttention: ...",
    ],
)
def test_the_name_of_another_attention_is_detected(text: str) -> None:
    assert other_attentions(ast.parse(text))


def test_the_package_names_no_other_attention() -> None:
    assert {path: found for path, tree in trees() if (found := other_attentions(tree))} == {}


def eager_imports(node: ast.AST) -> Iterator[str]:
    """Return the top-level packages of imports outside functions, also in an `if` or a `try`."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(target)):
                yield target.partition(".")[0]
            case _:
                yield from eager_imports(child)


def test_only_imports_outside_functions_are_detected() -> None:
    text = "try:\n  import ray.util\nexcept ImportError:\n  pass\ndef f():\n  import pyarrow"
    assert list(eager_imports(ast.parse(text))) == ["ray"]


def test_optional_packages_are_imported_in_functions_alone() -> None:
    """Ruff's rule checks only a module's own statements, not the body of an `if` or a `try`."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    optional = {*ruff["flake8-tidy-imports"]["banned-module-level-imports"]}
    assert {
        path: found for path, tree in trees() if (found := optional & {*eager_imports(tree)})
    } == {}


def test_no_array_is_read_as_a_pickle() -> None:
    """np.load opens pickles with `allow_pickle`, which a ban on imports does not prevent."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", f"{path}:{node.lineno}"


def test_modules_are_imported_by_name_only_where_the_contracts_need_not_see_it() -> None:
    for path, tree in trees():
        names = {name for node in ast.walk(tree) for name in identifiers(node)}
        found = names & {"import_module", "__import__"}
        assert not found or path in MAY_IMPORT_BY_NAME, path


# Import the package's dependencies first, to exclude their own effects.
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
before, loaded = state(), set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    import qwen_vit
    from qwen_vit import *  # also imports the module of each name
print(json.dumps({
    "before": before, "after": state(), "events": events, "file": qwen_vit.__file__,
    "warnings": [str(warning.message) for warning in caught],
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
}))
"""


@pytest.mark.slow
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
    seen = json.loads(run.stdout)  # fails if the process printed anything else
    assert Path(seen["file"]).parent == PACKAGE
    assert seen["after"] == seen["before"]
    assert seen["events"] == seen["warnings"] == []
    assert not {"transformers", "torchvision"} & set(seen["new"])


UNKNOWN_TRITON = """
import sys
import tomllib
import triton
triton.__version__ = "9.9.0"
for name in ("hopper", "linear_hopper", "attention_hopper"):
    sys.modules[f"qwen_vit.kernels.{name}"] = None  # importing it fails
import numpy as np
from qwen_vit import VisionEncoder
encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
print(encoder.encode([np.zeros((56, 84, 3), np.uint8)])[0].embeds.shape)
"""


def test_the_package_works_with_a_triton_of_unknown_gluon() -> None:
    """Gluon is experimental, so a later Triton may change or remove it."""
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN_TRITON],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([6, 192])"
