"""Test that a long video is encoded in pieces during decoding, with the same bits."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import FailedImage, Video, VideoFeatures, VisionEncoder, batching
from qwen_vit.common.prefetch import work_ahead
from qwen_vit.config import Grid
from qwen_vit.errors import ImageError
from qwen_vit.features import ImageFeatures
from qwen_vit.images.frames import Frames
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.patches import Patches
from qwen_vit.loading import ImageLoader, LoadedImage
from qwen_vit.video import load, pieces
from qwen_vit.video.pieces import PieceMemory, PieceStream
from tests.support.videos import make_video

SMALL: dict[str, Any] = {"min_pixels": 784, "max_pixels": 56 * 84}
STEP = 24  # patches of a pair of frames
FRAMES = 40
PIECE_BYTES = STEP * 1176


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Video:
    """Make a video of 20 pieces. A loader may be two pieces ahead."""
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", STEP)
    monkeypatch.setattr(pieces, "MAX_AHEAD_BYTES", 2 * PIECE_BYTES)
    path = make_video(tmp_path / "clip.mp4", 60)
    return Video(path, n_frames=FRAMES, **SMALL)


class Counts:
    """Count decoded and encoded frames. The first forward pass waits for later frames."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded = self.encoded = self.most = 0
        self._lock = threading.Lock()
        self._resize, self._forward = load._resize_into, VisionEncoder.forward
        monkeypatch.setattr(load, "_resize_into", self._count_decoded)
        monkeypatch.setattr(VisionEncoder, "forward", lambda *given: self._count_encoded(*given))

    def _count_decoded(self, *given: Any) -> None:
        self._resize(*given)
        with self._lock:
            self.decoded += 1
            self.most = max(self.most, self.decoded - self.encoded)

    def _count_encoded(self, *given: Any) -> Any:
        if self.encoded == 0:
            end = time.monotonic() + 60
            while self.decoded < 6:  # frames of this piece and of two pieces ahead
                assert time.monotonic() < end, "nothing is decoded while the tower runs"
                time.sleep(0.01)
            time.sleep(0.5)  # without a limit, more would be decoded now
        done = self._forward(*given)
        with self._lock:
            self.encoded += 2
        return done


def test_frames_are_decoded_while_the_tower_runs_and_few_are_held(
    clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    counts = Counts(monkeypatch)
    [done] = encoder.encode_iter([clip], decode_threads=2)
    assert isinstance(done, VideoFeatures)
    assert done.grid_thw == (FRAMES // 2, 4, 6)
    assert counts.decoded == counts.encoded == FRAMES
    assert 6 <= counts.most <= 8  # 2 in the tower, 4 ahead, 2 in decoding
    print(f"at most {counts.most} of {FRAMES} frames were held")


def test_a_stream_has_the_bits_of_the_whole_video(
    clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    streams = [
        next(encoder.encode_iter([clip], decode_threads=threads, layers=[1])) for threads in (1, 3)
    ]
    loaded = load.load_video(clip, encoder.image_config)
    [expected] = encoder.encode([loaded.patches], layers=[1])
    for each in streams:
        assert torch.equal(each.embeds, expected.embeds)
        assert torch.equal(each.layers[1], expected.layers[1])
        assert isinstance(each, VideoFeatures)
        assert each.frame_seconds == loaded.timing.frame_seconds
        assert each.notes == loaded.notes
    many = [*encoder.encode_iter([clip, clip, clip], decode_threads=2)]
    assert all(torch.equal(each.embeds, expected.embeds) for each in many)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_later_piece_belongs_to_its_video(
    threads: int, clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    real = load._resize_into
    names: list[str] = []

    def fails(rows: Any, at: int, *more: Any) -> None:
        if rows._first == 10 and rows._name not in names:
            names.append(rows._name)
            raise ImageError("a frame is damaged", name="clip.mp4", code="damaged")
        real(rows, at, *more)

    monkeypatch.setattr(load, "_resize_into", fails)
    bad, good = encoder.encode_iter([clip, clip], decode_threads=threads, on_error="skip")
    assert isinstance(bad, FailedImage)
    assert (bad.error.code, bad.size_px) == ("damaged", (64, 96))
    assert isinstance(good, ImageFeatures)
    assert good.grid_thw == (FRAMES // 2, 4, 6)
    names.clear()
    with pytest.raises(ImageError, match=r"clip\.mp4: a frame is damaged"):
        list(encoder.encode_iter([clip], decode_threads=threads))


def test_an_abandoned_stream_ends_its_threads(clip: Video) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    results = encoder.encode_iter([clip] * 4, decode_threads=2)
    next(results)
    begin = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 20
    assert not [each for each in threading.enumerate() if each.name.startswith("qwen-vit")]


def test_loaders_start_more_videos_while_decoded_ones_wait(
    clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waiting video once counted as a batch of images, so 16 cores decoded only five clips."""
    monkeypatch.setattr(pieces, "MAX_AHEAD_BYTES", 2**29)
    counts = Counts(monkeypatch)
    with closing(
        work_ahead(_loader().jobs([clip] * 4, is_ahead=True), threads=2, max_bytes=1)
    ) as loaded:
        assert next(loaded).stream is not None
        _wait_until(lambda: counts.decoded == 4 * FRAMES)


def test_all_waiting_videos_share_bounded_memory(
    clip: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MAX_AHEAD_BYTES", 2**29)
    monkeypatch.setattr(pieces, "ALL_AHEAD_BYTES", 4 * PIECE_BYTES)
    loader, threads = _loader(), 3
    memory = loader._piece_memory
    with closing(work_ahead(loader.jobs([clip] * 5, is_ahead=True), threads=threads)) as many:
        first = next(many)
        _wait_until(lambda: memory.n_bytes >= 4 * PIECE_BYTES)
        time.sleep(0.5)  # without a limit, more would be decoded now
        assert memory.n_bytes < (4 + threads) * PIECE_BYTES
        print(f"{memory.n_bytes // PIECE_BYTES} of {5 * FRAMES // 2} pieces wait")
        taken = sum(1 for each in chain([first], many) for _ in _pieces_of(each))
    assert taken == 5 * FRAMES // 2
    assert memory.n_bytes == 0


def test_the_video_that_is_encoded_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "ALL_AHEAD_BYTES", 3 * PIECE_BYTES)
    monkeypatch.setattr(pieces, "MAX_AHEAD_BYTES", 2 * PIECE_BYTES)
    memory, decoded = PieceMemory(), [0]
    memory.n_bytes = 3 * PIECE_BYTES  # used by other videos

    def rest() -> Iterator[Patches]:
        for _ in range(9):
            decoded[0] += 1
            yield _piece()

    stream = PieceStream(_piece(), rest(), is_ahead=True, memory=memory)  # type: ignore[arg-type]
    thread = threading.Thread(target=stream.decode, args=(lambda: False,))
    thread.start()
    time.sleep(0.3)
    assert decoded == [0]  # the stream has one piece, and no memory for another
    found = stream.pieces()
    next(found)
    _wait_until(lambda: decoded == [2])
    assert sum(1 for _ in found) == 9
    thread.join(20)
    assert not thread.is_alive()
    assert memory.n_bytes == 3 * PIECE_BYTES


def _loader() -> ImageLoader:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    return ImageLoader(
        encoder.config, encoder.image_config, "auto", ImageLimits(), "raise", piece_patches=STEP
    )


def _pieces_of(loaded: LoadedImage) -> Iterator[Patches | Frames]:
    assert loaded.stream is not None
    return loaded.stream.pieces()


def _piece() -> Patches:
    return Patches(torch.zeros(STEP, 1176, dtype=torch.uint8), (Grid(1, 4, 6),))


def _wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "nothing is decoded"
        time.sleep(0.01)
