"""Test that every launch sets the options whose defaults differ between versions of Triton."""

import ast

import pytest
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from qwen_vit.kernels import IS_KNOWN_GLUON, plain_kernels, uses_hopper_kernels
from qwen_vit.kernels.launch import LAUNCH
from tests.support import ROOT


def launches_without_options(text: str) -> list[int]:
    """Return the lines of launches `kernel[grid](...)` that do not state FP fusion."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and not any(
            keyword.arg == "enable_fp_fusion" or ast.unparse(keyword.value) == "LAUNCH"
            for keyword in node.keywords
        )
    ]


def test_a_launch_that_does_not_state_fp_fusion_is_found() -> None:
    text = "run[1,](x, **LAUNCH)\nrun[1,](x, enable_fp_fusion=False)\nrun[1,](x, num_warps=4)"
    assert launches_without_options(text) == [3]


def test_every_launch_states_fp_fusion() -> None:
    files = sorted((ROOT / "qwen_vit" / "kernels").glob("*.py"))
    found = {path.name: launches_without_options(path.read_text()) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}
    assert sum("**LAUNCH" in path.read_text() for path in files) >= 6  # the search finds launches


@pytest.mark.parametrize("default", ["0", "1"])
def test_the_environment_does_not_set_fp_fusion(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    options = CUDABackend(GPUTarget("cuda", 90, 32)).parse_options(dict(LAUNCH))
    assert options.enable_fp_fusion


def test_the_plain_kernels_run_only_inside_the_block() -> None:
    assert uses_hopper_kernels() == IS_KNOWN_GLUON
    with plain_kernels():
        assert not uses_hopper_kernels()
    assert uses_hopper_kernels() == IS_KNOWN_GLUON
