"""Test the codes of image errors, and the length of errors about wrong arguments."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen_vit
from qwen_vit import ImageLimits, VideoLimits, VideoOptions, VisionEncoder, downstream
from qwen_vit.errors import IMAGE_CODES, ArgumentError
from qwen_vit.export.options import ExportOptions
from qwen_vit.images.memory import set_decoding_memory
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


@pytest.mark.parametrize(
    "call",
    [
        lambda value: VisionEncoder.from_pretrained("tiny", device=value),
        lambda value: VisionEncoder.from_pretrained("tiny", dtype=value),
        lambda value: VisionEncoder.from_pretrained("tiny", quantization=value),
        lambda value: VisionEncoder.from_pretrained("tiny", revision=value),
        lambda value: VisionEncoder.from_pretrained("tiny", subfolder=value),
        lambda value: ExportOptions(shard_size=value),
        lambda value: ExportOptions(layers=value),
        lambda value: ExportOptions(layers=(value,)),
        lambda value: ExportOptions(output=value),
        lambda value: ExportOptions(output="mean", normalize=value),
        lambda value: ExportOptions(column=value),
        lambda value: VideoLimits(max_frames=value),
        lambda value: VideoOptions(fps=value),
        lambda value: ImageLimits(max_pixels=value),
        lambda value: ImageLimits(max_seconds=value),
        lambda value: ImageLimits(allow_urls=value),
        lambda value: ImageLimits(formats=(value,)),
        lambda value: downstream.as_hf_tower(value),
        set_decoding_memory,
    ],
)
def test_an_error_about_a_large_value_is_short(call: Callable[[Any], Any]) -> None:
    """The error once contained the whole file that a user passed in place of a path."""
    with pytest.raises(ArgumentError) as caught:
        call(b"image" * 100_000)
    assert len(str(caught.value)) < 500
