"""Test that the resize kernels compile for every GPU, without spills or fused float64."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from qwen_vit.kernels import resize

CHIPS = (80, 89, 90, 100, 120)
TYPES = {
    "pixels": "*i32", "table": "*i64", "weights": "*i32", "out": "*u8", "rows": "i32",
    "owners": "i32",
}  # fmt: skip
PASS_FIELDS, CUT_FIELDS = len(resize.Pass._fields) + 1, len(resize.Cut._fields) + 1
KERNELS: dict[str, tuple[Any, dict[str, int]]] = {
    "weights": (resize._make_weights, {"FIELDS": PASS_FIELDS, "BN": resize.OUTPUTS}),
    "pass": (
        resize._resize_axis,
        {"FIELDS": PASS_FIELDS, "BM": resize.ROWS, "BN": resize.COLUMNS},
    ),
    "cut": (
        resize._cut_patches,
        {
            "FIELDS": CUT_FIELDS,
            "SIDE": 14,
            "MERGE": 2,
            "FRAMES": 1,
            "BM": resize.PATCHES,
            "P_BLOCK": 1024,
        },
    ),
    "cut pairs": (
        resize._cut_patches,
        {
            "FIELDS": CUT_FIELDS,
            "SIDE": 14,
            "MERGE": 2,
            "FRAMES": 2,
            "BM": resize.PATCHES,
            "P_BLOCK": 2048,
        },
    ),
}


def ptx_of(name: str, chip: int) -> str:
    kernel, constants = KERNELS[name]
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else TYPES[each] for each in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, each in enumerate(names)
        if signature[each].startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(each),): value for each, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options).asm[
        "ptx"
    ]
    return ptx


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_resize_kernel_spills_nothing(name: str, chip: int, tmp_path: Path) -> None:
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx_of(name, chip))
    [target] = re.findall(r"\.target (\w+)", source.read_text())
    command = [get_ptxas(chip).path, "-v", f"-arch={target}", source, "-o", tmp_path / "cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    assert spills
    assert set(spills) == {"0"}


@pytest.mark.parametrize("chip", CHIPS)
def test_the_weights_are_rounded_after_each_operation(chip: int) -> None:
    """The assembler may fuse a `mul.f64` and an `add.f64`, and must not fuse `.rn` operations."""
    operations = set(
        re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp)[.\w]*f64", ptx_of("weights", chip))
    )
    assert operations == {"add.rn.f64", "sub.rn.f64", "mul.rn.f64", "div.rn.f64"}
