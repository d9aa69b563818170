"""Test that the comparison of two checkouts accepts equal sources and rejects different sources."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support import ROOT
from tools.checks.against import main


@pytest.mark.slow
@pytest.mark.parametrize(("changed", "code"), [(False, 0), (True, 1)])
def test_a_checkout_of_other_bits_is_found(changed: bool, code: int, tmp_path: Path) -> None:
    for name in ("qwen_vit", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    kernel = tmp_path / "qwen_vit" / "kernels" / "attention.py"
    if changed:
        text = kernel.read_text()
        assert text.count("D**-0.5 * LOG2_E") >= 1
        kernel.write_text(text.replace("D**-0.5 * LOG2_E", "D**-0.5 * LOG2_E * 1.001"))
    options = [str(tmp_path), "--model", "tiny", "--layouts", "1", "--pairs", "0"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == code, done.output
    assert ("OTHER BITS" if changed else "the same bits") in done.output
