"""Measure the memory and open files of a process, as Linux counts them."""

import os
from pathlib import Path


def memory_mb(pid: int) -> tuple[float, float]:
    """Return the private memory and the memory of mapped files of a process, in MB."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    return (resident - shared) * page_mb, shared * page_mb


def peak_mb(*, forget: bool = False) -> float:
    """Return the peak memory of this process since the last call with `forget`, in MB."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def open_files(pid: int) -> int:
    """Return the number of open descriptors."""
    return len(os.listdir(f"/proc/{pid}/fd"))
