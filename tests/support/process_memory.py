"""What a process holds, as Linux counts it."""

import os
from pathlib import Path


def memory_mb(pid: int) -> tuple[float, float]:
    """What a process has in memory: its own, and mapped files."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    return (resident - shared) * page_mb, shared * page_mb


def open_files(pid: int) -> int:
    """How many descriptors it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
