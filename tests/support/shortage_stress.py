"""Run an export with missing inputs or with too little memory, and then without the shortage.

A trial raises AssertionError for a fault, and returns measurements.
"""

import contextlib
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vit.export.retry import TRANSIENT
from qwen_vit.export.under_way import UNDER_WAY_NAME
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import load_features
from tests.support import kill_harness
from tests.support.export_stress import (
    SHARD_IMAGES,
    Exports,
    digests,
    shards_of,
    start_forked,
    tiny_png,
)  # fmt: skip

# During an outage, a test moves the inputs, and puts one of these at their path.
OUTAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda _: None,
    "an empty folder": Path.mkdir,  # a mount point without its disk
    "a file": Path.touch,
    "a looped link": lambda path: path.symlink_to(path.name),
}


def run_through_outage(
    exports: Exports, kind: str, begin_s: float, length_s: float
) -> tuple[kill_harness.Run, bool]:
    """Run an export without its inputs from `begin_s` on for `length_s`.

    Returns the run, and whether the outage began before the run's end.
    """
    log, begin = exports.folder / "log", time.monotonic()
    moved = exports.inputs.with_name("moved")
    process = exports.start(exports.command(), log)

    def wait_until(seconds: float) -> bool:
        while (left := seconds - (time.monotonic() - begin)) > 0 and process.poll() is None:
            time.sleep(min(left, 0.002))
        return process.poll() is None

    if began := wait_until(begin_s):
        exports.inputs.rename(moved)
        # without a listing, the export would take the file as its input
        if kind != "a file" or (exports.out / "export.json").exists():
            OUTAGES[kind](exports.inputs)
        wait_until(begin_s + length_s)
        if exports.inputs.is_dir():
            exports.inputs.rmdir()
        exports.inputs.unlink(missing_ok=True)
        moved.rename(exports.inputs)
    code = process.wait()
    seconds = time.monotonic() - begin
    return kill_harness.Run(code, seconds, log.read_text("utf-8", "replace")), began


def outages(exports: Exports, *, outages: int, seed: int = 0) -> dict[str, Any]:
    """Run an export through outages, and compare its bytes with an export without outages."""
    rng, begin, count = random.Random(seed), time.monotonic(), Counter[str]()
    kinds, n_transient = Counter[str](), 0
    while count["outages"] < outages:
        kind = rng.choice(list(OUTAGES))
        begin_s = rng.uniform(0, exports.seconds)
        length_s = rng.uniform(0, 1) ** 3 * 2 * exports.seconds
        result, began = run_through_outage(exports, kind, begin_s, length_s)
        assert result.code in (0, 1, 2), result
        assert "Traceback" not in result.errors, result.errors
        if result.code == 2:
            assert result.errors.splitlines()[-1].startswith("error: "), result.errors
        if began:
            count["outages"] += 1
            kinds[kind] += 1
            count[f"exit code {result.code}"] += 1
        n_transient += count_transient_failures(exports)
        if rng.random() < 0.5:  # otherwise the next outage begins with an incomplete export
            finish(exports)
    finish(exports)
    return {
        "outages": count.pop("outages"),
        "by_kind": dict(sorted(kinds.items())),
        **{name.replace(" ", "_"): number for name, number in sorted(count.items())},
        "failed_for_a_while": n_transient,
        "images": exports.images,
        "images_per_shard": SHARD_IMAGES,
        "seconds": round(time.monotonic() - begin, 1),
    }


def count_transient_failures(exports: Exports) -> int:
    """Count the good images that failed. Each must have an error code that the export retries."""
    if not exports.out.exists():
        return 0
    unbroken = load_features(exports.folder / "unbroken")
    good, lasting = set(unbroken.ids), {error.id: error.code for error in unbroken.errors}
    transient = 0
    for name, digest in shards_of(exports.out).items():
        if exports.expected.get(name) == digest:
            continue
        shard = load_features(exports.out / name)
        assert isinstance(shard, FeatureFile), f"{name} is torn"
        assert len(set(shard.ids)) == len(shard.ids)
        assert set(shard.ids) <= good, set(shard.ids) - good
        for error in shard.errors:
            is_lasting = lasting.get(error.id) == error.code
            assert is_lasting or error.code in TRANSIENT, f"{error.id}: {error.message}"
            transient += not is_lasting
        assert any(error.id in good for error in shard.errors), f"{name} has wrong bytes"
    return transient


def finish(exports: Exports) -> None:
    """Repeat the command without an outage, compare the bytes, and remove the export."""
    result = exports.run()
    assert result.code in (0, 1), result.errors  # 1 if an image failed in this run
    assert digests(exports.out) == exports.expected
    names = {path.name for path in exports.out.iterdir()}
    assert names == {*exports.expected, "manifest.parquet"}, names
    shutil.rmtree(exports.out)


MEGABYTE = 2**20
LARGE_SIDE = 3_000  # the side of an image that takes about 100 MB of memory


def write_small_images(folder: Path, count: int) -> None:
    """Write small images to a folder, one to a file."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06}.png").write_bytes(tiny_png(number))


def write_some_large_images(folder: Path, count: int) -> None:
    """Write small images to a folder, and make every tenth image large."""
    write_small_images(folder, count)
    for number in range(5, count, 10):
        side = LARGE_SIDE - number
        colour = (10 + number % 239, 80, 160)
        Image.new("RGB", (side, side), colour).save(folder / f"{number:06}.png")


def status_mb(process_id: int, label: str) -> float:
    """Return a value of /proc/PID/status in MB, such as VmSize, or 0 after the process's end."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{label}:"))
        return int(line.split()[1]) / 1_024
    return 0.0


@dataclass
class Watched:
    """Run an export's command, and measure its memory from the first decoded image on.

    The limits count the growth since that image. Above `address_mb`, the system refuses memory.
    Above `resident_mb`, this class kills the command, like a control group.
    """

    exports: Exports
    address_mb: float | None = None
    resident_mb: float | None = None
    grown: dict[str, float] = field(default_factory=lambda: {"VmSize": 0.0, "VmRSS": 0.0})

    def run(self) -> kill_harness.Run:
        """Run the command to its end."""
        log, begin = self.exports.folder / "log", time.monotonic()
        shutil.rmtree(self.exports.out, ignore_errors=True)
        process = self.exports.start(self.exports.command(), log)
        while process.poll() is None and not self._is_decoding():
            time.sleep(0.002)
        first = {label: status_mb(process.pid, label) for label in self.grown}
        if self.address_mb is not None:
            most = int((first["VmSize"] + self.address_mb) * MEGABYTE)
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
        while process.poll() is None:
            for label, grown in self.grown.items():
                now = status_mb(process.pid, label)
                self.grown[label] = max(grown, now - first[label])
            if self.resident_mb is not None and self.grown["VmRSS"] > self.resident_mb:
                kill_harness.end_group(process)
            time.sleep(0.002)
        errors = log.read_text("utf-8", "replace")
        return kill_harness.Run(process.wait(), time.monotonic() - begin, errors)

    def _is_decoding(self) -> bool:
        """Return whether the command has recorded the images that it decodes."""
        out = self.exports.out
        return out.is_dir() and any(UNDER_WAY_NAME.fullmatch(path.name) for path in out.iterdir())


def memory_edges(
    folder: Path, *, runs: int, images: int, seed: int = 0, forked: bool = False
) -> dict[str, Any]:
    """Run exports under memory limits between no extra memory and their usual memory."""
    rng, begin, count = random.Random(seed), time.monotonic(), Counter[str]()
    start = start_forked if forked else kill_harness.start
    exports = Exports(folder, images, write_some_large_images, start)
    free = Watched(exports)
    free.run()
    shutil.rmtree(exports.out)
    n_transient = 0
    for number in range(runs):
        codes: tuple[int, ...]
        if number % 2:
            kind, codes = "resident", (0, -signal.SIGKILL)
            limited = Watched(exports, resident_mb=rng.uniform(0, free.grown["VmRSS"]))
        else:
            # Arrow's C++ code aborts the process if it has no memory for a thread.
            kind, codes = "address", (0, 1, 2, -signal.SIGABRT)
            limited = Watched(exports, address_mb=rng.uniform(0, free.grown["VmSize"]))
        result = limited.run()
        assert result.code in codes, (limited, result)
        assert "Traceback" not in result.errors, (limited, result.errors)
        count[f"{kind}_limit_exit_code_{result.code}"] += 1
        n_transient += count_transient_failures(exports)
        finish(exports)
    return {
        "runs": runs,
        **dict(sorted(count.items())),
        "failed_for_a_while": n_transient,
        "grown_mb_without_a_limit": {label: round(mb) for label, mb in free.grown.items()},
        "images": images,
        "forked": forked,
        "seconds": round(time.monotonic() - begin, 1),
    }
