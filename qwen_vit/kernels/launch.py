"""Set the options that every kernel launch passes to Triton."""

__all__ = ["LAUNCH"]

# FP fusion merges a multiplication and an addition into one instruction, which changes bits. From
# Triton 3.10 on it is off by default, and TRITON_DEFAULT_FP_FUSION sets the default. Therefore
# every launch sets FP fusion.
LAUNCH = {"enable_fp_fusion": True}
