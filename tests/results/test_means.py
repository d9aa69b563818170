"""Test the mean vector of an image's merged rows: values, bits, and length."""

import json
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.integrations.hf import to_hf
from qwen_vit.kernels import pooling
from qwen_vit.kernels.pooling import segment_means, unit_rows
from tests.support import ROOT
from tests.support.encoders import picture, tiny
from tests.support.hopper_compile import compile_for_hopper
from tests.support.means import oracle, random_rows
from tests.support.oracle import relative_error
from tests.support.towers import gpu

WIDTHS = (1, 8, 192, 3_584)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_means_are_those_of_float64(width: int, dtype: torch.dtype) -> None:
    """A sum of n values has an error of at most n roundings of 6e-8. 2,304 rows gave errors below
    1e-6."""
    parts = random_rows([1, 15, 16, 17, 130, 2_304], width, dtype)
    means = segment_means(torch.cat(parts), [len(part) for part in parts])
    assert means.dtype == torch.float32
    expected = torch.cat([oracle(part) for part in parts])
    error = relative_error(means, expected)
    print(f"width {width}: {error:.1e}")
    assert error < 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_an_images_mean_has_the_same_bits_in_any_batch(width: int) -> None:
    lengths = [1, 2, 15, 16, 17, 64, 130, 1_000]
    images = random_rows(lengths, width)
    alone = [unit_rows(segment_means(rows, [len(rows)])) for rows in images]
    generator = random.Random(width)
    for _ in range(100):
        chosen = generator.choices(range(len(images)), k=generator.randint(1, 12))
        rows = torch.cat([images[i] for i in chosen])
        together = unit_rows(segment_means(rows, [lengths[i] for i in chosen]))
        for index, i in enumerate(chosen):
            assert torch.equal(together[index : index + 1], alone[i]), (lengths[i], chosen)


def test_no_image_has_no_mean() -> None:
    assert segment_means(torch.empty(0, 8, dtype=torch.bfloat16), []).shape == (0, 8)
    assert unit_rows(torch.empty(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("size", [1.0, 1e-38, 1e30])
def test_rows_of_any_size_get_unit_length(size: float) -> None:
    """The squares of 1e30 overflow float32, and the squares of 1e-38 are 0."""
    rows = torch.randn(7, 192, generator=torch.Generator().manual_seed(0)) * size
    ours = unit_rows(rows)
    expected = rows.double() / rows.double().norm(dim=1, keepdim=True)
    assert relative_error(ours, expected) < 1e-6


def test_a_row_of_zeros_stays_zero_and_one_of_nan_stays_visible() -> None:
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [3.0, -4.0]])
    ours = unit_rows(rows)
    assert ours[0].tolist() == [0.0, 0.0]
    assert ours[1].isnan().any()
    assert ours[2].isnan().any()
    assert torch.equal(ours[3], torch.tensor([0.6, -0.8]))


# A child process runs the kernels' own source in Triton's interpreter.
INTERPRETED = """
import json
import torch
from qwen_vit.kernels import pooling
from tests.support.means import oracle, random_rows
from tests.support.oracle import relative_error

def means(rows, lengths, D):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = torch.full((len(lengths), D), float("nan"))
    grid = (len(lengths), -(-D // 128))
    pooling._segment_mean[grid](rows, offsets, out, D=D, BM=16, BN=128)
    return out

def unit(x, D):
    out = torch.full_like(x, float("nan"))
    pooling._unit_row[(len(x),)](x, out, D=D, D_PADDED=256)
    return out

lengths, D = [1, 15, 16, 17, 130], 200
parts = random_rows(lengths, D)
together = means(torch.cat(parts), lengths, D)
alone = torch.cat([means(part, [len(part)], D) for part in parts])
odd = unit(torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [3e30, -4e30], [3e-38, 4e-38]]), 2)
print(json.dumps([
    relative_error(together, torch.cat([oracle(part) for part in parts])),
    relative_error(unit(together, D), torch.cat([oracle(p, normalize=True) for p in parts])),
    torch.equal(together, alone),
    odd[0].tolist() == [0.0, 0.0], bool(odd[1].isnan().any()),
    relative_error(odd[2:], torch.tensor([[0.6, -0.8], [0.6, 0.8]])),
]))
"""


def test_the_compiled_kernels_are_right_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mean_error, unit_error, is_same, is_zero, is_nan, odd_error = json.loads(done.stdout)
    assert max(mean_error, unit_error, odd_error) < 1e-6
    assert (is_same, is_zero, is_nan) == (True, True, True)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_without_spills(dtype: str) -> None:
    mean = compile_for_hopper(
        pooling._segment_mean,
        {"rows": f"*{dtype}", "offsets": "*i32", "out": "*fp32"},
        {"D": 3_584, "BM": pooling.MEAN_ROWS, "BN": pooling.MEAN_COLUMNS},
        num_warps=4,
    )
    unit = compile_for_hopper(
        pooling._unit_row, {"x": "*fp32", "out": "*fp32"}, {"D": 8_192, "D_PADDED": 8_192},
        num_warps=8,
    )  # fmt: skip
    assert (mean.spill_bytes, unit.spill_bytes) == (0, 0)


# encode


@pytest.mark.parametrize("normalize", [False, True])
def test_encode_gives_one_vector_an_image(normalize: bool) -> None:
    images = [picture(56, 84), picture(28, 28, 1), picture(140, 112, 2)]
    merged = tiny().encode(images)
    means = tiny().encode(images, output="mean", normalize=normalize)
    for ours, rows in zip(means, merged, strict=True):
        assert ours.embeds.shape == (1, 192)
        assert ours.embeds.dtype == torch.float32
        assert (ours.output, ours.normalized) == ("mean", normalize)
        assert (ours.id, ours.grid_thw, ours.size_px) == (rows.id, rows.grid_thw, rows.size_px)
        assert relative_error(ours.embeds, oracle(rows.embeds, normalize=normalize)) < 1e-6
        assert ours.embeds.untyped_storage().nbytes() == 192 * 4  # no other row of its batch


def test_the_mean_is_refused_as_a_map_and_by_to_hf() -> None:
    """The mean of a single token has as many rows as its map would have cells."""
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu", min_pixels=28 * 28)
    assert len(encoder.encode(picture(28, 28)).embeds) == 1
    for image in (picture(56, 84), picture(28, 28)):
        mean = encoder.encode(image, output="mean")
        with pytest.raises(
            ArgumentError, match=r"contains one mean vector, not a map\. .* Encode it"
        ):
            _ = mean.map
        with pytest.raises(ExportError, match=r"and are a mean\. Expected \d+ merged rows"):
            to_hf(mean)


def test_a_failed_image_has_no_vector() -> None:
    images: list[Any] = [picture(28, 28), b"no image", picture(56, 28)]
    first, failed, last = tiny().encode(images, output="mean", on_error="skip")
    assert isinstance(failed, FailedImage)
    assert isinstance(first, ImageFeatures)
    assert isinstance(last, ImageFeatures)
    with pytest.raises(ImageError, match="image 1"):
        np.asarray(failed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": True}, r"normalize requires output=.mean.\. Omit this option"),
        ({"normalize": True, "output": "patch"}, "normalize requires output=.mean."),
        ({"normalize": 1, "output": "mean"}, r"normalize is 1\. Expected True or False"),
        ({"normalize": "l2", "output": "mean"}, r"normalize is 'l2'\. Expected True or False"),
        ({"output": "max"}, r"output is 'max'\. Expected 'merged', 'patch' or 'mean'"),
    ],
)
def test_contradictory_options_are_refused_before_any_image(
    options: dict[str, Any], words: str
) -> None:
    for call in (tiny().encode, tiny().encode_iter):
        with pytest.raises(ArgumentError, match=words):
            call(["no-such-file.jpg"], **options)


# On a GPU


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_means_on_a_gpu_match_float64_without_synchronising(dtype: torch.dtype) -> None:
    parts = random_rows([1, 15, 16, 17, 130, 4_096], 3_584, dtype)
    rows, lengths = torch.cat(parts).cuda(), [len(part) for part in parts]
    unit_rows(segment_means(rows, lengths))  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = segment_means(rows, lengths)
        units = unit_rows(means)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(means.cpu(), torch.cat([oracle(part) for part in parts])) < 1e-6
    expected = torch.cat([oracle(part, normalize=True) for part in parts])
    assert relative_error(units.cpu(), expected) < 1e-6


@gpu
def test_an_images_vector_on_a_gpu_has_the_same_bits_in_any_batch() -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda")
    generator = random.Random(0)
    images = [
        picture(28 * generator.randint(1, 20), 28 * generator.randint(1, 20), i) for i in range(20)
    ]
    options: dict[str, Any] = {"output": "mean", "normalize": True}
    alone = [encoder.encode(image, **options).embeds for image in images]
    for _ in range(30):
        chosen = generator.choices(range(len(images)), k=generator.randint(2, 20))
        together = encoder.encode([images[i] for i in chosen], **options)
        for i, ours in zip(chosen, together, strict=True):
            assert torch.equal(ours.embeds, alone[i]), images[i].shape
