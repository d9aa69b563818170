"""Test CUDA graphs without a GPU: buckets, layouts with padding, failed captures."""

import random
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit.graphs import (
    CAPTURE_COST_ROWS,
    MAX_BUCKET,
    TILE_HEADROOM,
    GraphRunner,
    bucket_for,
    pad_to_graph,
)
from qwen_vit.kernels.attention import tiling
from qwen_vit.layout import Layout
from qwen_vit.model import ROTARY_POSITIONS
from tests.support.graph_cases import CUDA, OUT_OF_MEMORY, Faulty, GridTuple, config
from tests.support.towers import (
    as_grids,
    n_patches,
    random_pixels,
)

# Buckets


@given(st.integers(1, MAX_BUCKET))
def test_a_bucket_covers_its_patches_with_little_padding(n: int) -> None:
    bucket = bucket_for(n)
    assert bucket is not None
    assert n <= bucket <= MAX_BUCKET
    assert bucket % 256 == 0  # whole merge units and padding windows
    assert bucket - n < 256 or (bucket - n) / n <= 0.0625
    assert bucket_for(bucket) == bucket


def test_buckets_increase_and_are_few() -> None:
    buckets = [bucket_for(n) for n in range(1, MAX_BUCKET + 1)]
    assert buckets == sorted(buckets, key=lambda bucket: bucket or 0)
    assert len(set(buckets)) <= 16 + 3 * 16  # each bucket costs a capture and memory
    assert buckets[-1] == MAX_BUCKET


@pytest.mark.parametrize("n", [0, -4, MAX_BUCKET + 1, 10**9])
def test_no_patches_and_too_many_patches_have_no_bucket(n: int) -> None:
    assert bucket_for(n) is None


# The padded layout of a graph


def gpu_layout(grids: list[GridTuple], dtype: torch.dtype = torch.bfloat16) -> Layout:
    """Return the encoder's layout for a GPU, on the host."""
    return Layout.from_grids(
        as_grids(grids),
        config(),  # type: ignore[arg-type]
        window_tiling=tiling(CUDA, dtype, "window"),
        full_tiling=tiling(CUDA, dtype, "full"),
        n_rows=bucket_for(n_patches(grids)),
    )


MIXES: list[list[GridTuple]] = [
    [(1, 32, 32)],
    [(1, 16, 64)],
    [(1, 30, 34)],
    [(1, 16, 16), (1, 12, 22), (1, 20, 24)],
    [(4, 16, 16)],
    [(1, 2, 512)],
    [(1, 22, 32), (1, 10, 14), (1, 6, 6)],
]


def test_layouts_of_one_bucket_have_one_shape_for_any_mix() -> None:
    shapes = set()
    for grids in MIXES:
        static = pad_to_graph(gpu_layout(grids))
        if static is not None:
            assert static.n_rows == 1024
            shapes.add(tuple(tuple(tensor.shape) for tensor in static.tensors()))
    assert len(shapes) == 1


@pytest.mark.parametrize("grids", MIXES, ids=str)
def test_padding_follows_the_layout_and_is_empty(grids: list[GridTuple]) -> None:
    layout = gpu_layout(grids)
    static = pad_to_graph(layout)
    if static is None:
        tiles = (len(layout.windows.tiles), len(layout.frames.tiles))
        print(tiles)
        rows = layout.window_tiling.rows, layout.full_tiling.rows
        assert (
            tiles[0] > TILE_HEADROOM * 1024 // rows[0] or tiles[1] > TILE_HEADROOM * 1024 // rows[1]
        )
        return
    for before, after in (
        (layout.windows.tiles, static.windows.tiles),
        (layout.frames.tiles, static.frames.tiles),
        (layout.merged_order, static.merged_order),
    ):
        assert torch.equal(after[: len(before)], before)
        assert not after[len(before) :].any()
    assert len(static.merged_order) == static.n_rows // 4
    assert torch.equal(static.grid_index, layout.grid_index)
    assert torch.equal(static.positions, layout.positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_of_a_common_size_fit_their_graph(dtype: torch.dtype) -> None:
    """In float32 no layout once fitted, because the space was that of bfloat16's larger tiles."""
    generator = random.Random(0)
    for _ in range(200):
        sizes = [[2 * generator.randint(8, 48) for _ in range(2)] for _ in range(4)]
        grids = [(1, h, w) for h, w in sizes[: generator.randint(1, 4)]]
        if bucket_for(n_patches(grids)) is not None:
            assert pad_to_graph(gpu_layout(grids, dtype)) is not None, grids


def test_a_mix_of_many_tiny_images_does_not_fit_a_graph() -> None:
    tiny_images = [(1, 2, 2)] * 256  # a graph of 1,024 rows has space for 32 windows
    assert bucket_for(1024) == 1024
    assert pad_to_graph(gpu_layout(tiny_images)) is None


def test_a_position_beyond_the_angle_table_does_not_fit_a_graph() -> None:
    """A new, larger table would replace the old table, but the graph would still read the old
    table."""
    assert pad_to_graph(gpu_layout([(1, 4, ROTARY_POSITIONS)])) is not None
    assert pad_to_graph(gpu_layout([(1, 4, ROTARY_POSITIONS + 2)])) is None


def test_a_static_layout_is_restored_from_one_buffer() -> None:
    """The graph reads views of the one buffer that each call fills."""
    first, second = (pad_to_graph(gpu_layout(grids)) for grids in ([(1, 32, 32)], [(1, 30, 34)]))
    assert first is not None
    assert second is not None
    buffer = first.flat()
    view = first.viewing(buffer)
    buffer.copy_(second.flat())
    for place, (seen, expected) in enumerate(zip(view.tensors(), second.tensors(), strict=True)):
        assert torch.equal(seen, expected), place


# Failed captures


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the runner's calls to a GPU, without a GPU."""
    did: list[str] = []
    cuda = Mock()
    cuda.OutOfMemoryError = torch.cuda.OutOfMemoryError
    cuda.device = cuda.stream = lambda _: nullcontext()
    cuda.empty_cache = lambda: did.append("empty_cache")
    cuda.current_stream().wait_stream = lambda _: did.append("wait_stream")
    cuda.current_stream().wait_event = lambda _: did.append("wait_event")
    cuda.Event().record = lambda: did.append("record")
    cuda.CUDAGraph().capture_begin = lambda **_: did.append("capture_begin")
    cuda.CUDAGraph().capture_end = lambda: did.append("capture_end")
    monkeypatch.setattr(torch, "cuda", cuda)
    flat = Layout.flat
    monkeypatch.setattr(Layout, "flat", lambda self, **_: flat(self))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, _: None)
    return did


def answer_of(pixels: torch.Tensor, layout: Layout) -> torch.Tensor:
    return pixels[: len(layout.merged_order), :3].float()


def test_a_capture_without_memory_only_skips_the_graph(no_gpu: list[str]) -> None:
    """The allocator returns no memory during a capture. The encoder once halved batches and skipped
    images."""
    layout, pixels = gpu_layout([(1, 16, 16)]), random_pixels(256, 0)
    runner = GraphRunner(Faulty(answer_of, OUT_OF_MEMORY, 2), torch.device("cpu"))  # type: ignore[arg-type]
    for is_recorded in (False, True):
        answer = runner.run(pixels, layout)
        assert answer is not None
        assert torch.equal(answer, pixels[:64, :3].float())
        assert list(runner._captured) == ([(256, torch.uint8)] if is_recorded else [])
    capture = ["wait_event", "capture_begin", "capture_end", "wait_stream"]
    assert no_gpu == [*capture, "empty_cache", "record", *capture, "record"]


def test_a_larger_graph_is_used_until_its_padding_costs_a_capture(no_gpu: list[str]) -> None:
    """The last batch of each packing has a different size. This once caused 40 captures, each as
    slow as four full batches of small images."""
    runner = GraphRunner(answer_of, torch.device("cpu"))  # type: ignore[arg-type]

    def graph_bucket(n: int, dtype: torch.dtype = torch.uint8) -> int | None:
        return runner.graph_bucket(torch.zeros(n, 588, dtype=dtype))

    assert graph_bucket(900) == 1024  # no graph is captured yet
    runner._captured = {(rows, torch.uint8): Mock() for rows in (1024, 4096, 32_768)}
    assert graph_bucket(900) == graph_bucket(1024) == 1024
    assert graph_bucket(700) == 1024  # 256 padding rows are accepted
    assert graph_bucket(1200) == 4096
    assert graph_bucket(4100) == 4352  # 28,416 padding rows are too many at once
    assert graph_bucket(40_000) is None
    assert graph_bucket(900, torch.float32) == 1024  # no float32 graph is captured yet
    times = 0
    while graph_bucket(2000) == 4096:
        times += 1
    assert times == CAPTURE_COST_ROWS // (4096 - 2048)
    assert graph_bucket(2000) == 2048  # the next call keeps the smaller graph


def test_a_graph_captured_in_inference_mode_works_in_every_mode(no_gpu: list[str]) -> None:
    """The buffer of all graphs once was an inference tensor, which no later call could fill."""
    layout, pixels = gpu_layout([(1, 16, 16)]), random_pixels(256, 0)
    never = Faulty(answer_of, OUT_OF_MEMORY, 0)
    runner = GraphRunner(never, torch.device("cpu"))  # type: ignore[arg-type]
    for is_inference in (True, True, False, True):
        with torch.inference_mode(is_inference):
            answer = runner.run(pixels, layout)
        assert answer is not None
        assert not answer.is_inference()
        assert torch.equal(answer, pixels[:64, :3].float())


@pytest.mark.parametrize(
    ("error", "fails_at", "did"),
    [
        (OUT_OF_MEMORY, 1, []),
        (KeyboardInterrupt(), 1, []),
        (KeyboardInterrupt(), 2, ["capture_begin", "capture_end"]),
    ],
    ids=["memory", "interrupt", "interrupt while capture"],
)
def test_a_failed_capture_waits_for_the_gpu(
    no_gpu: list[str], error: BaseException, fails_at: int, did: list[str]
) -> None:
    """Otherwise the allocator could reuse the memory of inputs that the GPU still reads."""
    layout, pixels = gpu_layout([(1, 16, 16)]), random_pixels(256, 0)
    runner = GraphRunner(Faulty(answer_of, error, fails_at), torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        runner.run(pixels, layout)
    assert no_gpu == ["wait_event", *did, "wait_stream", "record"]
    assert not runner._captured
    assert runner.run(pixels, layout) is not None
