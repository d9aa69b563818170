"""Provide helpers for the tests of compare."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError

from qwen_vit import VisionEncoder
from tests.support import IMAGES

CHELSEA, ROCKET = IMAGES / "chelsea.png", IMAGES / "rocket.jpg"
SMALL = ("--model", "tiny", "--device", "cpu", "--max-pixels", "30000")
STAGES = ["patch_embed", *(f"block.{i}" for i in range(5)), "merger"]


@cache
def encoder() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=30_000)


def version_of(**pretended: str | None) -> Callable[[str], str]:
    def version(package: str) -> str:
        found = pretended.get(package, "1.0")
        if found is None:
            raise PackageNotFoundError(package)
        return found

    return version
