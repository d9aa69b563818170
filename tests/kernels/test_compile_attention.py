"""Test that the attention kernels compile to correct code for Hopper, without a GPU."""

import pytest

from qwen_vit.kernels import attention, attention_hopper
from tests.support.compile_cases import (
    ATTENTION_CASES,
    ATTENTION_WARPS,
    SHARED_MEMORY,
    TYPES,
    USES,
)
from tests.support.compile_kernels import HEADS, compile_attention
from tests.support.hopper_compile import (
    REGISTERS,
    compile_for_hopper,
    tma_block,
)

# The bytes that a program may spill. 128 query rows on 4 warps use every register of the full kind,
# and spill parts of Q outside the key loop, but are 8 to 15 % faster (docs/decisions).
ATTENTION_SPILLS = {"window": 0, "full": 128}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("head_dim", "bits"), ATTENTION_CASES)
def test_attention_compiles_to_sound_code(head_dim: int, bits: int, use: str) -> None:
    compiled = compile_attention(head_dim, bits, use)
    print(compiled)
    assert compiled.corrupt_descriptors == 0
    assert compiled.shared_bytes <= SHARED_MEMORY
    if head_dim == 80:
        row = USES[use]["kind"], bits
        warps = attention.TILES[row].num_warps
        assert compiled.programs_that_fit(warps) * warps >= ATTENTION_WARPS[row]
    # the tiles were chosen for head dim 80 of the published towers
    if bits == 16 and head_dim <= 80:
        assert not compiled.serialised_wgmma
        assert compiled.spill_bytes <= ATTENTION_SPILLS[USES[use]["kind"]]


@pytest.mark.parametrize("use", USES)
def test_attention_in_bf16_multiplies_no_padding(use: str) -> None:
    """The kernel divides head dim 80 into 64 + 16, so P V has matrix instructions of widths 64 and
    16, but not 128."""
    tiles = attention.TILES[USES[use]["kind"], 16]
    expected = {f"m64n{n}k16" for n in (tiles.k_rows, 64, 16)}
    assert compile_attention(80, 16, use).wgmma_shapes == expected


@pytest.mark.parametrize("use", USES)
def test_attention_in_fp32_does_not_use_tf32(use: str) -> None:
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


def test_both_kernels_of_a_kind_use_the_same_tiles() -> None:
    """The layout has the query tiles before the host chooses one of the two kernels."""
    assert attention.TILES["full", 16].q_rows == attention_hopper.Q_ROWS
    assert attention.TILES["window", 16].q_rows == attention_hopper.W_ROWS


def test_hoppers_window_attention_compiles_to_correct_code() -> None:
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


def test_hoppers_full_attention_compiles_to_correct_code() -> None:
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
    # Q K^T, and P V in two parts, without multiplications of padding
    assert compiled.wgmma_shapes == {"m64n128k16", "m64n64k16", "m64n16k16"}
    assert compiled.shared_bytes <= SHARED_MEMORY
    assert compiled.registers * 128 * 3 <= REGISTERS
