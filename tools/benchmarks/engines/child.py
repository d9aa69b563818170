"""Run one vLLM engine per process for `tools.benchmarks.engines`: towers and answers.

python -m tools.benchmarks.engines.child VARIANT FOLDER    its figures, to FOLDER/VARIANT.json

Except for the plugin in bf16, it interleaves runs of the engine's tower and of our tower in bf16,
with the same weights. Therefore a ratio compares times in one process on one GPU at one
temperature.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_vit import VisionEncoder
from qwen_vit.checkpoint.load import load_checkpoint
from qwen_vit.config import Grid
from qwen_vit.integrations.engine_tower import EngineTower
from tools.benchmarks.engines.model import embeddings_file, small_folder
from tools.benchmarks.engines.workloads import (
    N_REQUESTS,
    NEW_TOKENS,
    PROMPT,
    TOWER_WORKLOADS,
    n_tokens,
    picture,
    request_sizes,
)

ROUNDS, CALLS = 7, 5
ENGINE = {
    "max_model_len": 18_000, "max_num_batched_tokens": 18_000, "gpu_memory_utilization": 0.9,
    "limit_mm_per_prompt": {"image": 32, "video": 1}, "max_logprobs": -1,
    "enable_prefix_caching": False, "mm_processor_cache_gb": 0, "dtype": "bfloat16", "seed": 0,
}  # fmt: skip


def start(folder: Path, variant: str) -> Any:
    """Start vLLM with the small model, by default, with encoder graphs, compiled, or with our
    tower."""
    from vllm import LLM

    # Do not compile the language model, and capture few graphs, because only the tower is timed.
    compilation: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    compilation["cudagraph_capture_sizes"] = [1, 128]
    if variant in ("graphs", "compiled"):
        compilation["cudagraph_mm_encoder"] = True
        # The best case for vLLM: each workload has a graph of exactly its size.
        budgets = sorted({n_tokens(grids) for grids in TOWER_WORKLOADS.values()})
        compilation["encoder_cudagraph_token_budgets"] = budgets
        compilation["encoder_cudagraph_max_vision_items_per_batch"] = 32
    if variant == "compiled":
        compilation |= {"compile_mm_encoder": True, "mode": 3, "cudagraph_mode": "PIECEWISE"}
    ours = {"qwen_vit": {"quantization": "fp8"}} if variant == "plugin-fp8" else {}
    return LLM(
        model=str(small_folder(folder, 0)), compilation_config=compilation,
        additional_config=ours, **ENGINE,
    )  # fmt: skip


def in_worker(engine: Any, function: Callable[[Any], Any]) -> Any:
    """Run a function of vLLM's worker in this process."""
    [result] = engine.collective_rpc(function)
    return result


def median_ms(calls: list[Callable[[], Any]]) -> list[float]:
    """Return the median time of each call, from interleaved runs."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for call, own in zip(calls, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            own.append(begin.elapsed_time(end) / CALLS)
    return [statistics.median(own) for own in times]


def time_towers(engine: Any, folder: Path, variant: str) -> dict[str, Any]:
    """Return the milliseconds of the engine's tower in the engine's calls, and of our tower."""

    def run(worker: Any) -> dict[str, Any]:
        from vllm.forward_context import set_forward_context

        runner = worker.model_runner
        manager = getattr(runner, "encoder_cudagraph_manager", None)
        ours = our_tower(folder, runner.device) if variant != "plugin" else None
        found = {}
        with torch.inference_mode(), set_forward_context(None, runner.vllm_config):
            for name, grids in TOWER_WORKLOADS.items():
                rows = rows_of(grids, runner.device, runner.dtype)
                inputs = {"pixel_values": rows, "image_grid_thw": grid_tensor(grids)}

                def theirs(inputs: dict[str, Any] = inputs) -> Any:
                    if manager is not None:
                        return manager.execute(inputs)
                    return runner.model.embed_multimodal(**inputs)

                lists = [[grid.t, grid.h, grid.w] for grid in grids]
                calls: list[Callable[[], Any]] = [theirs]
                figures: dict[str, Any] = {}
                if ours is not None:
                    calls.append(partial(ours, rows, lists))
                    output, expected = ours(rows, lists).float(), torch.cat(list(theirs())).float()
                    figures["distance"] = float((output - expected).norm() / expected.norm())
                times = median_ms(calls)
                figures["ms"] = times[0]
                if len(times) == 2:
                    figures["ours_ms"], figures["ratio"] = times[1], times[0] / times[1]
                found[name] = figures
        if manager is not None:
            found["graph_use"] = manager.get_cumulative_stats()
        return found

    result: dict[str, Any] = in_worker(engine, run)
    return result


def our_tower(folder: Path, device: torch.device) -> EngineTower:
    """Return our tower with the small model's weights."""
    checkpoint = load_checkpoint(small_folder(folder, 0))
    tower = EngineTower(checkpoint.config, checkpoint.image_config, torch.bfloat16, device)
    tower.load_weights(checkpoint.tensors.items())
    return tower


def rows_of(grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    n = sum(grid.n_patches for grid in grids)
    generator = torch.Generator(device).manual_seed(n)
    return torch.randn(n, 1176, generator=generator, device=device).to(dtype)


def grid_tensor(grids: tuple[Grid, ...]) -> Tensor:
    return torch.tensor([[grid.t, grid.h, grid.w] for grid in grids])


def answers(engine: Any) -> dict[str, Any]:
    """Send 128 requests together, and return tokens, the first token's log-probabilities, and the
    time."""
    from vllm import SamplingParams

    requests = [
        {"prompt": PROMPT, "multi_modal_data": {"image": picture(*size, seed)}}
        for seed, size in enumerate(request_sizes())
    ]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=-1, ignore_eos=True)
    started = time.perf_counter()
    done = engine.generate(requests, sampling, use_tqdm=False)
    took = time.perf_counter() - started
    tokens = [list(each.outputs[0].token_ids) for each in done]
    first = [each.outputs[0].logprobs[0] for each in done]
    logprobs = [[step[i].logprob for i in range(len(step))] for step in first]
    return {"tokens": tokens, "logprobs": logprobs, "images_per_s": N_REQUESTS / took}


def answers_and_embeddings(engine: Any, file: Path) -> dict[str, Any]:
    """Return `answers`, and write the tower's embeddings, in the order of the requests."""
    seen: list[tuple[list[list[int]], Tensor]] = []

    def keep(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        grids = named.get("grid_thw", inputs[1] if len(inputs) > 1 else None)
        seen.append((torch.as_tensor(grids).tolist(), output.detach().cpu()))

    def hook(worker: Any) -> Any:
        visual = worker.model_runner.model.visual
        return visual.register_forward_hook(keep, with_kwargs=True)

    handle = in_worker(engine, hook)
    found = answers(engine)
    handle.remove()
    grids = [grid for each, _ in seen for grid in each]
    if grids != [[1, height // 14, width // 14] for width, height in request_sizes()]:
        raise click.ClickException("the engine encoded other images, or in another order")
    save_file({"embeddings": torch.cat([output for _, output in seen])}, file)
    return found


def take_weights(engine: Any, folder: Path) -> None:
    """Load the weights of another model of the same shape into the engine's model."""

    def load(worker: Any) -> None:
        tensors = load_file(folder / "model.safetensors", device="cuda")
        worker.model_runner.model.load_weights(tensors.items())

    in_worker(engine, load)


def first_requests(engine: Any) -> dict[str, Any]:
    """Return the seconds of the first ten sequential requests after the engine is ready."""
    from vllm import SamplingParams

    times = []
    for seed in range(10):
        request = {"prompt": PROMPT, "multi_modal_data": {"image": picture(896, 896, 500 + seed)}}
        started = time.perf_counter()
        engine.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
        times.append(time.perf_counter() - started)
    return {"seconds": times, "first_to_tenth": times[0] / times[9]}


def same_bits(engine: Any, folder: Path, quantization: str | None) -> dict[str, Any]:
    """Return whether the engine's tower gave the bits of `encode_patches` on the same rows."""
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def keep(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        grids = named.get("grid_thw", inputs[1] if len(inputs) > 1 else None)
        seen.append((inputs[0].clone(), grids, output.clone()))

    def hook(worker: Any) -> None:
        visual = worker.model_runner.model.visual
        visual.register_forward_hook(keep, with_kwargs=True)

    in_worker(engine, hook)
    answers(engine)
    encoder = VisionEncoder.from_pretrained(
        small_folder(folder, 0), device="cuda", quantization=quantization
    )
    equal = [
        torch.equal(encoder.encode_patches(rows, torch.tensor(grids)), output)
        for rows, grids, output in seen
    ]
    return {"calls": len(equal), "equal": sum(equal), "row_dtype": str(seen[0][0].dtype)}


def memory(engine: Any) -> dict[str, float]:
    """Return the free GPU memory in GB."""
    free, total = torch.cuda.mem_get_info()
    return {"free_gb": free / 1e9, "total_gb": total / 1e9}


@click.command(help=__doc__)
@click.argument(
    "variant", type=click.Choice(["default", "graphs", "compiled", "plugin", "plugin-fp8"])
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--answers-only", is_flag=True, help="Check answers without timing a tower.")
@click.option("--weights", default=1, help="Answer with this number of random models.")
def main(variant: str, folder: Path, weights: int, *, answers_only: bool) -> None:
    """Start one engine, send requests and measure times."""
    started = time.perf_counter()
    engine = start(folder, variant)
    found: dict[str, Any] = {"start_s": time.perf_counter() - started, "ready": memory(engine)}
    if variant in ("default", "plugin"):
        found["first_requests"] = first_requests(engine)
        found["answers"] = []
        for seed in range(weights):
            if seed:
                take_weights(engine, small_folder(folder, seed))
            file = embeddings_file(folder, variant, seed)
            found["answers"].append(answers_and_embeddings(engine, file))
        if weights > 1:
            take_weights(engine, small_folder(folder, 0))
    found["towers"] = {} if answers_only else time_towers(engine, folder, variant)
    if variant.startswith("plugin") and not answers_only:
        found["bits"] = same_bits(engine, folder, "fp8" if variant == "plugin-fp8" else None)
    found["at_the_end"] = memory(engine)
    (folder / f"{variant}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
