"""Test that threads that load images in parallel get the same pixels and leave no lock or flag."""

import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from qwen_vit.errors import ImageError
from qwen_vit.images import decode as image_module
from qwen_vit.images.load import load_image
from tests.support import IMAGES
from tests.support.images import chelsea, encode

# Pillow's flag


def test_pillows_flag_is_restored_after_the_last_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the flag restored too early, Pillow fills another thread's truncated file with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with image_module._strictly():
        with image_module._strictly():
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# Threads


def test_many_threads_load_equal_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads load files, truncated files and one shared lazy PIL image. The process-wide flag is
    restored."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(chelsea(), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def load(source: Any) -> np.ndarray | str:
        try:
            return load_image(source).pixels
        except ImageError as error:
            return error.code

    for _ in range(5):
        shared = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(load, [data, data[:-3000], shared] * 16))
        for index, result in enumerate(results):
            if index % 3 == 1:
                assert isinstance(result, str)
                assert result == "truncated"
            else:
                assert np.array_equal(result, expected)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_that_share_a_pil_image_all_apply_its_orientation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While one thread parses the EXIF data, Pillow reports no EXIF data to another thread."""
    parse = Image.Exif.load

    def parse_slowly(self: Image.Exif, data: bytes) -> None:
        time.sleep(0.01)
        parse(self, data)

    monkeypatch.setattr(Image.Exif, "load", parse_slowly)
    exif = Image.Exif()
    exif[274] = 6
    # Without a dpi in the header, Pillow reads the EXIF data when it opens the file.
    data = encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif, dpi=(72, 72))
    shared = Image.open(io.BytesIO(data))
    with ThreadPoolExecutor(4) as pool:
        shapes = {image.pixels.shape for image in pool.map(load_image, [shared] * 8)}
    assert shapes == {(40, 20, 3)}


def test_threads_load_a_shared_lazy_pil_image_one_at_a_time() -> None:
    """Two simultaneous loads of Pillow read one file from two places."""
    expected = np.asarray(Image.open(IMAGES / "astronaut.png"))
    threads = 4
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            shared, barrier = Image.open(IMAGES / "astronaut.png"), Barrier(threads)

            def load(shared: Image.Image = shared, barrier: Barrier = barrier) -> np.ndarray:
                barrier.wait()
                return load_image(shared).pixels

            for future in [pool.submit(load) for _ in range(threads)]:
                assert np.array_equal(future.result(), expected)


def test_a_fork_while_other_threads_decode_leaves_no_lock_and_no_flag_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    data = buffer.getvalue()
    locks = [*image_module.LOAD_LOCKS, image_module._Strictness.lock]
    with image_module._strictly(), ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        child = os.fork()
        if child == 0:
            pixels = load_image(data).pixels
            os._exit(0 if pixels.shape == (4, 4, 3) and ImageFile.LOAD_TRUNCATED_IMAGES else 1)
        for _ in range(600):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
