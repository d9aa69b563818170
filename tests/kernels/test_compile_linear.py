"""Test that the GEMMs and small kernels compile to correct code for Hopper, without a GPU."""

from typing import Any

import pytest

from qwen_vit.kernels import attention, attention_hopper, linear, linear_hopper, pixels
from tests.support.compile_cases import (
    ATTENTION_CASES,
    ATTENTION_WARPS,
    SHARED_MEMORY,
    TYPES,
    USES,
)
from tests.support.compile_kernels import compile_gemm
from tests.support.hopper_compile import (
    REGISTERS,
    compile_for_hopper,
    tma_block,
)

# The bytes that a bf16 GEMM may spill outside its loop, once for each tile: for the GELU's erf, and
# for the residual of a complete tile. fp32 may spill, because it is for exact results.
SPILLS = {"gelu": 128, "residual": 32}
# tile -> the number of programs on one multiprocessor for which the tile was chosen (default: one)
GEMM_PROGRAMS = {linear.SMALL: 3, linear.SQUARE: 2, linear.FALLBACK_TILES[16]: 3}
# The cases of the plain kernel: the patch embedding on Hopper (narrow), all GEMMs without Gluon,
# and every epilogue in the fallback tiles.
MET = {True: ("plain", "gelu", "normed", "swiglu"), False: ("plain", "residual")}


def gemm_cases() -> list[Any]:
    """Return (bits, epilogue, tile) for each use of Hopper's tiles and of the fallback tiles."""
    cases = {
        (16, epilogue, tile)
        for is_wide, rows in linear.HOPPER_TILES.items()
        for _, tile in rows
        for epilogue in MET[is_wide]
    } | {
        (bits, epilogue, tile)
        for bits, tile in linear.FALLBACK_TILES.items()
        for epilogue in ("plain", "gelu", "normed", "swiglu", "residual")
    }
    named = {
        f"{TYPES[bits]}-{epilogue}-{tile.rows}x{tile.columns}x{tile.depth}-{tile.num_stages}": case
        for case in cases
        for bits, epilogue, tile in [case]
    }
    return [pytest.param(*named[name], id=name) for name in sorted(named)]


@pytest.mark.parametrize(("bits", "epilogue", "tile"), gemm_cases())
def test_a_gemm_compiles_to_correct_code(bits: int, epilogue: str, tile: linear.GemmTile) -> None:
    compiled = compile_gemm(bits, epilogue, tile)
    print(compiled)
    assert compiled.corrupt_descriptors == 0
    assert not compiled.serialised_wgmma
    assert compiled.shared_bytes <= SHARED_MEMORY
    assert compiled.programs_that_fit(tile.num_warps) >= GEMM_PROGRAMS.get(tile, 1)
    if bits == 32:
        assert compiled.wgmma_shapes == set()
    else:
        assert compiled.spill_bytes <= SPILLS.get(epilogue, 0)
        assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}


# (epilogue, K, chunks of sums of squares) of the published GEMMs on Hopper
HOPPER_PRODUCTS = {
    ("plain", False): (1280, 10),
    ("gelu", True): (5120, 0),
    ("plain", True): (5120, 0),
    ("swiglu", False): (1280, 10),
    ("residual", False): (1280, 0),
    ("residual", True): (3456, 0),
}
HOPPER_CASES = sorted(
    {(kind, tile) for kind, rows in linear_hopper.TILES.items() for _, tile in rows}, key=str
)


@pytest.mark.parametrize(("kind", "tile"), HOPPER_CASES)
def test_a_specialised_product_compiles_to_sound_code(
    kind: tuple[str, bool], tile: linear_hopper.HopperGemmTile
) -> None:
    (epilogue, _), (K, chunks) = kind, HOPPER_PRODUCTS[kind]
    rows = tile.rows // tile.num_groups
    out = tma_block([rows, tile.columns // 2 if epilogue == "swiglu" else tile.columns])
    signature = {
        "x": tma_block([rows, linear_hopper.BK]),
        "weight": tma_block([tile.columns, linear_hopper.BK]),
        "out": out,
        "residual": out,
        "bias": "*bf16",
        "squares": "*fp32",
        "squares_out": "*fp32",
        "eps": "fp32",
        "M": "i32",
        "n_row_tiles": "i32",
        "n_column_tiles": "i32",
    }
    constants = {
        "K": K,
        "rows_out": None,
        "scales_out": None,
        "BM": tile.rows,
        "BN": tile.columns,
        "STAGES": tile.num_stages,
        "GROUPS": tile.num_groups,
        "GROUP": linear_hopper.GROUPED_ROW_TILES,
        "EPILOGUE": epilogue,
        "SQUARES": chunks,
        "FIRST": linear_hopper.FIRST_STEPS,
    }
    compiled = compile_for_hopper(
        linear_hopper._hopper_gemm, signature, constants, num_warps=4, launch_pdl=True
    )
    print(compiled)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert (compiled.unfenced_reads, compiled.barriers_left, compiled.barrier_arrays) == (0, 0, 4)
    assert not compiled.serialised_wgmma
    assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}
    assert compiled.shared_bytes <= SHARED_MEMORY
    # one program for each multiprocessor, with the multiplying warpgroups and one producer
    assert compiled.registers * 128 * (tile.num_groups + 1) <= REGISTERS


PIXEL_TILES = sorted(
    {tile for _, tile in linear.HOPPER_TILES[False]} | {linear.FALLBACK_TILES[16]}, key=str
)


# padded uint8 pixels of one frame, and float rows of both frames without a bias
@pytest.mark.parametrize(("n_in", "has_bias"), [(640, True), (1176, False)])
@pytest.mark.parametrize("tile", PIXEL_TILES)
def test_the_gemm_of_pixels_and_fp16_weights_compiles_to_correct_code(
    tile: linear.GemmTile, n_in: int, has_bias: bool
) -> None:
    compiled = compile_gemm(16, "plain", tile, operand="fp16", n_in=n_in, has_bias=has_bias)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert not compiled.serialised_wgmma
    assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}
    assert compiled.programs_that_fit(tile.num_warps) >= GEMM_PROGRAMS[tile]


def test_every_row_of_every_table_is_compiled() -> None:
    """The cases come from the tables, so each new row is compiled."""
    checked = {case.values[2] for case in gemm_cases()} | set(PIXEL_TILES)
    tables = [*linear.HOPPER_TILES.values(), linear.FALLBACK_TILES.items()]
    assert {tile for rows in tables for _, tile in rows} == checked
    on_hopper = {(kind, tile) for kind, rows in linear_hopper.TILES.items() for _, tile in rows}
    assert on_hopper == set(HOPPER_CASES)
    assert set(linear_hopper.TILES) == set(HOPPER_PRODUCTS)
    compiled = {(USES[use]["kind"], bits) for use in USES for _, bits in ATTENTION_CASES}
    assert compiled == set(attention.TILES) == set(ATTENTION_WARPS)


@pytest.mark.parametrize("bits", TYPES)
def test_the_small_kernels_compile_without_spills(bits: int) -> None:
    pointer = f"*{TYPES[bits]}"
    norm = compile_for_hopper(
        linear._rms_norm,
        dict.fromkeys(("x", "weight", "out"), pointer),
        {"C": 1280, "C_PADDED": 2048, "EPS": 1e-6},
        num_warps=4,
    )
    squares = compile_for_hopper(
        linear._row_squares,
        {"x": pointer, "squares": "*fp32", "n_rows": "i32"},
        {"C": 1280, "C_PADDED": 2048, "BM": linear.SQUARED_ROWS},
        num_warps=4,
    )
    operand = "*fp16" if bits == 16 else "*fp32"
    gather = compile_for_hopper(
        pixels._gather_pixels,
        {"pixels": "*u8", "index": "*i32", "out": operand, "n_rows": "i32"},
        {"P": 588, "P_OUT": 640, "P_BLOCK": 1024, "ZERO": 128, "BM": pixels.GATHERED_ROWS},
        num_warps=4,
    )
    assert (norm.spill_bytes, squares.spill_bytes, gather.spill_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("kernel", "counts"),
    [
        (attention._rotate_keys, {"n_rows"}),
        (attention_hopper._full_attention, {"n_tiles"}),
        (attention_hopper._window_attention, set()),
        (linear._gemm, {"M"}),
        (linear._row_squares, {"n_rows"}),
        (linear_hopper._hopper_gemm, {"M", "n_row_tiles"}),
        (pixels._gather_pixels, {"n_rows"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_binary_serves_every_number_of_rows(kernel: Any, counts: set[str]) -> None:
    """Triton compiles another kernel for a count of 1 or a multiple of 16, unless the code forbids
    this."""
    of_images = {each.name for each in kernel.params if each.do_not_specialize}
    assert of_images == counts
