"""Provide trials of exports. Each trial takes counts, so that tests and soak runs share it. A trial
raises AssertionError for a fault, and returns measurements.
"""

import contextlib
import gc
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen_vit.errors import ExportError
from qwen_vit.export.segments import count_kept
from qwen_vit.export.shards import GROUP_IMAGES
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import load_features
from tests.support import checkout_first, kill_harness
from tests.support.fake_encoder import POISON, TOO_LARGE
from tests.support.fake_encoder import main as fake_encoder_main
from tests.support.process_memory import memory_mb, open_files

SHARD_IMAGES = 50
FAKE_ENCODER = (
    "env",
    f"PYTHONPATH={checkout_first()}",
    sys.executable,
    "-m",
    "tests.support.fake_encoder",
)


def fake_encoder(journal: Path, *arguments: str | Path) -> list[str]:
    """Return the command that exports with the fake encoder."""
    command = [*FAKE_ENCODER, journal, "export", "--model", "stand-in"]
    return [str(word) for word in (*command, *arguments)]


def start_forked(command: Sequence[str], log: Path) -> kill_harness.Process:
    """Start a command of `fake_encoder` as a fork of this process, which has imported torch."""
    words = [*command]
    assert words[: len(FAKE_ENCODER)] == [*FAKE_ENCODER], words

    def run() -> None:
        sys.argv = ["fake_encoder", *words[len(FAKE_ENCODER) :]]
        fake_encoder_main()

    return kill_harness.Forked(run, log)


def tiny_png(number: int) -> bytes:
    """Return a different image for each number, in about 100 bytes."""
    pixels = np.empty((28, 28, 3), np.uint8)
    pixels[:] = (10 + number % 239, 10 + number // 239 % 239, 10 + number // 57_121 % 239)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int) -> None:
    """Write half of the images as files in folders and half into a tar. Every 97th file is
    broken."""
    for number in range(0, count, 2):
        path = folder / f"{number // 1000:03}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = tiny_png(number)
        path.write_bytes(data[:60] if number % 97 == 0 else data)
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for number in range(1, count, 2):
            data = tiny_png(number)
            info = tarfile.TarInfo(f"{number:06}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of the files that have equal bytes in all runs. Locks and the Parquet
    manifest differ."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*"))
        if path.suffix in (".safetensors", ".json", ".jsonl")
    }


def is_whole(path: Path) -> bool:
    try:
        return isinstance(load_features(path), FeatureFile)
    except ExportError:
        return False


def shards_of(folder: Path) -> dict[str, str]:
    return {name: hash_ for name, hash_ in digests(folder).items() if name.startswith("shard-")}


class Exports:
    """Hold an export with interrupts of every kind, and an export without interrupts."""

    def __init__(
        self,
        folder: Path,
        images: int,
        write: Callable[[Path, int], None] = write_images,
        start: kill_harness.Start = kill_harness.start,
    ) -> None:
        self.folder, self.start = folder, start
        self.inputs, self.out, self.journal = folder / "images", folder / "out", folder / "journal"
        write(self.inputs, images)
        unbroken = folder / "unbroken"
        begin = time.monotonic()
        done = self.run(unbroken)
        self.seconds = time.monotonic() - begin
        assert done.code in (0, 1), done.errors  # 1 if some images are broken
        self.expected = digests(unbroken)
        self.most_redone = 0
        self.images = images
        self._remember()

    def command(self, out: Path | None = None) -> list[str]:
        options = ("--out", out or self.out, "--shard-size", str(SHARD_IMAGES), "--yes")
        return fake_encoder(self.journal, self.inputs, *options)

    def run(self, out: Path | None = None) -> kill_harness.Run:
        return kill_harness.run(self.command(out), self.folder / "log", None, self.start)

    def after_interruption(self) -> None:
        """Check that all shards are complete and equal to the reference.

        A kill loses at most the open shard, and the first group of the next while it is saved.
        """
        shards = shards_of(self.out) if self.out.exists() else {}
        wrong = [name for name, hash_ in shards.items() if self.expected.get(name) != hash_]
        assert wrong == [], wrong
        new = (count_kept(self.out) if self.out.exists() else 0) - self.kept_before
        redone = self.journal.stat().st_size - self.encoded_before - new
        assert 0 <= redone <= SHARD_IMAGES + GROUP_IMAGES, redone
        self.most_redone = max(self.most_redone, redone)
        self._remember()

    def after_end(self, result: kill_harness.Run) -> None:
        assert result.code in (0, 1), result.errors  # 1 if an image failed in this run
        self.after_interruption()
        assert digests(self.out) == self.expected
        names = {path.name for path in self.out.iterdir()}
        assert names == {*self.expected, "manifest.parquet"}, names
        features = load_features(self.out)
        assert len(features) + len(features.errors) == self.images
        del features
        gc.collect()  # removes the mappings of shards, because a disk with mapped files is busy
        shutil.rmtree(self.out)
        self._remember()

    def _remember(self) -> None:
        self.kept_before = count_kept(self.out) if self.out.exists() else 0
        self.encoded_before = self.journal.stat().st_size


def on_an_export(trial: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Turn a trial of an existing export into a trial that first makes the export from images in a
    folder."""

    def run(folder: Path, *, images: int, forked: bool = False, **counts: Any) -> dict[str, Any]:
        start = start_forked if forked else kill_harness.start
        return trial(Exports(folder, images, start=start), **counts) | {"forked": forked}

    return run


def kills(exports: Exports, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill the export with SIGKILL at random moments, and check its shards after each kill."""
    done = kill_harness.kill_again_and_again(
        exports.command,
        kills=kills,
        longest_s=exports.seconds,
        log=exports.folder / "log",
        seed=seed,
        after_kill=lambda _: exports.after_interruption(),
        after_end=exports.after_end,
        start=exports.start,
    )
    return {
        "kills": done.landed,
        "completed": done.completed,
        "images": exports.images,
        "images_per_shard": SHARD_IMAGES,
        "most_images_done_twice_by_one_kill": exports.most_redone,
        "unbroken_s": round(exports.seconds, 2),
        "seconds": round(done.seconds, 1),
    }


def image_folder(folder: Path, count: int) -> list[Path | str]:
    """Write images in a folder and a tar. Returns the arguments that export them."""
    write_images(folder, count)
    return [folder]


def flat_memory(
    folder: Path,
    *,
    images: int,
    first: int,
    write: Callable[[Path, int], list[Path | str]] = image_folder,
    address: str = "",
) -> dict[str, Any]:
    """Sample the memory and the open files of an export into a folder or an address. Only the
    process's own memory counts, because mapped libraries are also resident, and CUDA's libraries
    grow by 140 MB at exit.
    """
    out = address or folder / "out"
    inputs = write(folder / "images", images)
    process = kill_harness.start(
        fake_encoder(folder / "journal", *inputs, "--out", out), folder / "log"
    )
    samples: list[tuple[int, float, int]] = []  # images done, MB, open files
    begin = time.monotonic()
    while process.poll() is None:
        done = journal_bytes(folder / "journal")
        with contextlib.suppress(OSError, ValueError):
            own_mb, _ = memory_mb(process.pid)
            samples.append((done, own_mb, open_files(process.pid)))
        time.sleep(0.05)
    assert process.returncode == 1, (folder / "log").read_text()
    working = [sample for sample in samples if sample[0] >= first]
    memory, files = [mb for _, mb, _ in working], [count for _, _, count in working]
    figures = {
        "images": images,
        "samples": len(working),
        "own_mb_after_first": round(memory[0], 1),
        "own_mb_most": round(max(memory), 1),
        "grown_mb": round(max(memory) - memory[0], 1),
        "open_files_after_first": files[0],
        "open_files_most": max(files),
        "images_per_s": round(images / (time.monotonic() - begin)),
    }
    assert figures["grown_mb"] <= 50, figures
    assert max(files) <= files[0] + 5, figures
    features = load_features(out)
    assert len(features) + len(features.errors) == images
    return figures


def journal_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# kind of damage -> the expected error code
HOSTILE = {
    "cut": "truncated",
    "empty": "empty-file",
    "html": "not-an-image",
    "lfs": "not-an-image",
    "jxl": "format",
    "ratio": "ratio",
    "bomb": "too-many-pixels",
    "fifo": "not-a-file",
    "gone": "missing",
    "looped": "unreadable",
    "nan": "not-finite",
    "memory": "out-of-memory",
}


def write_hostile(path: Path, kind: str) -> None:
    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "gone":
        path.symlink_to("no-such-file.png")
    elif kind == "looped":
        path.symlink_to(path.name)
    else:
        good = tiny_png(1)
        header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + good[24:29]
        path.write_bytes(
            {
                "cut": good[:60],
                "empty": b"",
                "html": b"<!doctype html><title>404</title>",
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
                "jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20),
                "ratio": png(np.full((2, 500, 3), 50, np.uint8)),
                "bomb": good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:],
                "nan": png(np.full((28, 28, 3), POISON, np.uint8)),
                "memory": png(np.full((28, 28, 3), TOO_LARGE, np.uint8)),
            }[kind]
        )


def hostile(folder: Path, *, bad: int, good: int, seed: int = 0) -> dict[str, Any]:
    """Check that the export has every good image, and a reason for every bad image."""
    inputs, out = folder / "images", folder / "out"
    inputs.mkdir()
    rng = random.Random(seed)
    numbers = set(rng.sample(range(bad + good), bad))
    expected: dict[str, str] = {}
    for number in range(bad + good):
        path = inputs / f"{number:06}.png"
        if number in numbers:
            kind = rng.choice(list(HOSTILE))
            write_hostile(path, kind)
            expected[path.name] = HOSTILE[kind]
        else:
            path.write_bytes(tiny_png(number))
    result = kill_harness.run(
        fake_encoder(folder / "journal", inputs, "--out", out, "--shard-size", "500"),
        folder / "log",
    )
    assert result.code == 1, result.errors
    features = load_features(out)
    found = {error.id: error.code for error in features.errors}
    assert found == expected, dict(found.items() ^ expected.items())
    assert all(error.id in error.message for error in features.errors)
    assert len(features) == good
    assert set(features.ids).isdisjoint(expected)
    return {
        "good": good,
        "bad": bad,
        "exit_code": result.code,
        "by_code": dict(Counter(expected.values()).most_common()),
        "seconds": round(result.seconds, 1),
    }


def interrupts(exports: Exports, *, times: int, seed: int = 0) -> dict[str, Any]:
    """Send SIGINT and SIGTERM alternately at random moments, and check for exit code 130 within 5
    s."""
    folder, rng = exports.folder, random.Random(seed)
    waits: list[float] = []
    exports.most_redone = 0  # an earlier kill may have lost encoded images
    for _ in range(3 * times):  # some runs end before their signal
        if len(waits) == times:
            break
        number = signal.SIGTERM if len(waits) % 2 else signal.SIGINT
        process = exports.start(exports.command(), folder / "log")
        wanted = exports.encoded_before + rng.randint(1, exports.images // 3)
        while process.poll() is None and journal_bytes(exports.journal) < wanted:
            time.sleep(0.002)
        begin = time.monotonic()
        code = kill_harness.end_group(process, number)
        log = (folder / "log").read_text()
        if code == -signal.SIGTERM:  # after the export, when the handler was already removed
            assert digests(exports.out) == exports.expected
            continue
        if code != 130:
            exports.after_end(kill_harness.Run(code, 0, log))
            continue
        waits.append(time.monotonic() - begin)
        assert "Traceback" not in log, log
        assert log.splitlines()[-1] == "interrupted", log
        left = [path.name for path in exports.out.iterdir() if path.name.endswith(".tmp")]
        assert left == [], left
        exports.after_interruption()
    exports.after_end(exports.run())
    assert exports.most_redone == 0, exports.most_redone  # an interrupt saves encoded images
    assert len(waits) == times, waits
    assert max(waits) < 5, waits
    return {
        "interrupts": times,
        "images": exports.images,
        "longest_wait_s": round(max(waits), 2),
        "most_images_done_twice": exports.most_redone,
    }
