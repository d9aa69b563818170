"""Test the estimate of size and time before an export."""

import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit.batching import TOKEN_BUDGET
from qwen_vit.errors import ImageError
from qwen_vit.export import estimate as estimate_module
from qwen_vit.export.estimate import estimate_export, estimate_plan
from qwen_vit.export.options import ExportOptions
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.image import ImageLimits
from tests.support.exports import SMALL, export, plan_of
from tests.support.fake_encoder import WIDTH, FakeEncoder


@pytest.mark.parametrize("output", ["merged", "patch", "mean"])
def test_the_estimate_equals_the_size_of_the_export(export_dir: Path, output: Any) -> None:
    Image.fromarray(np.zeros((60, 170, 3), np.uint8)).save("p/2.jpg")
    Path("p/y.png").write_bytes(b"no image")
    options = ExportOptions(output, shard_size=4)
    estimate = estimate_export(FakeEncoder(), ["p"], options)
    assert not Path("out").exists()
    done = export(options=options)
    # the truncated image has a header, so only decoding finds the damage
    assert (estimate.images, estimate.unreadable) == (13, 1)
    one = {"merged": 4, "patch": 16, "mean": 1}[output]
    assert estimate.rows == done.rows + one
    assert estimate.seconds is not None
    assert abs(estimate.bytes - done.bytes) < 5_000
    parts = [
        estimate_export(FakeEncoder(), ["p"], replace(options, part=(i, 3))).rows for i in (1, 2, 3)
    ]
    assert sum(parts) == estimate.rows


def test_the_estimate_counts_images_over_the_limits(export_dir: Path) -> None:
    options = replace(SMALL, limits=ImageLimits(max_pixels=100))
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save("p/small.png")
    estimate = estimate_export(FakeEncoder(), ["p"], options, folder="out")
    assert (estimate.images, estimate.unreadable) == (12, 11)
    assert export(options=options).failed == {"too-many-pixels": 11}


def test_an_estimate_scales_a_sample(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vit.export.estimate.SAMPLE", 5)
    Path("p/x.png").unlink()
    with plan_of() as plan:
        estimate = estimate_plan(FakeEncoder(), plan)
    assert (estimate.images, estimate.rows, estimate.is_sample) == (10, 40, True)
    assert estimate.seconds is None


def test_the_estimate_of_a_plan_counts_missing_images(export_dir: Path) -> None:
    """The estimate before an export once gave 0 missing images."""
    with plan_of() as plan:
        Path("p/x.png").unlink()
        estimate = estimate_plan(FakeEncoder(), plan)
    assert (estimate.missing, estimate.is_sample) == (1, False)


def test_the_time_depends_on_batches_and_patches(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate was once 3 times too long for small images, because 8 timed images filled no
    batch."""
    Path("p/x.png").unlink()
    with tarfile.open("t.tar", "w") as tar:
        tar.add("p")
    clock, asked, budget = [0.0], [], dict(TOKEN_BUDGET)

    class Timed(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            asked.append(len(images))
            batches = -(-16 * len(images) // budget["cpu"])
            clock[0] += 0.5 * batches + 0.001 * 16 * len(images) + 3.0 * (len(asked) == 1)
            return [ImageFeatures("a", torch.zeros(4, WIDTH), (1, 4, 4)) for _ in images]

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for given in ("p", "t.tar"):  # 10 images in 3 shards of one batch each
        asked.clear()
        options = replace(SMALL, shard_size=4)
        assert estimate_export(Timed(), [given], options).seconds == pytest.approx(3 + 1.66)
        assert asked == [1, 1, 8]  # the first call also has the start-up time of an export
    budget["cpu"] = 32
    monkeypatch.setattr(estimate_module, "TOKEN_BUDGET", budget)
    assert estimate_export(Timed(), ["p"], options).seconds == pytest.approx(5 * 0.5 + 0.16)


def test_a_slow_image_is_timed_alone(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slow(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            clock[0] += 7.0 * len(images)
            return [ImageFeatures("a", torch.zeros(4, WIDTH), (1, 4, 4)) for _ in images]

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    Path("p/x.png").unlink()
    assert estimate_export(Slow(), ["p"]).seconds == 70.0
    assert clock[0] == 7.0


def test_no_time_is_estimated_if_every_image_fails(export_dir: Path) -> None:
    class Failing(FakeEncoder):
        def encode(self, images: Any, **options: Any) -> Any:
            error = ImageError("cut", code="truncated")
            return [FailedImage(str(index), error) for index, _ in enumerate(images)]

    assert estimate_export(Failing(), ["p"]).seconds is None
