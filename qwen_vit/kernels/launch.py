"""Set the options that kernel launches pass to Triton. Only `resize` has options of its own."""

__all__ = ["LAUNCH"]

# FP fusion merges a multiplication and an addition into one instruction, which changes bits. From
# Triton 3.10 on it is off by default, and TRITON_DEFAULT_FP_FUSION sets the default. Therefore
# every launch sets FP fusion.
LAUNCH = {"enable_fp_fusion": True}
