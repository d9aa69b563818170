"""Test that the table contains every code of an image error, and that tests cover every code."""

import ast
import re
from pathlib import Path

import qwen_vit
from qwen_vit.errors import IMAGE_CODES
from tests.support import ROOT


def test_every_code_of_the_table_is_tested() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [code for code in IMAGE_CODES if f'"{code}"' not in tests] == []


def test_every_code_of_the_package_is_in_the_table() -> None:
    for path in Path(qwen_vit.__file__).parent.rglob("*.py"):
        source = path.read_text("utf-8")
        assert set(re.findall(r'code="([^"]+)"', source)) <= set(IMAGE_CODES)
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "ImageError":
                keywords = {keyword.arg for keyword in call.keywords}
                # None stands for `**parts`, the parts of a child's error, which include the code.
                assert keywords & {"code", None}, (path, call.lineno)
