"""Provide helpers for the tests of compiled kernels."""

from typing import Any

HEAD_DIMS = (64, 72, 80, 96, 128)
TYPES = {16: "bf16", 32: "fp32"}
# The tower permutes Q and K, and reads axial tables. The public function does not.
WINDOW = {"kind": "window", "adjacent": True, "axial": True}
FRAME = {"kind": "full", "adjacent": True, "axial": True}
PUBLIC = {"kind": "full", "adjacent": False, "axial": False}
USES: dict[str, dict[str, Any]] = {"window": WINDOW, "full": FRAME, "public": PUBLIC}
SHARED_MEMORY = 232_448  # bytes that one program may take on Hopper
# The warps on one multiprocessor at head dim 80, for which the tiles were chosen.
ATTENTION_WARPS = {("window", 16): 20, ("window", 32): 8, ("full", 16): 8, ("full", 32): 8}
# One float32 case: it has no matrix instruction, and a compilation takes seconds.
ATTENTION_CASES = [(head_dim, 16) for head_dim in HEAD_DIMS] + [(80, 32)]
