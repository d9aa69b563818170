"""CUDA graphs per token budget: the same bits as without them, for every mix that fits one.

What a graph gets is planned on the host, and that part is tested without a GPU.
"""

import random
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import VisionConfig
from qwen_vit.encoder import VisionEncoder
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
from qwen_vit.model import ROTARY_POSITIONS, plan_layout
from tests.support.goldens import TINY_FOLDER
from tests.support.towers import (
    as_grids,
    build_tower,
    gpu,
    layout_for,
    n_patches,
    per_image,
    random_pixels,
)

GridTuple = tuple[int, int, int]
CUDA = torch.device("cuda", 0)

# Budgets


@given(st.integers(1, MAX_BUCKET))
def test_a_budget_covers_its_patches_with_little_to_spare(n: int) -> None:
    budget = bucket_for(n)
    assert budget is not None
    assert n <= budget <= MAX_BUCKET
    assert budget % 256 == 0  # whole merge units and padding windows
    assert budget - n < 256 or (budget - n) / n <= 0.0625
    assert bucket_for(budget) == budget


def test_budgets_rise_and_are_few() -> None:
    budgets = [bucket_for(n) for n in range(1, MAX_BUCKET + 1)]
    assert budgets == sorted(budgets, key=lambda budget: budget or 0)
    assert len(set(budgets)) <= 16 + 3 * 16  # each costs a capture, and memory
    assert budgets[-1] == MAX_BUCKET


@pytest.mark.parametrize("n", [0, -4, MAX_BUCKET + 1, 10**9])
def test_no_budget_serves_nothing_or_too_much(n: int) -> None:
    assert bucket_for(n) is None


# The layout that a graph is given


@cache
def config() -> object:
    return load_checkpoint(TINY_FOLDER).config


def gpu_layout(grids: list[GridTuple], dtype: torch.dtype = torch.bfloat16) -> Layout:
    """As the encoder plans it for a GPU, on the host."""
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


def test_layouts_of_one_budget_have_one_shape_whatever_the_mix() -> None:
    shapes = set()
    for grids in MIXES:
        static = pad_to_graph(gpu_layout(grids))
        if static is not None:
            assert static.n_rows == 1024
            shapes.add(tuple(tuple(tensor.shape) for tensor in static.tensors()))
    assert len(shapes) == 1


@pytest.mark.parametrize("grids", MIXES, ids=str)
def test_room_is_added_after_what_is_there_and_holds_nothing(grids: list[GridTuple]) -> None:
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
    """In float32 none did: its frame tiles are smaller, and room was for a number of bfloat16's."""
    generator = random.Random(0)
    for _ in range(200):
        sizes = [[2 * generator.randint(8, 48) for _ in range(2)] for _ in range(4)]
        grids = [(1, h, w) for h, w in sizes[: generator.randint(1, 4)]]
        if bucket_for(n_patches(grids)) is not None:
            assert pad_to_graph(gpu_layout(grids, dtype)) is not None, grids


def test_a_mix_of_crumbs_does_not_fit_a_graph() -> None:
    crumbs = [(1, 2, 2)] * 256  # 256 windows where 1,024 rows have room for 32
    assert bucket_for(1024) == 1024
    assert pad_to_graph(gpu_layout(crumbs)) is None


def test_a_position_beyond_the_angle_table_does_not_fit_a_graph() -> None:
    """The table would be made anew and larger, and the graph would read the old one."""
    assert pad_to_graph(gpu_layout([(1, 4, ROTARY_POSITIONS)])) is not None
    assert pad_to_graph(gpu_layout([(1, 4, ROTARY_POSITIONS + 2)])) is None


def test_a_static_layout_comes_back_whole_from_one_buffer() -> None:
    """What the graph reads is a view of the one buffer that each call fills."""
    first, second = (pad_to_graph(gpu_layout(grids)) for grids in ([(1, 32, 32)], [(1, 30, 34)]))
    assert first is not None
    assert second is not None
    buffer = first.flat()
    view = first.viewing(buffer)
    buffer.copy_(second.flat())
    for place, (seen, expected) in enumerate(zip(view.tensors(), second.tensors(), strict=True)):
        assert torch.equal(seen, expected), place


# A capture that fails


class Faulty:
    """A tower that fails while it is captured, or before."""

    def __init__(self, tower: Any, error: BaseException, fails_at: int) -> None:
        self.tower, self.error, self.fails_at, self.calls = tower, error, fails_at, 0
        self.angles = None

    def __call__(self, pixels: torch.Tensor, layout: Layout) -> torch.Tensor:
        self.calls += 1
        answer: torch.Tensor = self.tower(pixels, layout)
        if self.calls == self.fails_at:
            raise self.error
        return answer


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the runner does with a GPU, done by nobody: the names of the calls."""
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


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_recording_that_runs_out_of_memory_costs_the_graph_alone(no_gpu: list[str]) -> None:
    """The allocator gives nothing back meanwhile; batches were halved, and images left out."""
    layout, pixels = gpu_layout([(1, 16, 16)]), random_pixels(256, 0)
    runner = GraphRunner(Faulty(answer_of, OUT_OF_MEMORY, 2), torch.device("cpu"))  # type: ignore[arg-type]
    for is_recorded in (False, True):
        answer = runner.run(pixels, layout)
        assert answer is not None
        assert torch.equal(answer, pixels[:64, :3].float())
        assert list(runner._captured) == ([(256, torch.uint8)] if is_recorded else [])
    capture = ["wait_event", "capture_begin", "capture_end", "wait_stream"]
    assert no_gpu == [*capture, "empty_cache", "record", *capture, "record"]


def test_a_larger_graph_serves_until_its_spare_rows_cost_a_recording(no_gpu: list[str]) -> None:
    """What is left over when images are packed has another size each time: 40 recordings, of which
    each took as long as four full batches of small images."""
    runner = GraphRunner(answer_of, torch.device("cpu"))  # type: ignore[arg-type]

    def graph_bucket(n: int, dtype: torch.dtype = torch.uint8) -> int | None:
        return runner.graph_bucket(torch.zeros(n, 588, dtype=dtype))

    assert graph_bucket(900) == 1024  # nothing is there
    runner._captured = {(rows, torch.uint8): Mock() for rows in (1024, 4096, 32_768)}
    assert graph_bucket(900) == graph_bucket(1024) == 1024
    assert graph_bucket(700) == 1024  # 256 rows too many
    assert graph_bucket(1200) == 4096
    assert graph_bucket(4100) == 4352  # 28,416 rows too many, at once
    assert graph_bucket(40_000) is None
    assert graph_bucket(900, torch.float32) == 1024  # of its own type, nothing is there
    times = 0
    while graph_bucket(2000) == 4096:
        times += 1
    assert times == CAPTURE_COST_ROWS // (4096 - 2048)
    assert graph_bucket(2000) == 2048  # and it stays so


def test_a_graph_made_in_inference_mode_serves_everybody(no_gpu: list[str]) -> None:
    """The buffer of all graphs was an inference tensor then, which nobody could fill again."""
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
def test_whatever_stops_a_recording_its_end_is_waited_for(
    no_gpu: list[str], error: BaseException, fails_at: int, did: list[str]
) -> None:
    """Its inputs go back to the allocator, and the GPU may still read them."""
    layout, pixels = gpu_layout([(1, 16, 16)]), random_pixels(256, 0)
    runner = GraphRunner(Faulty(answer_of, error, fails_at), torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        runner.run(pixels, layout)
    assert no_gpu == ["wait_event", *did, "wait_stream", "record"]
    assert not runner._captured
    assert runner.run(pixels, layout) is not None


# On a GPU


def random_mix(generator: random.Random, patches: int) -> list[GridTuple]:
    grids: list[GridTuple] = []
    while n_patches(grids) < patches:
        h, w = (2 * generator.randint(2, 20) for _ in range(2))
        grids.append((generator.choice((1, 1, 1, 2)), h, w))
    return grids


@cache
def encoders() -> tuple[VisionEncoder, VisionEncoder]:
    """By graph, and kernel by kernel."""
    by_graph = VisionEncoder.from_pretrained("tiny", device="cuda")
    return by_graph, VisionEncoder.from_pretrained("tiny", device="cuda", cuda_graphs=False)


def forward(encoder: VisionEncoder, pixels: torch.Tensor, grids: list[GridTuple]) -> torch.Tensor:
    return encoder.forward(pixels, as_grids(grids), "merged")


@gpu
def test_a_graph_gives_the_bits_of_its_kernels_for_every_mix() -> None:
    by_graph, eager = encoders()
    generator = random.Random(0)
    for round_number in range(100):
        grids = random_mix(generator, generator.choice((50, 500, 2000, 5000)))
        pixels = random_pixels(n_patches(grids), round_number)
        ours = forward(by_graph, pixels, grids)
        assert torch.equal(ours, forward(eager, pixels, grids)), grids
        assert ours.isfinite().all()
    assert by_graph.graphs is not None
    assert by_graph.graphs._captured  # graphs were used


@gpu
def test_graphs_serve_float32() -> None:
    by_graph = VisionEncoder.from_pretrained("tiny", device="cuda", dtype="float32")
    eager = VisionEncoder.from_pretrained("tiny", device="cuda", dtype="float32", cuda_graphs=False)
    generator = random.Random(3)
    for round_number in range(20):
        grids = random_mix(generator, generator.choice((50, 500, 2000)))
        pixels = random_pixels(n_patches(grids), round_number)
        assert torch.equal(forward(by_graph, pixels, grids), forward(eager, pixels, grids)), grids
    assert by_graph.graphs is not None
    assert by_graph.graphs._captured


@gpu
def test_a_callers_pinned_rows_are_free_when_the_call_returns() -> None:
    """A loader fills the same pinned memory again, while the GPU may still read it."""
    by_graph, eager = encoders()
    grid_thw = torch.tensor([[1, 128, 128]])
    rows = torch.randn(128 * 128, 1176)
    expected = eager.encode_patches(rows, grid_thw)
    for encoder in (by_graph, eager):
        pinned = rows.pin_memory()
        ours = encoder.encode_patches(pinned, grid_thw)
        pinned.fill_(float("nan"))
        assert torch.equal(ours, expected)


@gpu
def test_two_mixes_of_one_budget_and_one_size_do_not_share_a_layout() -> None:
    """A replay keyed on the token count alone would attend within the other mix's windows."""
    by_graph, eager = encoders()
    pixels = random_pixels(1024, 0)
    mixes: list[list[GridTuple]] = [
        [(1, 32, 32)],
        [(1, 16, 64)],
        [(4, 16, 16)],
        [(1, 16, 32), (1, 32, 16)],
    ]
    results = [forward(by_graph, pixels, grids) for grids in (*mixes, mixes[0])]
    assert torch.equal(results[0], results[-1])  # and the first again, after the others
    for grids, ours in zip(mixes, results, strict=False):
        assert torch.equal(ours, forward(eager, pixels, grids)), grids
    for i in range(len(mixes)):
        for j in range(i):
            assert not torch.equal(results[i], results[j])


@gpu
def test_an_image_has_the_same_bits_alone_and_in_a_thousand_batches() -> None:
    by_graph, _ = encoders()
    generator = random.Random(1)
    sizes = [(2 * generator.randint(2, 16), 2 * generator.randint(2, 16)) for _ in range(40)]
    images = [((1, h, w), random_pixels(h * w, seed)) for seed, (h, w) in enumerate(sizes)]
    alone = [forward(by_graph, pixels, [grid]) for grid, pixels in images]
    for _ in range(1000):
        chosen = generator.sample(range(len(images)), generator.randint(2, 6))
        grids = [images[i][0] for i in chosen]
        together = forward(by_graph, torch.cat([images[i][1] for i in chosen]), grids)
        for i, part in zip(chosen, per_image(together, grids), strict=True):
            assert torch.equal(part, alone[i]), (grids, images[i][0])


@gpu
def test_a_mix_that_fits_no_graph_runs_without_one() -> None:
    by_graph, eager = encoders()
    crumbs: list[GridTuple] = [(1, 2, 2)] * 256
    pixels = random_pixels(1024, 2)
    runner = GraphRunner(by_graph.tower, by_graph.device)
    layout = plan_layout(
        as_grids(crumbs), by_graph.config, by_graph.device, by_graph.dtype, bucket_for(1024)
    )
    assert runner.run(pixels.pin_memory(), layout) is None
    assert not runner._captured
    assert torch.equal(forward(by_graph, pixels, crumbs), forward(eager, pixels, crumbs))


@gpu
def test_what_a_call_returned_is_not_overwritten_by_the_next() -> None:
    by_graph, _ = encoders()
    first = forward(by_graph, random_pixels(1024, 3), [(1, 32, 32)])
    kept = first.clone()
    forward(by_graph, random_pixels(1024, 4), [(1, 32, 32)])
    torch.cuda.synchronize()
    assert torch.equal(first, kept)


@gpu
def test_graphs_serve_encode_and_leave_the_patch_output_alone() -> None:
    by_graph, eager = encoders()
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((224, 336), (448, 140))]
    for output in ("merged", "patch"):
        for ours, other in zip(
            by_graph.encode(images, output=output),  # type: ignore[arg-type]
            eager.encode(images, output=output),  # type: ignore[arg-type]
            strict=True,
        ):
            assert ours.embeds is not None
            assert other.embeds is not None
            assert torch.equal(ours.embeds, other.embeds)


@gpu
def test_graphs_serve_rows_that_another_processor_prepared() -> None:
    by_graph, eager = encoders()
    generator = random.Random(2)
    for seed in range(20):
        grids = random_mix(generator, generator.choice((50, 500, 2000)))
        rows = torch.randn(n_patches(grids), 1176, generator=torch.manual_seed(seed))
        grid_thw = torch.tensor(grids)
        ours = by_graph.encode_patches(rows, grid_thw)
        assert torch.equal(ours, eager.encode_patches(rows, grid_thw)), grids
        assert torch.equal(ours, by_graph.encode_patches(rows.cuda(), grid_thw)), grids
    assert by_graph.graphs is not None
    assert torch.float32 in {dtype for _, dtype in by_graph.graphs._captured}


@gpu
def test_what_the_spare_rows_of_a_graph_hold_reaches_no_image() -> None:
    """They are what an earlier call left there."""
    by_graph, eager = encoders()
    grids = torch.tensor([[1, 16, 18]])
    rows = torch.randn(288, 1176)
    expected = eager.encode_patches(rows, grids)
    poison = torch.full((480, 1176), float("nan"))
    by_graph.encode_patches(poison, torch.tensor([[1, 20, 24]]))
    assert torch.equal(by_graph.encode_patches(rows, grids), expected)


@gpu
def test_a_graphs_result_is_the_towers_own() -> None:
    """Against the plain tower in float32, so that both ways cannot be wrong together."""
    by_graph, _ = encoders()
    exact = build_tower(TINY_FOLDER, device=CUDA)
    grids: list[GridTuple] = [(1, 22, 32), (1, 10, 14)]
    pixels = random_pixels(n_patches(grids), 5)
    with torch.no_grad():
        expected = exact(pixels.to(CUDA), layout_for(grids, exact.config, CUDA))
    ours = forward(by_graph, pixels, grids).float()
    assert (ours - expected).norm() / expected.norm() < 0.05  # bf16, five peaked blocks


@gpu
def test_after_a_recording_without_memory_the_next_one_succeeds() -> None:
    by_graph, eager = encoders()
    grids: list[GridTuple] = [(1, 32, 32)]
    pixels = random_pixels(n_patches(grids), 6)
    expected = forward(eager, pixels, grids)
    layout = plan_layout(
        as_grids(grids), by_graph.config, by_graph.device, by_graph.dtype, bucket_for(1024)
    )
    runner = GraphRunner(Faulty(by_graph.tower, OUT_OF_MEMORY, 2), CUDA)  # type: ignore[arg-type]
    for n_recorded in (0, 1, 1):
        answer = runner.run(pixels.pin_memory(), layout)
        assert answer is not None
        assert torch.equal(answer, expected)
        assert len(runner._captured) == n_recorded


@gpu
def test_the_first_answer_of_every_recording_is_right() -> None:
    """cuBLAS in a graph gave a wrong first replay to every encoder of a process but the first.

    The replays after it were right, and in a fresh process, whose memory is all zeros, so was the
    first. No product is cuBLAS's since.
    """
    config = VisionConfig.from_json(
        {"model_type": "qwen2_5_vl", "out_hidden_size": 3584, "depth": 2}
        | {"fullatt_block_indexes": [1]}
    )
    shapes = expected_tensors(config)
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    tower = build_tower(tensors, config, dtype=torch.bfloat16, device=CUDA)
    grids: list[GridTuple] = [(1, 96, 96)]
    pixels = random_pixels(n_patches(grids), 0).to(CUDA)
    layout = layout_for(grids, config, CUDA, torch.bfloat16)
    on_host = plan_layout(as_grids(grids), config, CUDA, torch.bfloat16, bucket_for(len(pixels)))
    with torch.no_grad():
        expected = tower(pixels, layout)
    kept = []  # so that each capture finds memory that another one has used
    for _ in range(4):
        runner = GraphRunner(tower, CUDA)
        answers = [runner.run(pixels, on_host) for _ in range(2)]
        with torch.no_grad():
            kept.append((runner, [tower(pixels, layout) for _ in range(4)]))
        for answer in answers:
            assert answer is not None
            assert torch.equal(answer, expected)
