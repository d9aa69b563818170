"""Run exports on disks that become full during the export."""

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.export_stress import SHARD_IMAGES, Exports


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of this number of bytes, which needs permission to mount."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size}"]
    subprocess.run(["mount", *options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disks(exports: Exports, *, disks: int, seed: int = 0) -> dict[str, Any]:
    """Export to a disk of random sizes that becomes full, and resume on a larger disk with the same
    command."""
    folder, unlimited_out = exports.folder, exports.out
    size = sum(path.stat().st_size for path in (folder / "unbroken").iterdir())
    page, rng, begin = os.sysconf("SC_PAGE_SIZE"), random.Random(seed), time.monotonic()
    refusals: Counter[str] = Counter()
    with small_disk(folder / "disk", 2 * size + 100 * page) as disk:
        for _ in range(disks):
            exports.out = disk / "out"
            small = page * rng.randint(2, size // page)
            resize(disk, small)
            result = exports.run()
            assert result.code == 2, (small, result)
            last = result.errors.splitlines()[-1]
            assert last.startswith("error: "), result.errors
            assert "No space left on device" in last, last
            assert "Traceback" not in result.errors
            name = Path(last.split(": could not")[0].removeprefix("error: ")).name
            refusals["a shard" if name.startswith("shard-") else name] += 1
            exports.after_interruption()
            resize(disk, 2 * size + 100 * page)
            exports.after_end(exports.run())
    exports.out = unlimited_out
    return {
        "disks": disks,
        "images": exports.images,
        "images_per_shard": SHARD_IMAGES,
        "most_images_done_twice": exports.most_redone,
        "full_while_writing": dict(refusals.most_common()),
        "seconds": round(time.monotonic() - begin, 1),
    }


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)


def may_mount() -> bool:
    """Return whether this machine can mount a small disk."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder, "disk"), 2**20):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False
