"""Threads load ahead and write behind: in order, in bounded memory, errors in their place."""

import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen_vit import batching, loading
from qwen_vit.batching import BatchEncoder, pack
from qwen_vit.common.prefetch import Job, thread_count, work_ahead
from qwen_vit.encoder import VisionEncoder
from qwen_vit.errors import ArgumentError, ExportError, ImageError
from qwen_vit.export import shards as shards_module
from qwen_vit.export.background import BackgroundWriter, StageTimer
from qwen_vit.export.device_to_host import (
    ALIGNED_BYTES,
    MAX_UNWRITTEN_BYTES,
    RING_BYTES,
    PinnedRing,
)
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.writer import FeatureWriter
from qwen_vit.features import FailedImage, ImageFeatures
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.towers import gpu

IMAGES = Path(__file__).resolve().parent / "images"


class Sized(NamedTuple):
    value: int
    n_bytes: int = 1


def load_threads() -> int:
    return sum(thread.name.startswith("qwen-vit") for thread in threading.enumerate())


def squares(count: int) -> Iterator[Job[Sized]]:
    for number in range(count):
        yield Job(partial(Sized, number * number))


# Ahead


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_order_whatever_thread_ends_first(threads: int) -> None:
    def job(number: int) -> Sized:
        time.sleep((number * 7 % 5) / 2_000)
        return Sized(number)

    jobs = (Job(partial(job, number)) for number in range(200))
    assert [each.value for each in work_ahead(jobs, threads=threads)] == list(range(200))
    assert load_threads() == 0


def test_an_exception_is_raised_after_the_results_before_it() -> None:
    def job(number: int) -> Sized:
        if number in (20, 3):
            raise ImageError(f"{number} is broken")
        return Sized(number)

    results = work_ahead((Job(partial(job, number)) for number in range(30)), threads=4)
    assert [next(results).value for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageError, match="3 is broken"):
        next(results)
    assert load_threads() == 0


def test_an_exception_of_the_source_is_raised_after_the_results_before_it() -> None:
    def source() -> Iterator[Job[Sized]]:
        yield from squares(3)
        raise RuntimeError("no more")

    results = work_ahead(source(), threads=4)
    assert [next(results).value for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="no more"):
        next(results)


def test_an_interrupt_while_the_source_is_asked_goes_through_at_once() -> None:
    def source() -> Iterator[Job[Sized]]:
        yield from squares(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(work_ahead(source(), threads=4))
    assert load_threads() == 0


def test_closing_drops_what_has_not_begun() -> None:
    begun, may_end = [], threading.Event()

    def job(number: int) -> Sized:
        begun.append(number)
        if number:
            may_end.wait(30)
        return Sized(number)

    results = work_ahead((Job(partial(job, n)) for n in range(1000)), threads=2)
    assert next(results).value == 0
    threading.Timer(0.05, may_end.set).start()
    results.close()
    assert load_threads() == 0
    assert len(begun) <= 6


def test_what_waits_is_bounded_in_bytes() -> None:
    """Results of 10 bytes, of which 50 may wait: each thread may add one that it had begun."""
    taken = waiting = most = 0
    changing = threading.Lock()

    def job(number: int) -> Sized:
        nonlocal waiting, most
        with changing:
            waiting += 10
            most = max(most, waiting)
        return Sized(number, 10)

    jobs = (Job(partial(job, number)) for number in range(300))
    for each in work_ahead(jobs, threads=3, max_bytes=50):
        assert each.value == taken
        taken += 1
        with changing:
            waiting -= 10
    assert taken == 300
    assert most <= 50 + 3 * 10 + 10


def test_what_jobs_hold_before_they_run_is_bounded_too() -> None:
    """Encoded bytes that a caller gave: of 10 bytes, while the first job goes on, 50 may wait."""
    asked, may_end = 0, threading.Event()

    def source() -> Iterator[Job[Sized]]:
        nonlocal asked
        for number in range(100):
            asked += 1
            if asked == 6:  # as many as fit, and nobody has begun
                may_end.set()
            yield Job(partial(wait, number), 10)

    def wait(number: int) -> Sized:
        may_end.wait(1)
        return Sized(number, 0)

    results = work_ahead(source(), threads=8, max_bytes=50)
    assert next(results).value == 0
    assert asked <= 8
    assert len(list(results)) == 99


def test_one_result_larger_than_the_bound_passes() -> None:
    jobs = (Job(partial(Sized, number, 1_000), 1_000) for number in range(20))
    assert len(list(work_ahead(jobs, threads=4, max_bytes=10))) == 20


@given(
    sizes=st.lists(st.integers(0, 100), max_size=60),
    threads=st.integers(2, 4),
    max_bytes=st.integers(1, 150),
    max_jobs=st.integers(1, 20),
)
def test_no_bound_ever_blocks_for_good(
    sizes: list[int], threads: int, max_bytes: int, max_jobs: int
) -> None:
    jobs = (Job(partial(Sized, number, size), size) for number, size in enumerate(sizes))
    results = work_ahead(jobs, threads=threads, max_bytes=max_bytes, max_jobs=max_jobs)
    assert [each.value for each in results] == list(range(len(sizes)))


def test_the_source_is_asked_in_the_callers_thread_and_not_without_end() -> None:
    asked: list[threading.Thread] = []

    def source() -> Iterator[Job[Sized]]:
        while True:
            asked.append(threading.current_thread())
            yield Job(partial(Sized, 0))

    results = work_ahead(source(), threads=3, max_jobs=40)
    assert asked == []
    for count in range(1, 100):
        next(results)
        assert len(asked) <= count + 40
    assert set(asked) == {threading.current_thread()}
    results.close()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_number_of_threads_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="decode_threads is"):
        thread_count(wrong)


def test_such_a_number_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="decode_threads is 0"):
        stand_in_export(tmp_path, FakeEncoder(), 2, decode_threads=0)
    assert not (tmp_path / "out").exists()


LEFT_BEHIND = """
import sys, time
from collections import namedtuple
from functools import partial
from qwen_vit.common.prefetch import Job, work_ahead

Sized = namedtuple("Sized", "value n_bytes")

def job(number):
    time.sleep(0.01)
    return Sized(number, 10)

results = work_ahead((Job(partial(job, n)) for n in range(100)), threads=2, max_bytes=30)
print([next(results).value for _ in range(10)][-1], flush=True)
time.sleep(0.3)  # until no more fits
if sys.argv[1] == "raise":
    raise KeyError
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("3", 3), ("raise", 1)])
def test_results_that_nobody_takes_do_not_keep_the_process(end: str, code: int) -> None:
    """A name at a module's top level is there until the end, and before it Python joins threads."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND, end],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "9\n"), done.stderr


# BackgroundWriter


def test_jobs_behind_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with BackgroundWriter(3) as writer:
        futures = [writer.submit(partial(done.append, number), 1) for number in range(100)]
    assert done == list(range(100))
    assert all(future.done() for future in futures)
    assert load_threads() == 0


def test_the_caller_waits_while_too_much_is_undone() -> None:
    undone = most = 0
    changing = threading.Lock()

    def job() -> None:
        nonlocal undone
        time.sleep(0.001)
        with changing:
            undone -= 10

    with BackgroundWriter(50) as writer:
        for _ in range(50):
            writer.submit(job, 10)
            with changing:
                undone += 10
                most = max(most, undone)
    assert most <= 50


def test_an_exception_behind_reaches_the_caller_and_nothing_is_begun_after_it() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk full")

    def give() -> None:
        with BackgroundWriter(1000) as writer:
            writer.submit(partial(done.append, 1))
            failing = writer.submit(fail)
            later = writer.submit(partial(done.append, 2))
            assert isinstance(later.exception(30), CancelledError)
            assert failing.done()
            for _ in range(3):
                writer.submit(partial(done.append, 3))

    with pytest.raises(OSError, match="disk full"):
        give()
    assert done == [1]


def test_what_was_given_is_done_although_the_block_raises() -> None:
    done: list[int] = []

    def stop() -> None:
        with BackgroundWriter(10) as writer:
            for number in range(5):
                writer.submit(partial(done.append, number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert done == list(range(5))


def test_a_clock_counts_every_moment_once() -> None:
    clock, begin = StageTimer("rest"), time.perf_counter()
    with clock.stage("outer"):
        time.sleep(0.01)
        with clock.stage("inner"):
            time.sleep(0.02)
    seconds = clock.seconds()
    assert seconds["inner"] >= 0.02
    assert 0.01 <= seconds["outer"] < 0.02 + seconds["rest"] + 0.01
    assert abs(sum(seconds.values()) - (time.perf_counter() - begin)) < 0.01


# Packing


@given(st.lists(st.integers(1, 120), max_size=80), st.integers(1, 100))
def test_every_image_is_in_one_batch_and_batches_keep_the_budget(
    sizes: list[int], budget: int
) -> None:
    batches = pack(sizes, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[index] for index in batch) <= budget
        assert [sizes[i] for i in batch] == sorted((sizes[i] for i in batch), reverse=True)
    full = [sum(sizes[index] for index in batch) for batch in batches]
    # first fit leaves at most one batch that is half empty
    assert sum(2 * size <= budget for size in full) <= 1


# The export


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, image in enumerate(mixed(count)):
        path = folder / f"{number:03}.img.png"
        if isinstance(image, bytes):
            path.write_bytes(image)
        elif isinstance(image, Path):
            path.write_bytes(image.read_bytes())
        else:
            pixels = np.asarray(image)
            Image.fromarray(pixels).save(path)


def test_an_export_has_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 14)
    options = ExportOptions(shard_size=3)
    found = []
    for threads in (1, 2, 5):
        out = tmp_path / str(threads)
        done = export_features(
            encoder(), [str(tmp_path / "images")], out, options, decode_threads=threads
        )
        assert done.images == 14
        assert sum(done.failed.values()) >= 2
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(found[0]) == 5 + 3
    assert found[1] == found[0]
    assert found[2] == found[0]


def stand_in_export(folder: Path, encoder: Any, shards: int, **more: Any) -> Any:
    """4 images a shard."""
    (folder / "p").mkdir()
    for number in range(4 * shards):
        (folder / f"p/{number:03}.png").write_bytes(tiny_png(number))
    options = ExportOptions(shard_size=4)
    return export_features(encoder, [str(folder / "p")], folder / "out", options, **more)


def test_the_next_shards_images_are_loaded_while_one_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Event()  # an image of the second shard
    real = loading.load_image

    def load_image(data: Any, *, name: str, **more: Any) -> Any:
        if name == "005.png":
            loaded.set()
        return real(data, name=name, **more)

    class Waiting(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                assert loaded.wait(30)
                yield features

    monkeypatch.setattr(loading, "load_image", load_image)
    assert stand_in_export(tmp_path, Waiting(), 3, decode_threads=2).exported == 12


def test_no_shard_is_encoded_before_the_one_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill costs the open shard at most; the next one's images are loaded meanwhile."""
    real, whole = FeatureWriter.save, FakeEncoder()
    loaded = threading.Event()
    encoded, load_image = [], loading.load_image

    def watched_load(*arguments: Any, **options: Any) -> Any:
        if options["name"].endswith("5.png"):  # of the second shard
            loaded.set()
        return load_image(*arguments, **options)

    def save(self: FeatureWriter, facts: Any) -> None:
        assert loaded.wait(30)
        encoded.append(whole.encoded)
        real(self, facts)

    monkeypatch.setattr(FeatureWriter, "save", save)
    monkeypatch.setattr(loading, "load_image", watched_load)
    assert stand_in_export(tmp_path, whole, 3, decode_threads=2).exported == 12
    assert encoded == [4, 8, 12]


def test_a_disk_that_fails_stops_the_encoder_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: FeatureWriter, facts: Any) -> None:
        raise ExportError("the disk is gone")

    whole = FakeEncoder()
    monkeypatch.setattr(FeatureWriter, "save", save)
    with pytest.raises(ExportError, match="the disk is gone"):
        stand_in_export(tmp_path, whole, 50)
    assert whole.encoded <= 8
    assert load_threads() == 0


def test_an_export_says_what_it_waited_for(tmp_path: Path) -> None:
    class Slow(FakeEncoder):
        def encode_iter(self, images: Any, **options: Any) -> Any:
            for features in super().encode_iter(images, **options):
                time.sleep(0.02)
                yield features

    done = stand_in_export(tmp_path, Slow(), 4)
    assert list(done.waits) == ["read and decode", "encode", "copy back", "write", "rest"]
    assert max(done.waits, key=lambda stage: done.waits[stage]) == "encode"
    assert done.waits["encode"] >= 16 * 0.02
    assert sum(done.waits.values()) <= done.seconds + 0.01


def test_no_more_of_a_wait_is_the_gpus_than_was_waited() -> None:
    """The thread that writes waits for the GPU while nobody waits for it as well."""
    clock, shard = StageTimer("rest"), Mock(waited_s=0.0)
    with clock.stage("write"):
        time.sleep(0.05)
    with shards_module._time_writer(shard, clock):
        shard.waited_s += 80.0  # of which the end alone is seen here
    with shards_module._time_writer(shard, clock):
        time.sleep(0.02)
        shard.waited_s += 0.01
    seconds = clock.seconds()
    assert seconds["write"] >= 0.05
    assert seconds["copy back"] >= 0.01


# Results on their way from the GPU


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=60))
def test_places_of_the_ring_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Each step takes some bytes, and gives back a few of the oldest places."""
    memory = torch.zeros(16 * ALIGNED_BYTES, dtype=torch.uint8)
    ring, live = PinnedRing(memory), deque[tuple[int, torch.Tensor]]()
    for number, (size, given_back) in enumerate(steps, 1):
        place = ring.allocate(size * ALIGNED_BYTES // 4)
        if place is not None:
            place.fill_(number)
            live.append((number, place))
        else:
            assert live or size * ALIGNED_BYTES // 4 > len(memory)
        assert all((each == value).all() for value, each in live)
        for _ in range(min(given_back, len(live))):
            live.popleft()
            ring.release()


def test_the_ring_is_used_to_its_end_and_again() -> None:
    ring = PinnedRing(torch.zeros(4 * ALIGNED_BYTES, dtype=torch.uint8))
    taken = [ring.allocate(ALIGNED_BYTES) for _ in range(5)]
    assert [place is None for place in taken] == [False] * 4 + [True]
    for _ in range(50):
        ring.release()
        assert ring.allocate(ALIGNED_BYTES - 1) is not None
        assert ring.allocate(1) is None


@given(st.lists(st.integers(1, 2**26 // ALIGNED_BYTES), min_size=20, max_size=60))
def test_behind_a_slow_disk_the_ring_has_room_for_one_more_image(sizes: list[int]) -> None:
    """Else memory is pinned beside it, of every size that was ever asked for."""
    ring = PinnedRing(torch.empty(RING_BYTES, dtype=torch.uint8))
    waiting = deque[int]()
    for size in (each * ALIGNED_BYTES for each in sizes):
        assert ring.allocate(size) is not None
        while waiting and sum(waiting) + size > MAX_UNWRITTEN_BYTES:  # as `BackgroundWriter` waits
            waiting.popleft()
            ring.release()
        waiting.append(size)


# The encoder


def encoder() -> VisionEncoder:
    return VisionEncoder.from_pretrained("tiny", device="cpu", max_pixels=50_176)


def mixed(count: int) -> list[Any]:
    """Arrays, PIL images, encoded bytes and paths of many sizes; every sixth is broken."""
    images: list[Any] = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        shape = (*random.integers(28, 140, 2), 3)
        pixels = random.integers(0, 256, shape, np.uint8)
        jpeg = (IMAGES / "rocket.jpg").read_bytes()
        images.append(
            [pixels, Image.fromarray(pixels), jpeg[: 3000 * (seed + 1)], IMAGES / "chelsea.png",
             torch.from_numpy(pixels), b"no image"][seed % 6]
        )  # fmt: skip
    return images


def test_the_features_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 300)
    simple = encoder().encode(mixed(18), on_error="skip", decode_threads=1)
    assert sum(isinstance(each, FailedImage) for each in simple) >= 3
    ahead = encoder().encode(mixed(18), on_error="skip", decode_threads=4)
    for one, other in zip(simple, ahead, strict=True):
        assert (one.id, one.size_px, str(one.error)) == (other.id, other.size_px, str(other.error))
        if isinstance(one, FailedImage):
            assert isinstance(other, FailedImage)
            continue
        assert isinstance(other, ImageFeatures)
        assert (one.grid_thw, one.notes) == (other.grid_thw, other.notes)
        assert torch.equal(one.embeds, other.embeds)


def test_an_array_that_its_owner_uses_again_is_encoded_as_it_was() -> None:
    def frames() -> Iterator[np.ndarray]:
        buffer = np.empty((56, 56, 3), np.uint8)
        for value in range(6):
            buffer[:] = 40 * value
            yield buffer

    whole = encoder()
    single = [whole.encode([np.full((56, 56, 3), 40 * v, np.uint8)])[0].embeds for v in range(6)]
    together = whole.encode_iter(frames(), decode_threads=3)
    for features, expected in zip(together, single, strict=True):
        assert (features.embeds - expected).abs().max() < 1e-4
    assert not torch.allclose(single[0], single[1], atol=1e-2)


def test_the_first_image_that_fails_is_the_one_that_is_raised(tmp_path: Path) -> None:
    (tmp_path / "late.png").write_bytes(b"")
    images = [IMAGES / "rocket.jpg", b"first", tmp_path / "late.png", np.zeros((2, 2, 5))]
    for threads in (1, 4):
        with pytest.raises(ImageError, match="image 1: not an image"):
            encoder().encode(images, decode_threads=threads)
    for threads in (1, 4):
        with pytest.raises(ImageError, match=r"image 0: its shape is \(2, 2, 5\)"):
            encoder().encode(images[::-1], decode_threads=threads)
    assert load_threads() == 0


def test_an_array_that_fails_is_not_kept() -> None:
    """Its error's traceback held it, in a circle that only the garbage collector ends."""
    gc.collect()
    gc.disable()
    try:
        array = np.full((40, 40, 3), np.nan, np.float32)
        kept = weakref.ref(array)
        [failed] = encoder().encode([array], on_error="skip", decode_threads=2)
        del array
        assert isinstance(failed, FailedImage)
        assert kept() is None
    finally:
        gc.enable()


def test_an_export_that_is_stopped_encodes_no_more(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(8):
        good = number < 2
        (tmp_path / f"p/{number}.png").write_bytes(tiny_png(number) if good else b"no image")
    encoded: list[int] = []

    class Watched(VisionEncoder):
        __slots__ = ()

        def forward(self, patches: Any, *more: Any) -> Any:
            encoded.append(len(patches))
            return super().forward(patches, *more)

    watched = Watched.from_pretrained("tiny", device="cpu")
    options = ExportOptions(max_failures=3)
    with pytest.raises(ExportError, match="stopped after 3 consecutive failures"):
        export_features(watched, [str(tmp_path / "p")], tmp_path / "out", options)
    assert encoded == []


@pytest.mark.parametrize("threads", [1, 4])
def test_the_images_before_the_one_that_fails_are_given(threads: int) -> None:
    """They wait to be packed together with those that follow."""

    three = [IMAGES / "chelsea.png"] * 3

    def images() -> Iterator[Any]:
        yield from three
        raise KeyError("mine")

    for failing, error in (([*three, b"no image"], ImageError), (images(), KeyError)):
        given = []
        with pytest.raises(error):
            given.extend(encoder().encode_iter(failing, decode_threads=threads))
        assert len(given) == 3


def test_a_stream_that_is_left_ends_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 100)
    results = encoder().encode_iter([IMAGES / "chelsea.png"] * 50, decode_threads=2)
    next(results)
    assert load_threads() == 2
    results.close()  # type: ignore[attr-defined]
    assert load_threads() == 0
    for _ in encoder().encode_iter([IMAGES / "chelsea.png"] * 50, decode_threads=2):
        break
    gc.collect()
    assert load_threads() == 0


def test_patches_of_two_images_are_no_image() -> None:
    from qwen_vit.images.patches import Patches, patchify

    whole = encoder()
    one = patchify(np.zeros((56, 56, 3), np.uint8), whole.image_config)
    [features] = whole.encode([one])
    assert features.grid_thw == (1, 4, 4)
    with pytest.raises(ImageError, match="patches of 2 images"):
        whole.encode([Patches.cat([one, one])])


def test_patches_that_are_not_this_encoders_fail_alone() -> None:
    """Narrower ones were filled up with zeros and encoded; the others cost the whole batch."""
    from qwen_vit.config import Grid
    from qwen_vit.images.patches import Patches, patchify

    whole = encoder()
    good = patchify(np.zeros((56, 56, 3), np.uint8), whole.image_config)
    bad = {
        r"image 1: patches of 192 values\. Expected 588, or 1176 of a video\.": (
            192,
            Grid(1, 4, 4),
        ),
        r"image 2: patches of 294 values\. Expected 588, or 1176 of a video\.": (
            294,
            Grid(1, 4, 4),
        ),
        r"image 3: grid_thw\[0\] is \(1, 3, 5\)\. Expected height and width": (588, Grid(1, 3, 5)),
    }
    patches = [
        Patches(torch.zeros(grid.n_patches, values, dtype=torch.uint8), (grid,))
        for values, grid in bad.values()
    ]
    results = whole.encode([good, *patches, Patches.cat([good, good]), good], on_error="skip")
    kinds = [ImageFeatures, *[FailedImage] * 4, ImageFeatures]
    assert [type(result) for result in results] == kinds
    for message, result in zip([*bad, "image 4: the patches of 2"], results[1:5], strict=True):
        assert re.match(message, str(result.error))
    with pytest.raises(ImageError, match="image 0: patches of 192 values"):
        whole.encode([patches[0]])


def test_images_are_packed_largest_first_and_come_back_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU does, where an image's bits do not depend on its batch."""
    whole = encoder()
    monkeypatch.setattr(batching, "TOKEN_BUDGET", {"cpu": 100})
    monkeypatch.setattr(batching, "WINDOW", {"cpu": 3})
    monkeypatch.setattr(
        BatchEncoder, "_batches", lambda _, window: pack([each.n_patches for each in window], 100)
    )
    sizes = [(56, 56), (112, 112), (28, 56), (84, 84), (56, 84), (112, 84), (28, 28)]
    images = [np.full((*size, 3), 30 * n, np.uint8) for n, size in enumerate(sizes)]
    batches: list[list[int]] = []
    real = VisionEncoder.forward

    def forward(self: VisionEncoder, patches: Any, grids: Any, *options: Any) -> Any:
        batches.append([grid.n_patches for grid in grids])
        return real(self, patches, grids, *options)

    monkeypatch.setattr(VisionEncoder, "forward", forward)
    together = whole.encode(images)
    assert batches == [[64, 36], [48, 24, 24], [16, 16]]
    for features, image in zip(together, images, strict=True):
        [alone] = whole.encode([image])
        assert features.grid_thw == alone.grid_thw
        assert (alone.embeds - features.embeds).abs().max() < 1e-4


@gpu
def test_packed_on_a_gpu_an_image_has_the_bits_that_it_has_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = VisionEncoder.from_pretrained("tiny", device="cuda", max_pixels=200_704)
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cuda", 2_048)
    images = mixed(60)
    together = whole.encode(images, on_error="skip", decode_threads=8)
    for features, image in zip(together, images, strict=True):
        [alone] = whole.encode([image], on_error="skip", decode_threads=1)
        assert type(features) is type(alone)
        if isinstance(features, ImageFeatures) and isinstance(alone, ImageFeatures):
            assert torch.equal(features.embeds, alone.embeds)
