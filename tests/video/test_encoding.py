"""Test videos in the encoder: files, frames and animations, alone, mixed and in pieces."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from qwen_vit import FailedImage, ImageFeatures, Video, VideoFeatures, VisionEncoder, batching
from qwen_vit.config import ImageConfig
from qwen_vit.errors import ArgumentError, ImageError
from qwen_vit.video.load import load_video
from tests.support.encoders import tiny
from tests.support.videos import make_video, number_in, numbered

SMALL: dict[str, Any] = {"min_pixels": 784, "max_pixels": 56 * 84}


def frames(count: int, size: tuple[int, int] = (84, 56)) -> NDArray[np.uint8]:
    return np.stack([numbered(7 * number, size) for number in range(count)])


def hf_rows(pictures: NDArray[np.uint8], config: ImageConfig) -> torch.Tensor:
    """Compute the rows of transformers' Qwen2VLVideoProcessor from resized frames, by its own
    formula."""
    if len(pictures) % 2:
        pictures = np.concatenate([pictures, pictures[-1:]])
    mean, std = np.array(config.image_mean), np.array(config.image_std)
    values = (pictures.astype(np.float64) / 255 - mean) / std
    rows = rearrange(
        values,
        "(t f) (h mh ph) (w mw pw) c -> (t h w mh mw) (c f ph pw)",
        f=2, mh=2, mw=2, ph=14, pw=14,
    )  # fmt: skip
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_rows_are_those_of_the_processor(count: int) -> None:
    """For an odd number of frames, the loader repeats the last frame."""
    config = tiny().image_config
    pictures = frames(count)
    loaded = load_video(Video(pictures, **SMALL), config)
    assert loaded.patches.grids[0].t == -(-count // 2)
    torch.testing.assert_close(
        loaded.patches.to_rows(config), hf_rows(pictures, config), rtol=0, atol=1e-6
    )


def test_a_file_gives_the_features_of_its_rows_and_the_moments_of_its_frames(
    tmp_path: Path,
) -> None:
    path = make_video(tmp_path / "clip.mp4", 60)
    clip = tiny().encode_video(path, **SMALL)
    assert isinstance(clip, VideoFeatures)
    assert (clip.id, clip.grid_thw, clip.size_px) == (path, (2, 4, 6), (64, 96))
    assert clip.second_per_grid_t == 1.0
    indices = [0, 20, 39, 59]
    assert clip.frame_seconds == tuple(round(index / 30, 6) for index in indices)
    assert clip.step_seconds == clip.frame_seconds[::2]
    loaded = load_video(Video(path, **SMALL), tiny().image_config)
    rows = loaded.patches.to_rows(tiny().image_config)
    expected = tiny().encode_patches(rows, torch.tensor([clip.grid_thw]))
    torch.testing.assert_close(clip.embeds, expected, rtol=0, atol=1e-6)
    assert clip.map.shape == (2, 2, 3, 192)


@pytest.mark.parametrize("output", ["merged", "mean"])
def test_pieces_give_the_bits_of_the_whole_video(
    output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full attention is within a pair of frames, so the encoder can cut a long video between pairs.
    On a CPU, a GEMM's rounding may depend on the number of rows, so the test uses a small tolerance
    there.
    """
    options = {**SMALL, "output": output, "layers": [0, 3]}
    complete = tiny().encode_video(frames(4), **options)
    alone = [tiny().encode_video(frames(4)[at : at + 2], **options) for at in (0, 2)]
    monkeypatch.setitem(batching.TOKEN_BUDGET, "cpu", 24)
    pieces = tiny().encode_video(frames(4), **options)
    torch.testing.assert_close(pieces.embeds, complete.embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(pieces.layers[3], complete.layers[3], rtol=0, atol=2e-6)
    assert torch.equal(pieces.layers[0], torch.cat([each.layers[0] for each in alone]))
    if output != "mean":
        assert torch.equal(pieces.embeds, torch.cat([each.embeds for each in alone]))
    else:
        assert pieces.embeds.shape == (1, 192)


def test_a_changed_pair_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = frames(6)
    before = tiny().encode_video(pictures, **SMALL).map
    pictures[2:4] = 255 - pictures[2:4]
    after = tiny().encode_video(pictures, **SMALL).map
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_images_and_videos_mix_and_each_keeps_its_own_error(tmp_path: Path) -> None:
    clip = make_video(tmp_path / "clip.mp4", 12)
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(Path(clip).read_bytes()[:600])
    picture = numbered(3, (84, 56))
    mixed: list[Any] = [
        picture, Video(clip, n_frames=4, **SMALL), Video(str(torn)), Image.fromarray(picture),
        Video(frames(2), fps=4.0, name="mine", **SMALL), Video(Path(clip).read_bytes(), **SMALL),
    ]  # fmt: skip
    done = tiny().encode(mixed, on_error="skip")
    assert [type(each) for each in done] == [
        ImageFeatures, VideoFeatures, FailedImage, ImageFeatures, VideoFeatures, VideoFeatures,
    ]  # fmt: skip
    assert [each.id for each in done] == [
        "image 0", clip, str(torn), "image 3", "mine", "video 5",
    ]  # fmt: skip
    torch.testing.assert_close(np_rows(done[0]), np_rows(done[3]), rtol=0, atol=2e-6)
    alone = tiny().encode_video(clip, n_frames=4, **SMALL)
    assert torch.equal(np_rows(done[1]), alone.embeds)
    assert done[4].second_per_grid_t == 0.5  # type: ignore[union-attr]


def np_rows(features: ImageFeatures | FailedImage) -> torch.Tensor:
    assert isinstance(features, ImageFeatures)
    return features.embeds


def test_a_bare_path_is_a_video_by_its_name_and_bare_bytes_by_their_content(
    tmp_path: Path,
) -> None:
    path = make_video(tmp_path / "clip.mkv", 4, size=(364, 280))
    [by_name, by_content] = tiny().encode([path, bytearray(Path(path).read_bytes())])
    assert isinstance(by_name, VideoFeatures)
    assert torch.equal(by_name.embeds, by_content.embeds)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_video_only_on_request(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"animation.{kind.lower()}")
    pictures = [Image.fromarray(frame) for frame in frames(6)]
    options = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(
        path, kind, save_all=True, append_images=pictures[1:], duration=[100, 400, *[100] * 4],
        **options,
    )  # fmt: skip
    image = tiny().encode(path)
    assert type(image) is ImageFeatures
    video = tiny().encode_video(path, n_frames=4, **SMALL)
    assert video.grid_thw[0] == 2
    # The sampler takes frames 0, 2, 3 and 5 of 6 in 0.9 s, at 0, 0.3, 0.45 and 0.75 s.
    assert video.frame_seconds == (0.0, 0.1, 0.1, 0.7)
    assert video.notes == ()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_transparent_animation_has_a_note(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"animation.{kind.lower()}")
    pictures = [Image.fromarray(frame).convert("RGBA") for frame in frames(3)]
    pictures[0].paste((0, 0, 0, 0), (0, 0, 30, 30))
    options = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], **options)
    assert tiny().encode_video(path, n_frames=2, **SMALL).notes == ("alpha composited on white",)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_a_turned_animation_has_a_note(kind: str, tmp_path: Path) -> None:
    """`encode` applied the orientation to an image, and `encode_video` ignored it in silence."""
    path = str(tmp_path / f"animation.{kind.lower()}")
    exif = Image.Exif()
    exif[274] = 6
    pictures = [Image.fromarray(frame) for frame in frames(3)]
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], exif=exif)
    video = tiny().encode_video(path, n_frames=2, **SMALL)
    assert video.notes == ("its EXIF orientation is not applied",)


def test_a_list_of_pictures_is_one_video_and_a_list_of_paths_several(tmp_path: Path) -> None:
    paths = [make_video(tmp_path / f"{name}.mp4", 8) for name in "ab"]
    several = tiny().encode_video(paths, n_frames=2, **SMALL)
    assert [each.id for each in several] == paths
    one = tiny().encode_video([Image.fromarray(each) for each in frames(3)], **SMALL)
    assert one.grid_thw == (2, 4, 6)
    stills = []
    for index, each in enumerate(frames(3)):
        Image.fromarray(each).save(tmp_path / f"{index}.png")
        stills.append(tmp_path / f"{index}.png")
    of_paths = tiny().encode_video(Video(stills, **SMALL))
    assert torch.equal(of_paths.embeds, one.embeds)


def test_frames_are_read_before_the_caller_changes_them() -> None:
    buffer = frames(2)
    kept = tiny().encode_video(buffer.copy(), **SMALL).embeds

    def reused() -> Any:
        for _ in range(3):
            yield Video(buffer, **SMALL)
            buffer[:] = 0

    first = next(iter(tiny().encode_iter(reused(), decode_threads=4)))
    assert torch.equal(first.embeds, kept)


def test_an_invalid_video_is_refused_with_a_remedy() -> None:
    with pytest.raises(ImageError, match="shape") as caught:
        tiny().encode_video(np.zeros((28, 28, 3), np.uint8))
    assert caught.value.code == "source-type"
    with pytest.raises(ArgumentError, match="videos is 7"):
        tiny().encode_video(7)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_pixels"):
        tiny().encode_video(frames(2), min_pixels=10_000, max_pixels=5_000)


def test_only_the_sampled_frames_are_held(tmp_path: Path) -> None:
    """The loader takes four of 600 frames, and its memory depends only on these frames."""
    path = make_video(tmp_path / "long.mkv", 600)
    loaded = load_video(Video(path, n_frames=4, **SMALL), tiny().image_config)
    assert loaded.patches.pixels.nbytes == 4 * 56 * 84 * 3
    # A frame's pixels encode its number, and its lower left quarter is red.
    pixels = rearrange(
        loaded.patches.pixels.numpy(),
        "(t h w mh mw) (c f ph pw) -> (t f) (h mh ph) (w mw pw) c",
        t=2, h=2, w=3, mh=2, mw=2, c=3, f=2, ph=14, pw=14,
    )  # fmt: skip
    assert [number_in(each) for each in pixels] == [0, 200, 399, 599]


@pytest.mark.gpu
def test_on_a_gpu_a_video_has_the_same_bits_alone_in_a_batch_and_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = VisionEncoder.from_pretrained("tiny", device="cuda")
    # Use every level of every channel. A GPU once normalised only some levels to other bits.
    clip = np.random.default_rng(0).integers(0, 256, (30, 56, 84, 3), np.uint8)
    other = 255 - frames(8, (112, 84))
    alone = encoder.encode_video(clip, **SMALL).embeds
    [_, batched, _] = encoder.encode(
        [numbered(5, (280, 364)), Video(clip, **SMALL), Video(other, **SMALL)]
    )
    assert torch.equal(alone, batched.embeds)
    for budget in (24, 100, 200):
        monkeypatch.setitem(batching.TOKEN_BUDGET, "cuda", budget)
        assert torch.equal(alone, encoder.encode_video(clip, **SMALL).embeds)
    rows = load_video(Video(clip, **SMALL), encoder.image_config).patches.to_rows(
        encoder.image_config
    )
    assert torch.equal(alone, encoder.encode_patches(rows, torch.tensor([[15, 4, 6]])))
