"""What the compiler makes of every shipped tile on Hopper, seen on any machine."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import triton

from qwen_vit.kernels import attention, attention_hopper, linear, linear_hopper, pixels
from tests.support.hopper_compile import (
    REGISTERS,
    Compiled,
    compile_for_hopper,
    count_barriers,
    count_corrupt_descriptors,
    count_unfenced_reads,
    tma_block,
)

HEADS = 16
HEAD_DIMS = (64, 72, 80, 96, 128)
TYPES = {16: "bf16", 32: "fp32"}
# Who runs what: the tower permutes Q and K and reads axial tables; the public function does not.
WINDOW = {"kind": "window", "adjacent": True, "axial": True}
FRAME = {"kind": "full", "adjacent": True, "axial": True}
PUBLIC = {"kind": "full", "adjacent": False, "axial": False}
USES = {"window": WINDOW, "full": FRAME, "public": PUBLIC}
SHARED_MEMORY = 232_448  # bytes that one program may take on Hopper


@cache
def compile_attention(head_dim: int, bits: int, use_name: str) -> Compiled:
    use = USES[use_name]
    tiles = attention.TILES[use["kind"], bits]
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
        "AXIAL": use["axial"],
        "ADJACENT": use["adjacent"],
        "MASK_SEGMENTS": False,
        "BM": tiles.q_rows,
    }
    kernel = attention._window_attention
    if use["kind"] == "full":
        kernel = attention._full_attention
        constants["BN"] = tiles.k_rows
    return compile_for_hopper(
        kernel,
        pointers | {"scale_log2e": "fp32"},
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


# Bytes that a program may spill. 128 query rows on 4 warps fill every register of the frame kind
# and spill parts of Q, outside the key loop: 8 to 15 % faster all the same (docs/decisions).
ATTENTION_SPILLS = {"window": 0, "full": 128}

# Programs of head dim 80 that share a multiprocessor, which each row was chosen for.
ATTENTION_PROGRAMS = {("window", 16): 5, ("window", 32): 1, ("full", 16): 2, ("full", 32): 2}

# float32 has no matrix instruction to go wrong, and takes the compiler seconds per case
ATTENTION_CASES = [(head_dim, 16) for head_dim in HEAD_DIMS] + [(80, 32)]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("head_dim", "bits"), ATTENTION_CASES)
def test_attention_compiles_to_sound_code(head_dim: int, bits: int, use: str) -> None:
    compiled = compile_attention(head_dim, bits, use)
    print(compiled)
    assert compiled.corrupt_descriptors == 0
    assert compiled.shared_bytes <= SHARED_MEMORY
    if head_dim == 80:
        row = USES[use]["kind"], bits
        programs = compiled.programs_that_fit(attention.TILES[row].num_warps)
        assert programs >= ATTENTION_PROGRAMS[row]
    if bits == 16 and head_dim <= 80:  # the tiles were chosen for 80, which published towers have
        assert not compiled.serialised_wgmma
        assert compiled.spill_bytes <= ATTENTION_SPILLS[USES[use]["kind"]]


@pytest.mark.parametrize("use", USES)
def test_attention_in_bf16_spends_no_multiplication_on_padding(use: str) -> None:
    """Head dim 80 is cut into 64 + 16, so P V has products 64 and 16 wide, and none 128 wide."""
    tiles = attention.TILES[USES[use]["kind"], 16]
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


# Bytes that a bf16 product may spill, once per tile, outside the loop: the erf of the GELU, and the
# residual beside a whole tile. fp32 is for exactness: there ptxas may spill.
SPILLS = {"gelu": 128, "residual": 32}
# Programs that share a multiprocessor, which a tile was chosen for; one where it is not named.
GEMM_PROGRAMS = {linear.SMALL: 3, linear.SQUARE: 2, linear.FALLBACK_TILES[16]: 3}
# What the plain kernel meets: on Hopper the patch embedding (narrow), where Gluon is not known the
# others as well, and in its fallback tiles everything.
MET = {True: ("plain", "gelu", "normed", "swiglu"), False: ("plain", "residual")}


def gemm_cases() -> list[Any]:
    """(bits, epilogue, tile): Hopper's own tiles with all they meet, the fallback's with all."""
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


def compile_gemm(
    bits: int,
    epilogue: str,
    tile: linear.GemmTile,
    operand: str | None = None,
    n_in: int | None = None,
    has_bias: bool = True,
) -> Compiled:
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
    constants = {
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
    assert compiled.programs_that_fit(tile.num_warps) >= GEMM_PROGRAMS.get(tile, 1)
    if bits == 32:
        assert compiled.wgmma_shapes == set()
    else:
        assert compiled.spill_bytes <= SPILLS.get(epilogue, 0)
        assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}


# (epilogue, K, chunks of sums of squares) of the published products on Hopper
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
    # the warpgroups that multiply, and one for the producer: one program for each multiprocessor
    assert compiled.registers * 128 * (tile.num_groups + 1) <= REGISTERS


def test_both_kernels_of_a_regime_take_the_same_plan() -> None:
    """The layout cuts query tiles before it is known which of the two will run."""
    assert attention.TILES["full", 16].q_rows == attention_hopper.Q_ROWS
    assert attention.TILES["window", 16].q_rows == attention_hopper.W_ROWS


def test_the_attention_in_windows_on_hopper_compiles_to_sound_code() -> None:
    kernel = attention_hopper
    rows0, rows1 = (tma_block([kernel.W_ROWS, width]) for width in (kernel.MAIN, kernel.TAIL))
    signature = {
        **dict.fromkeys(("tiles", "axis_index"), "*i32"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        "out": "*bf16",
        "rows0": rows0,
        "rows1": rows1,
        "scale_log2e": "fp32",
    }
    constants = {"H": HEADS, "D": 80, "D0": kernel.MAIN, "D1": kernel.TAIL, "ROWS": kernel.W_ROWS}
    compiled = compile_for_hopper(kernel._window_attention, signature, constants, num_warps=4)
    print(compiled)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert (compiled.unfenced_reads, compiled.barriers_left, compiled.barrier_arrays) == (0, 0, 1)
    assert not compiled.serialised_wgmma
    assert compiled.wgmma_shapes == {"m64n64k16", "m64n16k16"}
    assert compiled.programs_that_fit(4) >= 5


def test_the_specialised_attention_compiles_to_sound_code() -> None:
    kernel = attention_hopper
    main, tail = (tma_block([kernel.K_ROWS, width]) for width in (kernel.MAIN, kernel.TAIL))
    signature = {
        **dict.fromkeys(("tiles", "axis_index"), "*i32"),
        **dict.fromkeys(("qkv", "out"), "*bf16"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        "k0": main,
        "k1": tail,
        "v0": main,
        "v1": tail,
        "n_tiles": "i32",
        "scale_log2e": "fp32",
    }
    constants = {"H": HEADS, "D0": kernel.MAIN, "D1": kernel.TAIL, "BN": kernel.K_ROWS}
    constants |= {"STAGES": kernel.NUM_STAGES, "ROWS": kernel.Q_ROWS // 2}
    compiled = compile_for_hopper(kernel._full_attention, signature, constants, num_warps=4)
    print(compiled)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert (compiled.unfenced_reads, compiled.barriers_left, compiled.barrier_arrays) == (0, 0, 5)
    assert not compiled.serialised_wgmma
    # Q K^T, then P V in its two parts: no multiplication is spent on padding
    assert compiled.wgmma_shapes == {"m64n128k16", "m64n64k16", "m64n16k16"}
    assert compiled.shared_bytes <= SHARED_MEMORY
    assert compiled.registers * 128 * 3 <= REGISTERS


PIXEL_TILES = sorted(
    {tile for _, tile in linear.HOPPER_TILES[False]} | {linear.FALLBACK_TILES[16]}, key=str
)


# uint8 pixels of one frame, padded; and both frames as float rows, whose weight has no bias
@pytest.mark.parametrize(("n_in", "has_bias"), [(640, True), (1176, False)])
@pytest.mark.parametrize("tile", PIXEL_TILES)
def test_the_product_of_pixels_and_fp16_weights_compiles_to_sound_code(
    tile: linear.GemmTile, n_in: int, has_bias: bool
) -> None:
    compiled = compile_gemm(16, "plain", tile, operand="fp16", n_in=n_in, has_bias=has_bias)
    assert (compiled.corrupt_descriptors, compiled.spill_bytes) == (0, 0)
    assert not compiled.serialised_wgmma
    assert compiled.wgmma_shapes == {f"m64n{tile.columns}k16"}
    assert compiled.programs_that_fit(tile.num_warps) >= GEMM_PROGRAMS[tile]


def test_every_row_of_every_table_is_compiled() -> None:
    """A row that is added to a table gets its checks without anybody's thinking of it."""
    checked = {case.values[2] for case in gemm_cases()} | set(PIXEL_TILES)
    tables = [*linear.HOPPER_TILES.values(), linear.FALLBACK_TILES.items()]
    assert {tile for rows in tables for _, tile in rows} == checked
    on_hopper = {(kind, tile) for kind, rows in linear_hopper.TILES.items() for _, tile in rows}
    assert on_hopper == set(HOPPER_CASES)
    assert set(linear_hopper.TILES) == set(HOPPER_PRODUCTS)
    compiled = {(USES[use]["kind"], bits) for use in USES for _, bits in ATTENTION_CASES}
    assert compiled == set(attention.TILES) == set(ATTENTION_PROGRAMS)


def test_programs_that_fit_are_bound_by_the_scarcest() -> None:
    """H100's tuning guide: 64 K registers, 228 KB of shared memory, 64 warps."""
    compiled = Compiled(64, 0, False, frozenset(), 1000, 0, 0, 0, 0)
    assert compiled.programs_that_fit(4) == 8  # 8 x 128 threads x 64 registers
    assert replace(compiled, registers=16).programs_that_fit(4) == 16
    assert replace(compiled, shared_bytes=100_000).programs_that_fit(4) == 2
    assert replace(compiled, registers=129).programs_that_fit(8) == 1  # allotted in eights: 136


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


STORED_THEN_READ = """
        /*0010*/                   STS.128 [R3+UR8], R44 ;
        /*0020*/                   {} ;
        /*0030*/                   {} ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], RZ, !UPT ;
"""
FENCE, BARRIER = "FENCE.VIEW.ASYNC.S", "BAR.SYNC.DEFER_BLOCKING 0x0"


def test_a_matrix_instruction_after_a_store_wants_a_fence_and_then_a_barrier() -> None:
    """The window kernel once had them the other way round."""
    assert count_unfenced_reads(STORED_THEN_READ.format(FENCE, BARRIER)) == 0
    assert count_unfenced_reads(STORED_THEN_READ.format(BARRIER, FENCE)) == 1
    assert count_unfenced_reads(STORED_THEN_READ.format(BARRIER, BARRIER)) == 1


TWO_ARRAYS_OF_BARRIERS = """
	add.s32 	%r1, %r9, 1024;
	mbarrier.init.shared::cta.b64 [%r1], 2;
	add.s32 	%r2, %r9, 1032;
	mbarrier.init.shared::cta.b64 [%r2], 2;
	add.s32 	%r3, %r9, 1048;
	mbarrier.init.shared::cta.b64 [%r3], 1;
"""
END = "	mbarrier.inval.shared::cta.b64 [{}];\n"


def test_a_barrier_that_nothing_holds_to_the_end_is_found() -> None:
    """A bias lay where two of them were, and became NaN when processes took turns on the GPU."""
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS) == (0, 3)
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS + END.format("%r1")) == (1, 1)
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS + END.format("%r2")) == (1, 2)
    held = TWO_ARRAYS_OF_BARRIERS + END.format("%r1") + END.format("%r3")
    assert count_barriers(held) == (2, 0)
    used_again = TWO_ARRAYS_OF_BARRIERS + "	add.s32 	%r3, %r7, 8;\n"  # for something else
    assert count_barriers(used_again + END.format("%r1")) == (1, 1)


def test_a_corrupt_descriptor_is_found_and_sound_ones_are_not() -> None:
    """Once, a product of the last 16 dims read shared memory at a stride made of its address."""
    assert count_corrupt_descriptors(CORRUPT) == 1
    assert count_corrupt_descriptors(SOUND + CORRUPT + SOUND + CORRUPT) == 2
    for sound in (SOUND, OVERWRITTEN, ANOTHER_CARRY):
        assert count_corrupt_descriptors(sound) == 0


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
    """Triton compiles anew where a count is 1, or a multiple of 16, unless it is told not to."""
    of_images = {each.name for each in kernel.params if each.do_not_specialize}
    assert of_images == counts
