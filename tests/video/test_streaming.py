"""Test that a long video is encoded in pieces during decoding, with the same bits."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit import FailedImage, Video, VideoFeatures, VisionEncoder, batching
from qwen_vit.errors import ImageError
from qwen_vit.features import ImageFeatures
from qwen_vit.video import load, pieces
from tests.support.videos import make_video

SMALL: dict[str, Any] = {"min_pixels": 784, "max_pixels": 56 * 84}
STEP = 24  # patches of a pair of frames
FRAMES = 40


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Video:
    """Make a video of 20 pieces. A loader may be two pieces ahead."""
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", STEP)
    monkeypatch.setattr(pieces, "MAX_AHEAD_BYTES", 2 * STEP * 1176)
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
            while self.decoded < 6:  # of this piece and two ahead
                assert time.monotonic() < end, "nothing is decoded while the tower runs"
                time.sleep(0.01)
            time.sleep(0.5)  # enough for more, if nothing bounded them
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
    assert 6 <= counts.most <= 8  # in the tower, two pieces ahead, and one in work
    print(f"at most {counts.most} of {FRAMES} frames were held")


def test_a_stream_has_the_bits_of_the_whole(clip: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cpu")
    streams = [
        next(encoder.encode_iter([clip], decode_threads=threads, layers=[1])) for threads in (1, 3)
    ]
    whole = load.load_video(clip, encoder.image_config)
    [expected] = encoder.encode([whole.patches], layers=[1])
    for each in streams:
        assert torch.equal(each.embeds, expected.embeds)
        assert torch.equal(each.layers[1], expected.layers[1])
        assert isinstance(each, VideoFeatures)
        assert each.frame_seconds == whole.timing.frame_seconds
        assert each.notes == whole.notes
    many = [*encoder.encode_iter([clip, clip, clip], decode_threads=2)]
    assert all(torch.equal(each.embeds, expected.embeds) for each in many)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_later_piece_is_the_videos_own(
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
