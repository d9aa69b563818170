"""Test that CUDA graphs on a GPU have the kernels' bits for every batch, without the padding."""

import random
from functools import cache

import numpy as np
import torch

from qwen_vit.checkpoint.tower_names import expected_tensors
from qwen_vit.config import VisionConfig
from qwen_vit.encoder import VisionEncoder
from qwen_vit.graphs import (
    GraphRunner,
    bucket_for,
)
from qwen_vit.model import plan_layout
from tests.support.goldens import TINY_FOLDER
from tests.support.graph_cases import CUDA, OUT_OF_MEMORY, Faulty, GridTuple
from tests.support.towers import (
    as_grids,
    build_tower,
    gpu,
    layout_for,
    n_patches,
    per_image,
    random_pixels,
)


def random_mix(generator: random.Random, patches: int) -> list[GridTuple]:
    grids: list[GridTuple] = []
    while n_patches(grids) < patches:
        h, w = (2 * generator.randint(2, 20) for _ in range(2))
        grids.append((generator.choice((1, 1, 1, 2)), h, w))
    return grids


@cache
def encoders() -> tuple[VisionEncoder, VisionEncoder]:
    """Return the results with a graph, and kernel by kernel."""
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
    assert by_graph.graphs._captured  # the calls used graphs


@gpu
def test_graphs_support_float32() -> None:
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
def test_two_mixes_of_one_bucket_and_one_size_do_not_share_a_layout() -> None:
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
    assert torch.equal(results[0], results[-1])  # the first input again, after the others
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
    tiny_images: list[GridTuple] = [(1, 2, 2)] * 256
    pixels = random_pixels(1024, 2)
    runner = GraphRunner(by_graph.tower, by_graph.device)
    layout = plan_layout(
        as_grids(tiny_images), by_graph.config, by_graph.device, by_graph.dtype, bucket_for(1024)
    )
    assert runner.run(pixels.pin_memory(), layout) is None
    assert not runner._captured
    assert torch.equal(forward(by_graph, pixels, tiny_images), forward(eager, pixels, tiny_images))


@gpu
def test_the_result_of_a_call_is_not_overwritten_by_the_next() -> None:
    by_graph, _ = encoders()
    first = forward(by_graph, random_pixels(1024, 3), [(1, 32, 32)])
    kept = first.clone()
    forward(by_graph, random_pixels(1024, 4), [(1, 32, 32)])
    torch.cuda.synchronize()
    assert torch.equal(first, kept)


@gpu
def test_encode_with_graphs_has_the_same_bits_for_both_outputs() -> None:
    by_graph, eager = encoders()
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((224, 336), (448, 140))]
    for output in ("merged", "patch"):
        for ours, other in zip(
            by_graph.encode(images, output=output),
            eager.encode(images, output=output),
            strict=True,
        ):
            assert ours.embeds is not None
            assert other.embeds is not None
            assert torch.equal(ours.embeds, other.embeds)


@gpu
def test_graphs_run_on_rows_of_another_processor() -> None:
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
def test_the_padding_of_a_graph_does_not_affect_images() -> None:
    """The padding contains values of an earlier call."""
    by_graph, eager = encoders()
    grids = torch.tensor([[1, 16, 18]])
    rows = torch.randn(288, 1176)
    expected = eager.encode_patches(rows, grids)
    poison = torch.full((480, 1176), float("nan"))
    by_graph.encode_patches(poison, torch.tensor([[1, 20, 24]]))
    assert torch.equal(by_graph.encode_patches(rows, grids), expected)


@gpu
def test_a_graph_gives_the_result_of_the_plain_tower() -> None:
    """Compare with the plain tower in float32, which shares no error with the bf16 kernels."""
    by_graph, _ = encoders()
    exact = build_tower(TINY_FOLDER, device=CUDA)
    grids: list[GridTuple] = [(1, 22, 32), (1, 10, 14)]
    pixels = random_pixels(n_patches(grids), 5)
    with torch.no_grad():
        expected = exact(pixels.to(CUDA), layout_for(grids, exact.config, CUDA))
    ours = forward(by_graph, pixels, grids).float()
    assert (ours - expected).norm() / expected.norm() < 0.05  # bf16, five peaked blocks


@gpu
def test_a_capture_succeeds_after_one_without_memory() -> None:
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
def test_the_first_replay_of_every_capture_is_right() -> None:
    """With cuBLAS in a graph, the first replay of every encoder except a process's first encoder
    was wrong. Later replays were right. In a new process, whose memory is all zeros, the first
    replay was also right. Since then, no GEMM uses cuBLAS.
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
    kept = []  # live encoders, so that each capture reuses another capture's memory
    for _ in range(4):
        runner = GraphRunner(tower, CUDA)
        answers = [runner.run(pixels, on_host) for _ in range(2)]
        with torch.no_grad():
            kept.append((runner, [tower(pixels, layout) for _ in range(4)]))
        for answer in answers:
            assert answer is not None
            assert torch.equal(answer, expected)
