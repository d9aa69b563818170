"""Compile the attention and GEMM kernels for a GPU, as their launches do."""

import re
from functools import cache
from typing import Any

import triton

from qwen_vit.kernels import attention, linear, linear_fp8
from tests.support.compile_cases import TYPES, USES
from tests.support.hopper_compile import HOPPER, Compiled, compile_for

HEADS = 16


@cache
def compile_attention(
    head_dim: int, bits: int, use_name: str, capability: int = HOPPER
) -> Compiled:
    """Compile the attention of one use, head dim and width of type."""
    use = USES[use_name]
    tiles = attention.TILES[use["kind"], bits]
    d_main = 1 << (head_dim.bit_length() - 1)
    tail = head_dim - d_main
    pointers = dict.fromkeys(("qkv", "k_rotated", "out"), f"*{TYPES[bits]}")
    pointers |= dict.fromkeys(("cos", "sin"), "*fp32")
    pointers |= dict.fromkeys(("axis_index", "tiles"), "*i32")
    constants = {
        "H": HEADS,
        "D": head_dim,
        "D0": d_main,
        "D1": max(16, triton.next_power_of_2(tail)) if tail else 0,
        "AXIAL": use["axial"],
        "ADJACENT": use["adjacent"],
        "BM": tiles.q_rows,
    }
    kernel = attention._window_attention
    if use["kind"] == "full":
        kernel = attention._full_attention
        constants["BN"] = tiles.k_rows
    return compile_for(
        capability,
        kernel,
        pointers | {"scale_log2e": "fp32"},
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def compile_gemm(
    bits: int,
    epilogue: str,
    tile: linear.GemmTile,
    operand: str | None = None,
    n_in: int | None = None,
    has_bias: bool = True,
    capability: int = HOPPER,
    is_quantizing: bool = False,
) -> Compiled:
    """Compile the GEMM with one epilogue and one tile."""
    dtype = TYPES[bits]
    operand = operand or dtype
    n_out = tile.columns // 2 if epilogue == "swiglu" else tile.columns
    out_block = f"tensordesc<{dtype}[{tile.rows},{n_out}]>"
    signature = {
        "x": f"tensordesc<{operand}[{tile.rows},{tile.depth}]>",
        "weight": f"tensordesc<{operand}[{tile.columns},{tile.depth}]>",
        "bias": "*fp32" if operand == "fp16" else f"*{dtype}",
        "residual": out_block,
        "squares": "*fp32",
        "out": out_block,
        "squares_out": "*fp32",
        "M": "i32",
        "N": "i32",
        "out_scale": "fp32",
        "eps": "fp32",
    }
    constants: dict[str, Any] = {
        "K": n_in or (5120 if epilogue == "gelu" else 1280),
        "HAS_BIAS": has_bias,
        "EPILOGUE": "plain" if epilogue == "normed" else epilogue,
        "SQUARES": 20 if epilogue in ("normed", "swiglu") else 0,
        "PRECISION": "ieee",
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "GROUP": linear.GROUPED_ROW_TILES,
    }
    if is_quantizing:
        rows_out = f"tensordesc<fp8e4nv[{tile.rows},{n_out}]>"
        signature |= {"rows_out": rows_out, "scales_out": "*fp32"}
    else:
        constants |= {"rows_out": None, "scales_out": None}
    return _compile_plain(capability, linear._gemm, signature, constants, tile)


def compile_fp8_gemm(
    epilogue: str, tile: linear.GemmTile, K: int, chunks: int, capability: int = HOPPER
) -> Compiled:
    """Compile the plain e4m3 GEMM with one epilogue and one tile."""
    is_gated = epilogue == "swiglu"
    columns = tile.columns // 2 if is_gated else tile.columns
    signature = {
        "x": f"tensordesc<fp8e4nv[{tile.rows},128]>",
        "weight": f"tensordesc<fp8e4nv[{tile.columns},128]>",
        "out": f"tensordesc<{'fp8e4nv' if is_gated else 'bf16'}[{tile.rows},{columns}]>",
        "residual": f"tensordesc<bf16[{tile.rows},{columns}]>",
        "bias": "*bf16",
        **dict.fromkeys(("x_scales", "weight_scale", "squares", "beside"), "*fp32"),
        "eps": "fp32",
        **dict.fromkeys(("M", "N"), "i32"),
    }
    constants = {
        "residual" if is_gated else "squares": None,
        "K": K,
        "EPILOGUE": epilogue,
        "SQUARES": chunks,
        "BM": tile.rows,
        "BN": tile.columns,
        "GROUP": linear.GROUPED_ROW_TILES,
    }
    return _compile_plain(capability, linear_fp8._fp8_gemm, signature, constants, tile)


def _compile_plain(
    capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any],
    tile: linear.GemmTile,
) -> Compiled:  # fmt: skip
    if capability < HOPPER:  # the launch passes pointers
        constants["TMA"] = False
        signature = {
            name: re.sub(r"tensordesc<(\w+)\[.*", r"*\1", each) for name, each in signature.items()
        }
    return compile_for(
        capability,
        kernel,
        signature,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
