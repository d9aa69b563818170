"""Test that the checks of compiled code find injected faults."""

from dataclasses import replace

from tests.support.hopper_compile import (
    Compiled,
    count_barriers,
    count_corrupt_descriptors,
    count_unfenced_reads,
)


def test_the_scarcest_resource_limits_the_programs() -> None:
    """The H100 tuning guide gives 64 K registers, 228 KB of shared memory and 64 warps."""
    compiled = Compiled(64, 0, False, frozenset(), 1000, 0, 0, 0, 0)
    assert compiled.programs_that_fit(4) == 8  # 8 x 128 threads x 64 registers
    assert replace(compiled, registers=16).programs_that_fit(4) == 16
    assert replace(compiled, shared_bytes=100_000).programs_that_fit(4) == 2
    # the GPU allocates registers in steps of 8: 136
    assert replace(compiled, registers=129).programs_that_fit(8) == 1


# nvdisasm prints two 64-bit additions: the low words, and then the high words with the carry.
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


def test_a_matrix_instruction_after_a_store_needs_a_fence_and_then_a_barrier() -> None:
    """The window kernel once had the fence and the barrier in the wrong order."""
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


def test_a_barrier_that_is_not_kept_to_the_end_is_found() -> None:
    """A bias once used the memory of two barriers. It became NaN when processes shared the GPU."""
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS) == (0, 3)
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS + END.format("%r1")) == (1, 1)
    assert count_barriers(TWO_ARRAYS_OF_BARRIERS + END.format("%r2")) == (1, 2)
    held = TWO_ARRAYS_OF_BARRIERS + END.format("%r1") + END.format("%r3")
    assert count_barriers(held) == (2, 0)
    reused = TWO_ARRAYS_OF_BARRIERS + "	add.s32 	%r3, %r7, 8;\n"  # another use of the memory
    assert count_barriers(reused + END.format("%r1")) == (1, 1)


def test_only_corrupt_descriptors_are_found() -> None:
    """A GEMM of the last 16 dims once read shared memory with a stride changed by the address."""
    assert count_corrupt_descriptors(CORRUPT) == 1
    assert count_corrupt_descriptors(SOUND + CORRUPT + SOUND + CORRUPT) == 2
    for sound in (SOUND, OVERWRITTEN, ANOTHER_CARRY):
        assert count_corrupt_descriptors(sound) == 0
