"""Test that the tower in vLLM and SGLang has the bits of the encoder."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.errors import ArgumentError, CheckpointError, ImageError
from qwen_vit.graphs import MAX_BUCKET, bucket_for
from qwen_vit.images.rows import normalise
from qwen_vit.integrations.engine_tower import EngineTower
from tests.support.encoders import tiny

CPU = torch.device("cpu")
GRIDS = [[1, 4, 6], [2, 8, 4], [1, 10, 4]]


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cuda", dtype=dtype)


def engine_tower(encoder: VisionEncoder, dtype: torch.dtype = torch.float32) -> EngineTower:
    tower = EngineTower(encoder.config, encoder.image_config, dtype, encoder.device)
    tower.load_weights(encoder.checkpoint.tensors.items())
    return tower


def float_rows(seed: int = 0) -> Tensor:
    n = sum(t * h * w for t, h, w in GRIDS)
    return torch.randn(n, 1176, generator=torch.Generator().manual_seed(seed))


def pixel_rows(*, still: bool, grids: list[list[int]] = GRIDS) -> Tensor:
    n = sum(t * h * w for t, h, w in grids)
    pixels = torch.randint(
        0, 256, (n, 3, 2, 196), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    if still:
        pixels[:, :, 1] = pixels[:, :, 0]
    return pixels.flatten(1)


def test_every_parameter_is_reported_as_loaded() -> None:
    """vLLM does not start if a parameter is not among the names that load_weights returns."""
    encoder = tiny()
    tower = EngineTower(encoder.config, encoder.image_config, torch.float32, CPU)
    loaded = tower.load_weights(encoder.checkpoint.tensors.items())
    assert loaded == {name for name, _ in tower.named_parameters()}


def test_float_rows_have_the_bits_of_encode_patches() -> None:
    rows = float_rows()
    expected = tiny().encode_patches(rows, torch.tensor(GRIDS))
    tower = engine_tower(tiny())
    assert torch.equal(tower(rows, GRIDS), expected)
    assert torch.equal(tower(rows, torch.tensor(GRIDS)), expected)


def test_uint8_rows_of_images_have_the_bits_of_encode_pixels() -> None:
    rows, encoder = pixel_rows(still=True), tiny()
    tower = engine_tower(encoder)
    with tower.reading_images():
        ours = tower(rows, GRIDS)
    assert torch.equal(ours, encoder.encode_pixels(rows, torch.tensor(GRIDS)))


def test_both_frames_of_uint8_rows_of_videos_are_read() -> None:
    """With `reading_images`, the tower reads only the first frame, and the result must differ."""
    rows, encoder = pixel_rows(still=False), tiny()
    tower = engine_tower(encoder)
    floats = normalise(rows.view(len(rows), 3, 2, 196), encoder.image_config).flatten(1)
    assert torch.equal(tower(rows, GRIDS), encoder.encode_patches(floats, torch.tensor(GRIDS)))
    with tower.reading_images():
        assert not torch.equal(
            tower(rows, GRIDS), encoder.encode_patches(floats, torch.tensor(GRIDS))
        )


def test_an_error_ends_the_reading_of_images() -> None:
    tower, rows = engine_tower(tiny()), pixel_rows(still=False)
    video = tower(rows, GRIDS)
    with pytest.raises(ZeroDivisionError), tower.reading_images():
        raise ZeroDivisionError
    assert torch.equal(tower(rows, GRIDS), video)


def test_a_bfloat16_engine_on_a_cpu_gets_rounded_float32_results() -> None:
    tower = engine_tower(tiny(), torch.bfloat16)
    rows = float_rows()
    assert tower.dtype == torch.bfloat16
    assert torch.equal(
        tower(rows, GRIDS), tiny().encode_patches(rows, torch.tensor(GRIDS)).bfloat16()
    )


def test_no_rows_give_no_tokens() -> None:
    """A rank of a data-parallel engine may get no image."""
    assert engine_tower(tiny())(torch.zeros(0, 1176), []).shape == (0, 192)


def test_float16_is_refused_with_the_reason() -> None:
    encoder = tiny()
    with pytest.raises(ArgumentError, match="float16"):
        EngineTower(encoder.config, encoder.image_config, torch.float16, CPU)


def test_an_incomplete_update_is_refused_before_the_next_request() -> None:
    encoder = tiny()
    tower = engine_tower(encoder)
    tower.load_weights([("blocks.0.norm1.weight", torch.ones(160))])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.weight"):
        tower(float_rows(), GRIDS)
    weight = encoder.checkpoint.tensors["blocks.0.attn.qkv.weight"]
    tower.load_weights([("blocks.0.attn.qkv.weight", weight)])
    assert tower(float_rows(), GRIDS).isfinite().all()


def test_grids_that_do_not_match_the_rows_are_refused() -> None:
    with pytest.raises(ImageError, match="as grid_thw requires"):
        engine_tower(tiny())(float_rows()[:-4], GRIDS)


def test_prepare_does_nothing_on_a_cpu() -> None:
    assert engine_tower(tiny()).prepare([torch.uint8], 1024) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_bits_are_those_of_the_encoder(dtype: torch.dtype) -> None:
    encoder = on_gpu(dtype)
    tower = engine_tower(encoder, dtype)
    rows = float_rows().cuda()
    expected = encoder.encode_patches(rows, torch.tensor(GRIDS))
    for _ in range(2):  # the first call captures a graph, and the second call replays it
        assert torch.equal(tower(rows, GRIDS), expected)
    pixels = pixel_rows(still=True)
    with tower.reading_images():
        still = tower(pixels.cuda(), GRIDS)
    assert torch.equal(still, encoder.encode_pixels(pixels, torch.tensor(GRIDS)))


@pytest.mark.gpu
def test_prepared_graphs_are_not_captured_again_and_need_no_more_memory() -> None:
    encoder = on_gpu()
    tower = engine_tower(encoder, torch.bfloat16)
    kept = tower.prepare([torch.uint8, torch.bfloat16], MAX_BUCKET)
    assert kept > 0
    assert tower._graphs is not None
    captured = dict(tower._graphs._captured)
    buckets = sorted(rows for rows, dtype in captured if dtype == torch.uint8)
    assert buckets[-1] == MAX_BUCKET
    assert all(bucket_for(small + 1) == large for small, large in pairwise(buckets))
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for h in range(2, 128, 14):
        grids = [[1, h, 2 * h]]
        rows = torch.randn(2 * h * h, 1176, device="cuda", dtype=torch.bfloat16)
        expected = encoder.encode_patches(rows, torch.tensor(grids))
        assert torch.equal(tower(rows, grids), expected), grids
    assert tower._graphs._captured == captured
    print(f"kept {kept} bytes; reserved {reserved} before, {torch.cuda.memory_reserved()} after")


@pytest.mark.gpu
@pytest.mark.parametrize("is_captured", [True, False])
def test_the_tower_runs_on_the_stream_that_it_is_called_on(is_captured: bool) -> None:
    """An engine's rows arrive late on the caller's stream, and the next kernels read the result."""
    encoder = on_gpu()
    tower = engine_tower(encoder, torch.bfloat16)
    rows = float_rows().cuda()
    expected = encoder.encode_patches(rows, torch.tensor(GRIDS))
    if is_captured:
        tower(rows, GRIDS)
    else:
        tower._graphs = None
    torch.cuda.synchronize()
    made = []
    for stream in [torch.cuda.Stream() for _ in range(3)]:
        with torch.cuda.stream(stream):
            late = torch.zeros_like(rows)
            torch.cuda._sleep(100_000_000)  # cycles: the host launches the tower before the copy
            late.copy_(rows)
            made.append(tower(late, GRIDS) + 0)
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in made)


@pytest.mark.gpu
def test_a_weight_update_reaches_captured_graphs() -> None:
    encoder = on_gpu()
    tower = engine_tower(encoder, torch.bfloat16)
    rows = float_rows().cuda()
    before = tower(rows, GRIDS)
    tensors = {name: tensor * 1.5 for name, tensor in encoder.checkpoint.tensors.items()}
    tower.load_weights(tensors.items())
    changed = VisionEncoder.from_tensors(tensors, encoder.config, encoder.image_config)
    after = tower(rows, GRIDS)
    assert torch.equal(after, changed.encode_patches(rows, torch.tensor(GRIDS)))
    assert not torch.equal(after, before)
