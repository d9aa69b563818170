"""Enable FP fusion for all kernel launches except those of `resize`, which disable it."""

__all__ = ["LAUNCH"]

# FP fusion merges a multiplication and an addition into one instruction, which changes bits. Triton
# 3.9 warns that 3.10 will switch it off by default, and TRITON_DEFAULT_FP_FUSION sets the default.
# Therefore every launch sets FP fusion.
LAUNCH = {"enable_fp_fusion": True}
