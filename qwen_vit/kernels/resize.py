"""Resize pictures exactly as Pillow does and cut them into patches, many pictures per launch.

Pillow's bicubic filter on uint8 is integer arithmetic. Each axis that changes takes one pass. For
each output pixel, Pillow computes the filter's weights in float64 and rounds them to fixed point
with 22 fractional bits. The pass sums pixel x weight in int32, rounds, clips to 0..255 and stores
uint8. Sums of integers do not depend on their order. IEEE additions, products and quotients in
float64 have only one result, so the GPU computes the same weights, as long as it does not fuse a
product and a sum.

Source: Pillow, src/libImaging/Resample.c, `precompute_coeffs` and `normalize_coeffs_8bpc`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

__all__ = ["Cut", "Pass", "ResizePlan", "cut", "n_taps", "resize"]

Integers: TypeAlias = NDArray[np.int64]

SUPPORT = 2.0  # source pixels on each side of an output pixel's centre, for a scale of 1
OUTPUTS = 128  # weights of one program
ROWS, COLUMNS = 4, 128  # output pixels of one program of a pass
PATCHES = 4  # of one program that cuts


def n_taps(n_in: int, n_out: int) -> int:
    """Return the number of weights of one output pixel.

    >>> n_taps(100, 56), n_taps(56, 100)
    (9, 5)
    """
    return 2 * math.ceil(SUPPORT * max(n_in / n_out, 1.0)) + 1


class Pass(NamedTuple):
    """Describe one pass over one picture."""

    source: int  # in pixels from the start of the buffer
    target: int  # the same
    source_width: int
    width: int  # of the result
    height: int
    n_in: int  # pixels on the axis that changes
    n_out: int
    is_vertical: bool
    n_taps: int  # weights of one output pixel
    first_weight: int  # the index of n_out first pixels, then of n_taps x n_out weights

    @property
    def n_integers(self) -> int:
        return self.n_out * (1 + self.n_taps)


class Cut(NamedTuple):
    source: int  # in pixels from the start of the buffer
    width: int
    n_patches: int
    first_row: int  # of the result
    second: int = 0  # the `source` of the second frame, if a row holds two frames


class _Launch(NamedTuple):
    """Hold the offsets of a launch's rows and of its programs' row numbers in the table."""

    rows: int
    owners: int
    n_programs: int


@dataclass(frozen=True, slots=True, eq=False)
class ResizePlan:
    """Hold the integers of all launches in one table, for one copy to the GPU.

    Each row of a launch contains a `Pass` or `Cut`, and the number of its first program. The
    programs' row numbers follow the rows.
    """

    table: Integers
    weights: tuple[_Launch, ...]  # one per round
    passes: tuple[_Launch, ...]  # one per round
    cuts: _Launch
    n_weights: int  # int32 values
    n_rows: int  # of the result

    @classmethod
    def of(cls, rounds: Sequence[Sequence[Pass]], cuts: Sequence[Cut]) -> Self:
        """Plan the launches. Each round of passes reads the results of the previous round."""
        parts: list[Integers] = []
        # passes that share weights name the same place
        unique = [list({row.first_weight: row for row in each}.values()) for each in rounds]
        weights = [
            _launch(parts, each, [-(-row.n_out // OUTPUTS) for row in each]) for each in unique
        ]
        passes = [
            _launch(
                parts, each, [-(-row.height // ROWS) * -(-row.width // COLUMNS) for row in each]
            )
            for each in rounds
        ]
        last = _launch(parts, cuts, [-(-row.n_patches // PATCHES) for row in cuts])
        return cls(
            np.concatenate(parts), tuple(weights), tuple(passes), last,
            sum(row.n_integers for each in unique for row in each),
            cuts[-1].first_row + cuts[-1].n_patches if cuts else 0,
        )  # fmt: skip


def _launch(
    parts: list[Integers], rows: Sequence[Pass] | Sequence[Cut], programs: list[int]
) -> _Launch:
    """Append a launch's part of the table, and return its offsets and its number of programs."""
    begin = sum(map(len, parts))
    if not rows:
        return _Launch(begin, begin, 0)
    counts = np.array(programs, np.int64)
    firsts = np.cumsum(counts) - counts
    table = np.column_stack([np.array(rows, np.int64), firsts])
    owners = np.repeat(np.arange(len(rows)), counts)
    parts += [table.ravel(), owners]
    return _Launch(begin, begin + table.size, len(owners))


@triton.jit(do_not_specialize=["rows", "owners"])
def _make_weights(table, rows, owners, weights, FIELDS: tl.constexpr, BN: tl.constexpr):
    i_program = tl.program_id(0)
    p_row = table + rows + tl.load(table + owners + i_program) * FIELDS
    n_in, n_out = tl.load(p_row + 5).to(tl.int32), tl.load(p_row + 6).to(tl.int32)
    n_taps = tl.load(p_row + 8).to(tl.int32)
    p_first = weights + tl.load(p_row + 9)
    o_out = (i_program - tl.load(p_row + 10).to(tl.int32)) * BN + tl.arange(0, BN)  # [BN]
    m_out = o_out < n_out

    scale = n_in.to(tl.float64) / n_out.to(tl.float64)
    stretch = tl.where(scale < 1.0, 1.0, scale)
    support = stretch * 2.0
    inverse = 1.0 / stretch
    b_centre = (o_out.to(tl.float64) + 0.5) * scale  # [BN]
    b_first = (b_centre - support + 0.5).to(tl.int32)  # [BN]
    b_first = tl.where(b_first < 0, 0, b_first)
    b_end = (b_centre + support + 0.5).to(tl.int32)  # [BN]
    b_end = tl.where(b_end > n_in, n_in, b_end)
    tl.store(p_first + o_out, b_first, mask=m_out)

    b_sum = b_centre * 0.0  # [BN]
    for i_tap in range(0, n_taps, 1):
        b_x = _bicubic(((b_first + i_tap).to(tl.float64) - b_centre + 0.5) * inverse)  # [BN]
        b_sum += tl.where(b_first + i_tap < b_end, b_x, 0.0)
    for i_tap in range(0, n_taps, 1):
        b_x = _bicubic(((b_first + i_tap).to(tl.float64) - b_centre + 0.5) * inverse)  # [BN]
        b_x = tl.where(b_first + i_tap < b_end, b_x, 0.0) / b_sum * 4194304.0  # 2^22
        b_k = tl.where(b_x < 0.0, b_x - 0.5, b_x + 0.5).to(tl.int32)  # [BN]
        tl.store(p_first + (i_tap + 1) * n_out + o_out, b_k, mask=m_out)


@triton.jit
def _bicubic(x):
    """Evaluate Pillow's bicubic filter, in the order of its source."""
    x = tl.where(x < 0.0, -x, x)
    b_near = (x * 1.5 - 2.5) * x * x + 1.0
    b_far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, b_near, tl.where(x < 2.0, b_far, 0.0))


@triton.jit(do_not_specialize=["rows", "owners"])
def _resize_axis(
    pixels, table, rows, owners, weights,
    FIELDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """An int32 pixel has the bytes red, green, blue, unused."""
    i_program = tl.program_id(0)
    p_row = table + rows + tl.load(table + owners + i_program) * FIELDS
    source, target = tl.load(p_row), tl.load(p_row + 1)
    source_width = tl.load(p_row + 2).to(tl.int32)
    width, height = tl.load(p_row + 3).to(tl.int32), tl.load(p_row + 4).to(tl.int32)
    n_in, n_out = tl.load(p_row + 5).to(tl.int32), tl.load(p_row + 6).to(tl.int32)
    is_vertical = tl.load(p_row + 7) != 0
    n_taps = tl.load(p_row + 8).to(tl.int32)
    p_first = weights + tl.load(p_row + 9)
    i_tile = i_program - tl.load(p_row + 10).to(tl.int32)
    n_columns = (width + BN - 1) // BN
    o_y = (i_tile // n_columns) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    o_x = (i_tile % n_columns) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    m_out = (o_y < height) & (o_x < width)  # [BM, BN]

    o_out = tl.where(is_vertical, o_y, o_x)  # [BM, BN]
    o_line = tl.where(is_vertical, o_x.to(tl.int64), o_y.to(tl.int64) * source_width)  # [BM, BN]
    step = tl.where(is_vertical, source_width, 1).to(tl.int64)
    b_first = tl.load(p_first + o_out, mask=m_out, other=0)  # [BM, BN]
    b_red = tl.full([BM, BN], 2097152, tl.int32)  # half of 2^22, to round
    b_green = tl.full([BM, BN], 2097152, tl.int32)
    b_blue = tl.full([BM, BN], 2097152, tl.int32)
    for i_tap in range(0, n_taps, 1):
        b_at = b_first + i_tap  # [BM, BN]
        b_at = tl.where(b_at < n_in, b_at, n_in - 1).to(tl.int64)  # beyond it, weights are 0
        b_x = tl.load(pixels + source + o_line + b_at * step, mask=m_out, other=0)  # [BM, BN]
        b_k = tl.load(p_first + (i_tap + 1) * n_out + o_out, mask=m_out, other=0)  # [BM, BN]
        b_red += (b_x & 255) * b_k
        b_green += ((b_x >> 8) & 255) * b_k
        b_blue += ((b_x >> 16) & 255) * b_k
    b_out = _to_byte(b_red) + _to_byte(b_green) * 256 + _to_byte(b_blue) * 65536  # [BM, BN]
    tl.store(pixels + target + o_y.to(tl.int64) * width + o_x, b_out, mask=m_out)


@triton.jit
def _to_byte(x):
    x = x >> 22
    x = tl.where(x < 0, 0, x)
    return tl.where(x > 255, 255, x)


@triton.jit(do_not_specialize=["rows", "owners"])
def _cut_patches(
    pixels, table, rows, owners, out,
    FIELDS: tl.constexpr, SIDE: tl.constexpr, MERGE: tl.constexpr, FRAMES: tl.constexpr,
    BM: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gather BM patches in grid order: out (N, 3 x FRAMES x SIDE x SIDE).

    The values of a row are in the order channel, frame, row, column. FRAMES is 1 or 2.
    """
    i_program = tl.program_id(0)
    p_row = table + rows + tl.load(table + owners + i_program) * FIELDS
    source, width = tl.load(p_row), tl.load(p_row + 1).to(tl.int32)
    n_patches, first_row = tl.load(p_row + 2).to(tl.int32), tl.load(p_row + 3)
    i_first = (i_program - tl.load(p_row + 5).to(tl.int32)) * BM
    o_patch = i_first + tl.arange(0, BM)[:, None]  # [BM, 1]
    o_p = tl.arange(0, P_BLOCK)[None, :]  # [1, P_BLOCK]
    m_out = (o_patch < n_patches) & (o_p < 3 * FRAMES * SIDE * SIDE)  # [BM, P_BLOCK]

    # a merge unit's patches are adjacent; units are in raster order
    i_unit, i_inner = o_patch // (MERGE * MERGE), o_patch % (MERGE * MERGE)  # [BM, 1]
    n_units = width // (SIDE * MERGE)
    i_patch_row = (i_unit // n_units) * MERGE + i_inner // MERGE  # [BM, 1]
    i_patch_column = (i_unit % n_units) * MERGE + i_inner % MERGE  # [BM, 1]
    i_channel, i_within = o_p // (FRAMES * SIDE * SIDE), o_p % (SIDE * SIDE)  # [1, P_BLOCK]
    if FRAMES == 2:
        is_second = (o_p // (SIDE * SIDE)) % 2 != 0  # [1, P_BLOCK]
        source = tl.where(is_second, tl.load(p_row + 4), source)  # [1, P_BLOCK]
    o_y = i_patch_row * SIDE + i_within // SIDE  # [BM, P_BLOCK]
    o_x = i_patch_column * SIDE + i_within % SIDE  # [BM, P_BLOCK]
    b_x = tl.load(pixels + source + o_y.to(tl.int64) * width + o_x, mask=m_out, other=0)
    b_x = ((b_x >> (i_channel * 8)) & 255).to(tl.uint8)  # [BM, P_BLOCK]
    o_row = first_row + o_patch.to(tl.int64)  # [BM, 1]
    tl.store(out + o_row * (3 * FRAMES * SIDE * SIDE) + o_p, b_x, mask=m_out)


def resize(plan: ResizePlan, table: torch.Tensor, pixels: torch.Tensor) -> None:
    """Run a plan's passes on int32 `pixels`, a buffer that also has space for the results.

    `table` is the plan's table on the device of `pixels`. The call does not wait for the GPU.
    """
    weights = torch.empty(plan.n_weights, dtype=torch.int32, device=pixels.device)
    with torch.cuda.device_of(pixels):
        for weigh, change in zip(plan.weights, plan.passes, strict=True):
            _run(
                _make_weights, weigh.n_programs,
                table, weigh.rows, weigh.owners, weights,
                FIELDS=len(Pass._fields) + 1, BN=OUTPUTS,
            )  # fmt: skip
            _run(
                _resize_axis, change.n_programs,
                pixels, table, change.rows, change.owners, weights,
                FIELDS=len(Pass._fields) + 1, BM=ROWS, BN=COLUMNS,
            )  # fmt: skip


def cut(
    plan: ResizePlan, table: torch.Tensor, pixels: torch.Tensor, *, side: int, merge: int,
    frames: int = 1, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gather the patches of a plan's cuts: uint8 (N, 3 x frames x side x side), in grid order.

    `side` is the side of a patch, in pixels. `merge` is the side of a merge unit, in patches.
    `frames` is 2 for the rows of videos. `out` receives the rows, if given.
    """
    shape = (plan.n_rows, 3 * frames * side**2)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=pixels.device)
    with torch.cuda.device_of(pixels):
        _run(
            _cut_patches, plan.cuts.n_programs,
            pixels, table, plan.cuts.rows, plan.cuts.owners, out,
            FIELDS=len(Cut._fields) + 1, SIDE=side, MERGE=merge, FRAMES=frames,
            BM=PATCHES, P_BLOCK=triton.next_power_of_2(shape[1]),
        )  # fmt: skip
    return out


def _run(kernel: Any, n_programs: int, *args: Any, **constants: int) -> None:
    kernel[(n_programs,)](*args, **constants, num_warps=4, enable_fp_fusion=False)
