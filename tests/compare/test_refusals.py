"""Test that `compare` rejects wrong arguments before any work."""

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.common import transformers_version
from qwen_vit.common.installation import install_command
from qwen_vit.compare import huggingface as reference
from qwen_vit.compare.run import compare
from qwen_vit.errors import ArgumentError
from tests.support.checkpoints import SMALL as SMALL_TOWER
from tests.support.checkpoints import write_checkpoint, write_weights
from tests.support.comparisons import CHELSEA, SMALL, encoder, version_of


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "transformers is not installed. Expected 5.18 or newer, which "),
        ("4.49.0", "transformers 4.49.0 is too old. Expected 5.18 or newer, which "),
    ],
)
def test_the_error_for_a_missing_or_old_transformers_names_the_range_and_the_version(
    run: Any, monkeypatch: pytest.MonkeyPatch, found: str | None, words: str
) -> None:
    monkeypatch.setattr(transformers_version, "version", version_of(transformers=found))
    code, out, err = run(CHELSEA, *SMALL)
    assert (code, out) == (2, "")
    assert words in err
    assert f"Run {install_command('hf')}" in err
    assert "pass a saved golden file with --golden" in err


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="FlashAttention is installed")
def test_an_attention_that_is_not_installed_is_refused_with_the_others() -> None:
    checkpoint = encoder().checkpoint
    with pytest.raises(
        ArgumentError, match=r"rejects attention=.flash_attention_2. .* Use sdpa or eager\."
    ):
        reference.hf_tower(
            checkpoint.tensors, checkpoint.config, torch.bfloat16, attention="flash_attention_2"
        )


def test_a_transformers_that_does_not_import_is_named_with_its_versions(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", None)
    code, out, err = run(CHELSEA, *SMALL)
    assert (code, out) == (2, "")
    assert re.search(r"error: transformers cannot be imported \(.*\) with torch .*\. Install", err)


BAD_USAGE = {
    "no images": (("--model", "tiny"), "IMAGES is empty. Pass at least one image"),
    "both goldens": (
        (CHELSEA, *SMALL, "--golden", "a", "--save-golden", "b"),
        "--golden compares with a file and --save-golden writes one. Expected one of the two. Omit",
    ),
    "no golden": ((*SMALL, "--golden", "none"), "none: does not exist. Expected a golden file"),
    "golden is a folder": ((*SMALL, "--golden", "."), "Expected a golden file"),
    "attention": (
        (CHELSEA, *SMALL, "--attention", "flash_attention_2"),
        "does not support float32",
    ),
    "unknown attention": ((CHELSEA, *SMALL, "--attention", "fast"), "'fast' is not one of"),
    "torchvision": ((CHELSEA, *SMALL, "--processor", "torchvision"), "pass --processor pillow"),
    "report is a file": (
        (CHELSEA, *SMALL, "--report", CHELSEA),
        "a file. Expected a folder for the report. Pass another --report.",
    ),
    "report of a long name": ((CHELSEA, *SMALL, "--report", "r" * 300), "File name too long"),
    "saved golden is a folder": (
        (CHELSEA, *SMALL, "--save-golden", "."),
        ".: a folder. Expected a file to write. Pass another --save-golden.",
    ),
    "report in no folder": (
        (CHELSEA, *SMALL, "--report", "no/page"),
        "no: does not exist. Create the folder first.",
    ),
    "a folder": ((".", *SMALL), "a directory. Expected an image file. Pass its files, such as ./*"),
    "an address": (("s3://bucket/a.png", *SMALL), "an address, not a file. Download it first."),
    "same image twice": (
        (CHELSEA, CHELSEA, *SMALL, "--save-golden", "g"),
        "chelsea.png: given twice. Expected each image once. Omit one of the two.",
    ),
}


@pytest.mark.parametrize("fault", BAD_USAGE)
def test_bad_usage_ends_with_2_before_any_work(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    if fault == "torchvision" and "torchvision" in reference.package_versions():
        pytest.skip("torchvision is installed")
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD_USAGE[fault]
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert words in err
    assert "Traceback" not in err
    assert os.listdir() == []


def test_a_reference_with_values_that_are_not_finite_is_not_saved(run: Any, tmp_path: Path) -> None:
    """With finite weights that overflow, a raw error of the JSON writer once lost all results."""
    tensors = write_checkpoint(tmp_path / "model", SMALL_TOWER, prefix="", dtype=torch.float32)
    for name in ("up", "down"):
        tensors[f"blocks.2.mlp.{name}_proj.weight"] *= 1e30
    write_weights(tmp_path / "model", tensors)
    options = ("--model", str(tmp_path / "model"), "--device", "cpu", "--max-pixels", "30000")
    code, out, err = run(CHELSEA, *options, "--save-golden", str(tmp_path / "golden"))
    assert (code, out) == (2, "")
    assert (
        f"{tmp_path / 'golden'}: not saved: the error of Hugging Face's block.2 of {CHELSEA} is "
        "not finite" in err
    )
    assert not (tmp_path / "golden").exists()
    code, out, _ = run(CHELSEA, *options, "--json")
    stages = json.loads(out)["images"][0]["stages"]
    assert code == 1
    assert next(stage["stage"] for stage in stages if not stage["passed"]) == "block.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": 3}, r"encoder is 3 \(int\)\. Expected a VisionEncoder"),
        ({"images": 3}, r"images is 3 \(int\)\. Expected paths"),
        ({"images": [3]}, r"an item of images is 3 \(int\)\. Expected a path"),
        ({"attention": "fast"}, "attention is 'fast'. Expected 'sdpa', 'eager' or"),
        ({"processor": np.ones(2)}, "processor is array.* Expected 'pillow' or 'torchvision'"),
        ({"video": 2}, r"video is 2 \(int\)\. Expected VideoOptions"),
    ],
)
def test_each_argument_of_another_type_is_named(change: dict[str, Any], words: str) -> None:
    """A single path was once read as its letters, and other values raised errors of Python."""
    with pytest.raises(ArgumentError, match=words):
        compare(**{"encoder": encoder(), "images": [CHELSEA], **change})


def test_one_path_and_the_repr() -> None:
    assert repr(compare(encoder(), CHELSEA)) == "Comparison(1 image, 0 skipped, passed=True)"
