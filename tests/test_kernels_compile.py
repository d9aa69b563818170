"""What the compiler makes of every shipped tile on Hopper, seen on any machine."""

from functools import cache
from typing import Any

import pytest
import triton
from sm90 import Compiled, compile_for_hopper, count_corrupt_descriptors

from qwen_vit.kernels import attention, linear, pixels

HEADS = 16
HEAD_DIMS = (64, 72, 80, 96, 128)
TYPES = {16: "bf16", 32: "fp32"}
# Who runs what: the tower permutes Q and K and reads axial tables; the public function does not.
WINDOW = {"regime": "window", "adjacent": True, "axial": True}
FRAME = {"regime": "frame", "adjacent": True, "axial": True}
PUBLIC = {"regime": "frame", "adjacent": False, "axial": False}
USES = {"window": WINDOW, "frame": FRAME, "public": PUBLIC}
SHARED_MEMORY = 232_448  # bytes that one program may take on Hopper


@cache
def compile_attention(head_dim: int, bits: int, use_name: str) -> Compiled:
    use = USES[use_name]
    tiles = attention.TILES[use["regime"], bits]
    d_main = 1 << (head_dim.bit_length() - 1)
    tail = head_dim - d_main
    pointers = dict.fromkeys(("qkv", "k_rotated", "out"), f"*{TYPES[bits]}")
    pointers |= dict.fromkeys(("cos", "sin"), "*fp32")
    pointers |= dict.fromkeys(("axis_index", "segment_of_row", "tiles"), "*i32")
    constants = {
        "H": HEADS,
        "D": head_dim,
        "D0": d_main,
        "D1": max(16, triton.next_power_of_2(tail)) if tail else 0,
        "K_ROTATED": use["regime"] == "frame",
        "ONE_KEY_TILE": use["regime"] == "window",
        "AXIAL": use["axial"],
        "ADJACENT": use["adjacent"],
        "MASK_SEGMENTS": False,
        "PRECISION": "ieee",
        "BM": tiles.q_rows,
        "BN": tiles.k_rows,
    }
    return compile_for_hopper(
        attention._rope_varlen_attention,
        pointers | {"scale_log2e": "fp32"},
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# Bytes that a program may spill. 128 query rows on 4 warps fill every register of the frame regime
# and spill parts of Q, outside the key loop: 8 to 15 % faster all the same (tools/NOTES.md).
ATTENTION_SPILLS = {"window": 0, "frame": 128}

# float32 has no matrix instruction to go wrong, and takes the compiler seconds per case
ATTENTION_CASES = [(head_dim, 16) for head_dim in HEAD_DIMS] + [(80, 32)]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("head_dim", "bits"), ATTENTION_CASES)
def test_attention_compiles_to_sound_code(head_dim: int, bits: int, use: str) -> None:
    compiled = compile_attention(head_dim, bits, use)
    print(compiled)
    assert compiled.corrupt_descriptors == 0
    assert compiled.shared_bytes <= SHARED_MEMORY
    if bits == 16 and head_dim <= 80:  # the tiles were chosen for 80, which published towers have
        assert not compiled.serialised_wgmma
        assert compiled.spill_bytes <= ATTENTION_SPILLS[USES[use]["regime"]]


@pytest.mark.parametrize("use", USES)
def test_attention_in_bf16_spends_no_multiplication_on_padding(use: str) -> None:
    """Head dim 80 is cut into 64 + 16, so P V has products 64 and 16 wide, and none 128 wide."""
    tiles = attention.TILES[USES[use]["regime"], 16]
    expected = {f"m64n{n}k16" for n in (tiles.k_rows, 64, 16)}
    assert compile_attention(80, 16, use).wgmma_shapes == expected


@pytest.mark.parametrize("use", USES)
def test_attention_in_fp32_never_touches_tf32(use: str) -> None:
    assert compile_attention(80, 32, use).wgmma_shapes == set()


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("bits", TYPES)
def test_the_rotation_of_keys_hardly_spills(bits: int, adjacent: bool) -> None:
    pointers = dict.fromkeys(("qkv", "k_rotated"), f"*{TYPES[bits]}")
    pointers |= {"cos": "*fp32", "sin": "*fp32", "axis_index": "*i32", "n_rows": "i32"}
    constants = {"H": HEADS, "D": 80, "D_PADDED": 128, "AXIAL": adjacent, "ADJACENT": adjacent}
    constants["BN"] = attention.ROTATION_ROWS
    compiled = compile_for_hopper(attention._rotate_keys, pointers, constants, num_warps=4)
    assert compiled.spill_bytes <= (0 if bits == 16 else 40)


# Bytes that a bf16 product may spill: the erf of the GELU, once per tile, outside the loop. fp32 is
# for exactness: there ptxas may spill.
SPILLS = {"plain": 0, "swiglu": 0, "gelu": 128}


# (kind, wide, deep), as in the tile table -> the epilogues that the tower's layers of it have
MET = {
    ("plain", True, False): ("plain",),
    ("plain", False, False): ("plain",),
    ("plain", False, True): ("plain",),
    ("plain", True, True): ("plain", "gelu"),
    ("swiglu", True, False): ("swiglu",),
}


def gemm_cases() -> list[Any]:
    """(bits, epilogue, tile): Hopper's own tiles with all they meet, the fallback's two kernels."""
    cases = {
        (16, epilogue, tile)
        for kind, rows in linear.HOPPER_TILES.items()
        for _, tile in rows
        for epilogue in MET[kind]
    } | {
        (bits, epilogue, tile)
        for bits, tile in linear.FALLBACK_TILES.items()
        for epilogue in ("plain", "swiglu")
    }
    named = {
        f"{TYPES[bits]}-{epilogue}-{tile.rows}x{tile.columns}x{tile.depth}-{tile.num_stages}": case
        for case in cases
        for bits, epilogue, tile in [case]
    }
    return [pytest.param(*named[name], id=name) for name in sorted(named)]


def compile_gemm(
    bits: int, epilogue: str, tile: linear.GemmTile, operand: str | None = None
) -> Compiled:
    dtype = TYPES[bits]
    operand = operand or dtype
    out_block = f"tensordesc<{dtype}[{tile.rows},{tile.columns}]>"
    signature = {
        "x": f"tensordesc<{operand}[{tile.rows},{tile.depth}]>",
        "weight": f"tensordesc<{operand}[{tile.columns},{tile.depth}]>",
        "bias": "*fp32" if operand == "fp16" else f"*{dtype}",
        "out": out_block,
        "M": "i32",
        "N": "i32",
        "out_scale": "fp32",
    }
    constants = {
        "K": 5120 if epilogue == "gelu" else 1280,
        "HAS_BIAS": True,
        "EPILOGUE": epilogue,
        "PRECISION": "ieee",
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "GROUP": linear.GROUPED_ROW_TILES,
    }
    return compile_for_hopper(
        linear._gemm,
        signature,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@pytest.mark.parametrize(("bits", "epilogue", "tile"), gemm_cases())
def test_a_product_compiles_to_sound_code(bits: int, epilogue: str, tile: linear.GemmTile) -> None:
    compiled = compile_gemm(bits, epilogue, tile)
    print(compiled)
    assert compiled.corrupt_descriptors == 0
    assert not compiled.serialised_wgmma
    assert compiled.shared_bytes <= SHARED_MEMORY
    if bits == 32:
        assert compiled.wgmma_shapes == set()
    else:
        assert compiled.spill_bytes <= SPILLS[epilogue]
        assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}


PIXEL_TILES = sorted({tile for _, tile in linear.HOPPER_TILES["plain", False, False]}, key=str)


@pytest.mark.parametrize("tile", PIXEL_TILES)
def test_the_product_of_pixels_and_fp16_weights_compiles_to_sound_code(
    tile: linear.GemmTile,
) -> None:
    compiled = compile_gemm(16, "plain", tile, operand="fp16")
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}


@pytest.mark.parametrize("bits", TYPES)
def test_the_small_kernels_compile_without_spills(bits: int) -> None:
    pointer = f"*{TYPES[bits]}"
    norm = compile_for_hopper(
        linear._rms_norm,
        dict.fromkeys(("x", "update", "weight", "x_out", "out"), pointer),
        {"HAS_UPDATE": True, "C": 1280, "C_PADDED": 2048, "EPS": 1e-6},
        num_warps=4,
    )
    operand = "*fp16" if bits == 16 else "*fp32"
    gather = compile_for_hopper(
        pixels._gather_pixels,
        {"pixels": "*u8", "index": "*i32", "out": operand, "n_rows": "i32"},
        {"P": 588, "P_OUT": 640, "P_BLOCK": 1024, "ZERO": 128, "BM": pixels.GATHERED_ROWS},
        num_warps=4,
    )
    assert (norm.spill_bytes, gather.spill_bytes) == (0, 0)


# Two 64-bit additions as nvdisasm prints them: the low words, then the high words with the carry.
SOUND = """
        /*0460*/                   UIADD3 UR24, UP0, UR4, 0x80, URZ ;
        /*0470*/                   UIADD3.X UR25, UR5, 0x40000040, URZ, UP0, !UPT ;
"""
CORRUPT = """
        /*0460*/                   UIADD3 UR24, UP0, UR4, 0x80, URZ ;
        /*0470*/                   UIADD3.X UR25, UR4, 0x40000040, URZ, UP0, !UPT ;
"""
OVERWRITTEN = """
        /*0460*/                   UIADD3 UR24, UP0, UR4, 0x80, URZ ;
        /*0468*/                   UMOV UR4, 0x40000040 ;
        /*0470*/                   UIADD3.X UR25, UR4, 0x40000040, URZ, UP0, !UPT ;
"""
ANOTHER_CARRY = """
        /*0460*/                   UIADD3 UR24, UP0, UR4, 0x80, URZ ;
        /*0470*/                   UIADD3.X UR25, UR4, 0x40000040, URZ, UP1, !UPT ;
"""


def test_a_corrupt_descriptor_is_found_and_sound_ones_are_not() -> None:
    """Once, a product of the last 16 dims read shared memory at a stride made of its address."""
    assert count_corrupt_descriptors(CORRUPT) == 1
    assert count_corrupt_descriptors(SOUND + CORRUPT + SOUND + CORRUPT) == 2
    for sound in (SOUND, OVERWRITTEN, ANOTHER_CARRY):
        assert count_corrupt_descriptors(sound) == 0
