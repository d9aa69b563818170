"""Run an export while its inputs are away or its memory is short, and then without the shortage.

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

# what is at the inputs' path during an outage
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
    away = exports.inputs.with_name("away")
    process = exports.start(exports.command(), log)

    def works_until(seconds: float) -> bool:
        while (left := seconds - (time.monotonic() - begin)) > 0 and process.poll() is None:
            time.sleep(min(left, 0.002))
        return process.poll() is None

    if began := works_until(begin_s):
        exports.inputs.rename(away)
        if kind != "a file" or (exports.out / "export.json").exists():
            OUTAGES[kind](exports.inputs)  # before the listing, a file would be the input
        works_until(begin_s + length_s)
        if exports.inputs.is_dir():
            exports.inputs.rmdir()
        exports.inputs.unlink(missing_ok=True)
        away.rename(exports.inputs)
    code = process.wait()
    seconds = time.monotonic() - begin
    return kill_harness.Run(code, seconds, log.read_text("utf-8", "replace")), began


def outages(exports: Exports, *, outages: int, seed: int = 0) -> dict[str, Any]:
    """Run an export through outages; afterwards its bytes are those of an unbroken export."""
    chance, begin, count = random.Random(seed), time.monotonic(), Counter[str]()
    kinds, failed_for_a_while = Counter[str](), 0
    while count["outages"] < outages:
        kind = chance.choice(list(OUTAGES))
        begin_s = chance.uniform(0, exports.seconds)
        length_s = chance.uniform(0, 1) ** 3 * 2 * exports.seconds
        result, began = run_through_outage(exports, kind, begin_s, length_s)
        assert result.code in (0, 1, 2), result
        assert "Traceback" not in result.errors, result.errors
        if result.code == 2:
            assert result.errors.splitlines()[-1].startswith("error: "), result.errors
        if began:
            count["outages"] += 1
            kinds[kind] += 1
            count[f"exit code {result.code}"] += 1
        failed_for_a_while += failures_for_a_while(exports)
        if chance.random() < 0.5:  # otherwise the next outage meets what this one left
            finish(exports)
    finish(exports)
    return {
        "outages": count.pop("outages"),
        "by_kind": dict(sorted(kinds.items())),
        **{name.replace(" ", "_"): number for name, number in sorted(count.items())},
        "failed_for_a_while": failed_for_a_while,
        "images": exports.images,
        "images_per_shard": SHARD_IMAGES,
        "seconds": round(time.monotonic() - begin, 1),
    }


def failures_for_a_while(exports: Exports) -> int:
    """Count the good images that failed; each must have a code that the export tries again."""
    if not exports.out.exists():
        return 0
    unbroken = load_features(exports.folder / "unbroken")
    good, lasting = set(unbroken.ids), {error.id: error.code for error in unbroken.errors}
    for_a_while = 0
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
            for_a_while += not is_lasting
        assert any(error.id in good for error in shard.errors), f"{name} has other bytes"
    return for_a_while


def finish(exports: Exports) -> None:
    """Run the same command again without an outage, compare the bytes, and clear them away."""
    result = exports.run()
    assert result.code in (0, 1), result.errors  # 1 where an image failed in this very run
    assert digests(exports.out) == exports.expected
    names = {path.name for path in exports.out.iterdir()}
    assert names == {*exports.expected, "manifest.parquet"}, names
    shutil.rmtree(exports.out)


MEGABYTE = 2**20
LARGE_SIDE = 3_000  # of a picture that takes some 100 MB of memory


def write_small_images(folder: Path, count: int) -> None:
    """Write small pictures, of which a file each is in a folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06}.png").write_bytes(tiny_png(number))


def write_some_large_images(folder: Path, count: int) -> None:
    """Write small pictures, and in place of every tenth one a large one."""
    write_small_images(folder, count)
    for number in range(5, count, 10):
        side = LARGE_SIDE - number
        colour = (10 + number % 239, 80, 160)
        Image.new("RGB", (side, side), colour).save(folder / f"{number:06}.png")


def status_mb(process_id: int, label: str) -> float:
    """Return a line of /proc/PID/status, such as VmSize; 0 after the process's end."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(f"{label}:"))
        return int(line.split()[1]) / 1_024
    return 0.0


@dataclass
class Watched:
    """Run an export's command, and watch its memory once it works on images.

    Above `address_mb` more than at that moment, the system refuses memory. Above `resident_mb`
    more, the command is killed, as by a control group.
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
        while process.poll() is None and not self._works():
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

    def _works(self) -> bool:
        """Return whether the command has recorded the images that it decodes."""
        out = self.exports.out
        return out.is_dir() and any(UNDER_WAY_NAME.fullmatch(path.name) for path in out.iterdir())


def memory_edges(
    folder: Path, *, runs: int, images: int, seed: int = 0, forked: bool = False
) -> dict[str, Any]:
    """Run exports under memory limits between no extra memory and their usual memory."""
    chance, begin, count = random.Random(seed), time.monotonic(), Counter[str]()
    start = start_forked if forked else kill_harness.start
    exports = Exports(folder, images, write_some_large_images, start)
    free = Watched(exports)
    free.run()
    shutil.rmtree(exports.out)
    failed_for_a_while = 0
    for number in range(runs):
        codes: tuple[int, ...]
        if number % 2:
            kind, codes = "resident", (0, -signal.SIGKILL)
            limited = Watched(exports, resident_mb=chance.uniform(0, free.grown["VmRSS"]))
        else:
            # C++ code of Arrow ends the process if it gets no memory for a thread
            kind, codes = "address", (0, 1, 2, -signal.SIGABRT)
            limited = Watched(exports, address_mb=chance.uniform(0, free.grown["VmSize"]))
        result = limited.run()
        assert result.code in codes, (limited, result)
        assert "Traceback" not in result.errors, (limited, result.errors)
        count[f"{kind}_limit_exit_code_{result.code}"] += 1
        failed_for_a_while += failures_for_a_while(exports)
        finish(exports)
    return {
        "runs": runs,
        **dict(sorted(count.items())),
        "failed_for_a_while": failed_for_a_while,
        "grown_mb_without_a_limit": {label: round(mb) for label, mb in free.grown.items()},
        "images": images,
        "forked": forked,
        "seconds": round(time.monotonic() - begin, 1),
    }
