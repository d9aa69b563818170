"""Try a kernel's candidates in child processes, time those that pass, and propose rows."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
import torch

from tests.support.subprocess_pool import outcomes
from tools.tune.kernels import KERNELS, HopperGemmTile, Kernel

MIN_CALLS = 8  # minimum number of calls in a graph
ROUNDS, WARM_UPS = 9, 2
MORE_ERROR = 1.05  # times the current row's error, because an attention may sum in another order


def try_out(name: str, tile: HopperGemmTile, patches: Sequence[int]) -> tuple[float, list[bool]]:
    """Return the error, and whether the bits equal the current row's bits at each size. Raises an
    error if the run fails."""
    kernel, device = KERNELS[name], torch.device("cuda", 0)
    error = 0.0 if kernel.check is None else kernel.check(tile, device)
    same = []
    for n in patches:
        _, run = kernel.prepare(n, device)
        ours, present = run(tile, 0), run(kernel.present(n), 0)
        same.append(all(torch.equal(a, b) for a, b in zip(ours, present, strict=True)))
        if not all(bool(values.isfinite().all()) for values in ours):
            raise ArithmeticError("NaN or infinity in the result")
    return error, same


def passing_candidates(
    kernel: Kernel, patches: Sequence[int], jobs: int, seconds: float
) -> tuple[dict[HopperGemmTile, list[bool]], Counter[str]]:
    """Return the passing candidates with the sizes at which the bits equal the current row's bits,
    and the failures."""
    present = list(dict.fromkeys(kernel.present(n) for n in patches))
    others = [tile for tile in kernel.candidates if tile not in present]
    good: dict[HopperGemmTile, list[bool]] = {}
    failed: Counter[str] = Counter()
    allowed = 0.0
    for tiles in (present, others):  # the current tiles first, for comparison
        arguments = [(kernel.name, tile, patches) for tile in tiles]
        for i, outcome in outcomes(try_out, arguments, at_once=jobs, seconds=seconds):
            problem = outcome.problem
            if problem is None:
                error, same = outcome.value
                if tiles is present:
                    allowed = max(allowed, error * MORE_ERROR)
                elif kernel.check is not None and not error <= allowed:
                    problem = f"{error:.2e} from float64, allowed {allowed:.2e}"
                elif kernel.check is None and not all(same):
                    problem = "other bits than the current row"
            if problem is None:
                good[tiles[i]] = same
                continue
            print(f"{kernel.name}: {tiles[i]}: {problem}", file=sys.stderr)
            failed[problem.split(":")[0]] += 1
            if tiles is present:
                raise click.ClickException(f"the current row of {kernel.name} fails: {problem}")
    return good, failed


def time_candidates(
    kernel: Kernel, tiles: Sequence[HopperGemmTile], patches: int
) -> dict[HopperGemmTile, float]:
    """Return the median microseconds of one call, with interleaved candidates, so that all run at
    the same clocks."""
    device = torch.device("cuda", 0)
    n_weights, run = kernel.prepare(patches, device)
    calls = max(n_weights, MIN_CALLS)
    graphs = {}
    stream = torch.cuda.Stream()
    for tile in tiles:
        graphs[tile] = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run(tile, 0)
            with torch.cuda.graph(graphs[tile], stream=stream):
                for i in range(calls):
                    run(tile, i)
    times: dict[HopperGemmTile, list[float]] = {tile: [] for tile in tiles}
    order = list(tiles)
    for turn in range(WARM_UPS + ROUNDS):
        events = []
        for tile in order[turn % len(order) :] + order[: turn % len(order)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[tile].replay()
            end.record()
            events.append((tile, start, end))
        torch.cuda.synchronize()
        if turn >= WARM_UPS:
            for tile, start, end in events:
                times[tile].append(start.elapsed_time(end) * 1e3 / calls)
    return {tile: statistics.median(values) for tile, values in times.items()}


def propose_rows(
    kernel: Kernel, measured: Mapping[int, Mapping[HopperGemmTile, float]], least_gain: float
) -> dict[int, HopperGemmTile]:
    """Return rows for the table. A new tile must be faster than the current tile by the required
    gain. If a table has one row, its tile is the best over all sizes together. Limits are the
    geometric means of two neighbouring measured sizes.
    """
    if not kernel.has_limits:
        return {0: best_for_all(kernel.rows[0], measured, least_gain)}
    rows: dict[int, HopperGemmTile] = {}
    before = None
    for patches in sorted(measured):
        times, present = measured[patches], kernel.present(patches)
        tile = min(times, key=times.__getitem__)
        if times[present] / times[tile] < 1 + least_gain:
            tile = present
        if before is None:
            rows[0] = tile
        elif tile != rows[max(rows)]:
            middle = math.sqrt(before * patches) / kernel.patches_per_row
            rows[round(middle / 256) * 256] = tile
        before = patches
    return rows


def best_for_all(
    present: HopperGemmTile,
    measured: Mapping[int, Mapping[HopperGemmTile, float]],
    least_gain: float,
) -> HopperGemmTile:
    def gain(tile: HopperGemmTile) -> float:
        ratios = [times[present] / times[tile] for times in measured.values()]
        return statistics.geometric_mean(ratios)

    common = set[HopperGemmTile].intersection(*(set(times) for times in measured.values()))
    best = max(sorted(common, key=str), key=gain)
    return best if gain(best) >= 1 + least_gain else present


def short(tile: HopperGemmTile) -> str:
    return "x".join(str(value) for value in asdict(tile).values())


def sweep(
    kernel: Kernel, patches: Sequence[int], jobs: int, seconds: float, least_gain: float
) -> dict[str, Any]:
    """Sweep one kernel, and return the results as JSON."""
    good, failed = passing_candidates(kernel, patches, jobs, seconds)
    print(f"{kernel.name}: {len(good)} passed, {sum(failed.values())} skipped", file=sys.stderr)
    measured = {n: time_candidates(kernel, list(good), n) for n in patches}
    rows = []
    for i, n in enumerate(patches):
        times, present = measured[n], kernel.present(n)
        best = min(times, key=times.__getitem__)
        rows.append(
            {
                "patches": n,
                "present": asdict(present),
                "present_us": round(times[present], 2),
                "best": asdict(best),
                "best_us": round(times[best], 2),
                "gain": round(times[present] / times[best] - 1, 4),
                "same_bits": good[best][i],
                "all_us": {short(tile): round(us, 2) for tile, us in times.items()},
            }
        )
    new = propose_rows(kernel, measured, least_gain)
    paste = ", ".join(f"({least}, {tile!r})" for least, tile in new.items())
    is_new = any(kernel.serving(new, n) != kernel.present(n) for n in patches)
    return {
        "kernel": kernel.name,
        "table": kernel.table,
        "skipped": dict(failed),
        "rows": rows,
        "proposed": paste if is_new else None,
    }
