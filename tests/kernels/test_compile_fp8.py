"""Test that the e4m3 GEMMs compile to correct code for Hopper and for other GPUs, without a GPU."""

from typing import Any

import pytest
from triton.experimental.gluon import language as gl

from qwen_vit.kernels import linear, linear_fp8, linear_fp8_hopper, linear_hopper
from tests.support.compile_cases import SHARED_MEMORY
from tests.support.compile_kernels import compile_fp8_gemm, compile_gemm
from tests.support.hopper_compile import REGISTERS, compile_for_hopper, tma_block

# (K, chunks of sums of squares) of the published GEMMs
PRODUCTS = {"swiglu": (1280, 10), "residual": (3456, 0)}
CASES = sorted(
    {(epilogue, tile) for epilogue, rows in linear_fp8_hopper.TILES.items() for _, tile in rows},
    key=str,
)
# The bytes of addresses and the bias that a kernel may spill outside its loops, once for each tile.
# Triton 3.6 spills 272 bytes.
SPILLS = 320
# compute capability -> bytes that the plain kernels spill outside loops
SPILLED = {(89, "swiglu"): 8}


@pytest.mark.parametrize(("epilogue", "tile"), CASES)
def test_hoppers_e4m3_gemm_compiles_to_correct_code(
    epilogue: str, tile: linear_hopper.HopperGemmTile
) -> None:
    K, chunks = PRODUCTS[epilogue]
    rows, half = tile.rows // tile.num_groups, linear_fp8_hopper.HALF
    is_gated = epilogue == "swiglu"
    out = tma_block([rows, 64], gl.float8e4nv) if is_gated else tma_block([rows, half])
    signature = {
        "x": tma_block([rows, 128], gl.float8e4nv),
        "weight": tma_block([half, 128], gl.float8e4nv),
        "out": out,
        "residual": out,
        "bias": "*bf16",
        **dict.fromkeys(("x_scales", "weight_scale", "squares", "beside"), "*fp32"),
        "eps": "fp32",
        **dict.fromkeys(("M", "n_row_tiles", "n_column_tiles"), "i32"),
    }
    constants = {
        "K": K,
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
        linear_fp8_hopper._fp8_hopper_gemm, signature, constants, num_warps=4, launch_pdl=True
    )
    print(compiled)
    assert (compiled.corrupt_descriptors, compiled.spills_in_loops) == (0, 0)
    assert compiled.spill_bytes <= SPILLS
    assert (compiled.unfenced_reads, compiled.barriers_left, compiled.barrier_arrays) == (0, 0, 4)
    assert not compiled.serialised_wgmma
    assert compiled.wgmma_shapes == {f"m64n{half}k32"}
    assert compiled.shared_bytes <= SHARED_MEMORY
    assert compiled.registers * 128 * (tile.num_groups + 1) <= REGISTERS


@pytest.mark.parametrize(
    "tile", sorted({tile for _, tile in linear_hopper.TILES["residual", False]}, key=str)
)
def test_proj_with_e4m3_rows_compiles_to_correct_code(
    tile: linear_hopper.HopperGemmTile,
) -> None:
    assert tile.columns == 128  # a scale's columns
    rows = tile.rows // tile.num_groups
    block = tma_block([rows, tile.columns])
    signature = {
        "x": tma_block([rows, linear_hopper.BK]),
        "weight": tma_block([tile.columns, linear_hopper.BK]),
        "out": block,
        "residual": block,
        "bias": "*bf16",
        **dict.fromkeys(("squares", "squares_out", "scales_out"), "*fp32"),
        "rows_out": "*fp8e4nv",
        "eps": "fp32",
        **dict.fromkeys(("M", "n_row_tiles", "n_column_tiles"), "i32"),
    }
    constants = {
        "K": 1280,
        "BM": tile.rows,
        "BN": tile.columns,
        "STAGES": tile.num_stages,
        "GROUPS": tile.num_groups,
        "GROUP": linear_hopper.GROUPED_ROW_TILES,
        "EPILOGUE": "residual",
        "SQUARES": 0,
        "FIRST": linear_hopper.FIRST_STEPS,
    }
    compiled = compile_for_hopper(
        linear_hopper._hopper_gemm, signature, constants, num_warps=4, launch_pdl=True
    )
    print(compiled)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert (compiled.unfenced_reads, compiled.barriers_left, compiled.barrier_arrays) == (0, 0, 4)
    assert compiled.shared_bytes <= SHARED_MEMORY
    assert compiled.registers * 128 * (tile.num_groups + 1) <= REGISTERS


# compute capability -> bytes of shared memory for one program
OTHERS = {89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@pytest.mark.parametrize("epilogue", [*PRODUCTS, "proj"])
@pytest.mark.parametrize("capability", OTHERS)
def test_the_plain_kernels_compile_for_every_gpu_with_e4m3(capability: int, epilogue: str) -> None:
    is_proj = epilogue == "proj"
    tile = linear.QUANTIZING if is_proj else linear_fp8.TILES[epilogue]
    found = (
        compile_gemm(16, "residual", tile, capability=capability, is_quantizing=True)
        if is_proj else compile_fp8_gemm(epilogue, tile, *PRODUCTS[epilogue], capability)
    )  # fmt: skip
    print(capability, epilogue, found)
    assert found.spill_bytes <= SPILLED.get((capability, epilogue), 0)
    assert found.shared_bytes <= OTHERS[capability]
    assert found.registers * 32 * tile.num_warps <= REGISTERS


@pytest.mark.parametrize(
    ("kernel", "counts"),
    [(linear_fp8._fp8_gemm, {"M"}), (linear_fp8_hopper._fp8_hopper_gemm, {"M", "n_row_tiles"})],
    ids=("plain", "hopper"),
)
def test_one_binary_serves_every_number_of_rows(kernel: Any, counts: set[str]) -> None:
    assert {each.name for each in kernel.params if each.do_not_specialize} == counts
