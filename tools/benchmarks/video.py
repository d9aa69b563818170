"""Videos from the file to the features: clips a second, beside what bounds them.

Makes clips of 720p by PyAV and measures, in one run: the tower alone on patches in GPU memory; the
decoding alone on all cores, by PyAV and by torchcodec; `encode_iter` from the files on; and
transformers' video processor and tower. The share is that of the whole in the lower of the tower's
rate and the better decoder's. Prints a table and one JSON line.

\b
    python -m tools.benchmarks.video --ledger tools/benchmarks/ledger.jsonl
    python -m tools.benchmarks.video --model tiny --clips 4 --seconds 4 --size 160x90   # anywhere

torchcodec uses the FFmpeg of PyAV's wheel, so that no system library is needed; without torchcodec
its column is empty. The 7B-shaped tower in bf16 with random weights, unless a model is named.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from qwen_vit.batching import TOKEN_BUDGET
from qwen_vit.encoder import VisionEncoder
from qwen_vit.features import VideoFeatures
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits, VideoOptions
from qwen_vit.video.reader import open_video
from qwen_vit.video.sampling import sample_frames
from tests.support.process_memory import memory_mb
from tools.common import ROOT, default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

RATE = 30  # frames a second in the files
PHOTOGRAPH = ROOT / "tests" / "images" / "astronaut.png"
PACKAGES = ("av", "pillow", "triton")
OPTIONAL = ("torchcodec", "transformers", "torchvision")


@click.command(help=__doc__)
@click.option("--model", help="A checkpoint instead of random weights.")
@click.option("--clips", default=100, show_default=True, help="Files, links to --distinct ones.")
@click.option("--distinct", default=8, show_default=True, help="Clips that are made.")
@click.option("--seconds", default=60, show_default=True, help="Length of a clip.")
@click.option("--size", default="1280x720", show_default=True, help="Width x height.")
@click.option("--codec", default="libx264", show_default=True, help="PyAV's encoder.")
@click.option("--hf-clips", default=4, show_default=True, help="For transformers; 0: leave it out.")
@click.option("--only-torchcodec", type=click.Path(path_type=Path), hidden=True)
@ledger_options
def main(
    model: str | None, clips: int, distinct: int, seconds: int, size: str, codec: str,
    hf_clips: int, only_torchcodec: Path | None, ledger: Path | None, commit: str,
) -> None:  # fmt: skip
    if only_torchcodec is not None:  # the child process, whose linker finds PyAV's libraries
        click.echo(json.dumps(_torchcodec_rate(sorted(only_torchcodec.iterdir()))))
        return
    device = default_device()
    with tempfile.TemporaryDirectory(prefix="qwen-vit-video-") as name:
        folder = Path(name)
        paths = _make_clips(folder / "clips", clips, min(distinct, clips), seconds, size, codec)
        if model is None:
            (folder / "model").mkdir()
            write_model(folder / "model", device)
        encoder = VisionEncoder.from_pretrained(model or str(folder / "model"), device=device)
        figures = _measure(encoder, paths, hf_clips)
    row = ledger_row(
        "video", commit, device, PACKAGES, clips=clips, distinct=distinct, seconds=seconds,
        size=size, codec=codec, optional=_optional_versions(), **figures,
    )  # fmt: skip
    for key, value in figures.items():
        click.echo(f"{key:32} {value}")
    publish(row, ledger)


def _measure(encoder: VisionEncoder, paths: list[Path], hf_clips: int) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    tower = _tower_rate(encoder, paths[0])
    by_pyav = _pyav_rate(paths, cores)
    by_torchcodec = _torchcodec_in_child(paths[0].parent)
    whole, memory = _whole_rate(encoder, paths)
    hf = _hf_rate(paths[:hf_clips], encoder) if hf_clips else None
    bound = min(tower, max(by_pyav, by_torchcodec or 0.0))
    return {
        "frames_per_clip": _frames_taken(paths[0]),
        "tower_clips_per_s": four_digits(tower),
        "pyav_clips_per_s": four_digits(by_pyav),
        "torchcodec_clips_per_s": None if by_torchcodec is None else four_digits(by_torchcodec),
        "whole_clips_per_s": four_digits(whole),
        "share_of_the_lower": four_digits(whole / bound),
        "transformers_clips_per_s": None if hf is None else four_digits(hf),
        "times_transformers": None if hf is None else four_digits(whole / hf),
        "memory_mb_at_quarters": memory,
    }


# the clips


def _make_clips(
    folder: Path, clips: int, distinct: int, seconds: int, size: str, codec: str
) -> list[Path]:
    """Distinct clips, made in processes, and links to them."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise click.BadParameter(f"--size is {size!r}, expected WIDTHxHEIGHT")
    width, height = int(match[1]), int(match[2])
    folder.mkdir()
    make = partial(_make_clip, folder, seconds, width, height, codec)
    with ProcessPoolExecutor(min(distinct, len(os.sched_getaffinity(0)))) as pool:
        made = list(pool.map(make, range(distinct)))
    for index in range(distinct, clips):
        os.link(made[index % distinct], folder / f"{index:04}.mp4")
    return sorted(folder.iterdir())


def _make_clip(folder: Path, seconds: int, width: int, height: int, codec: str, seed: int) -> Path:
    """A camera that moves over a photograph, with some noise: motion and detail in every frame."""
    import av

    scale = 2 * max(width, height)
    picture = np.asarray(Image.open(PHOTOGRAPH).convert("RGB").resize((scale, scale)))
    random = np.random.default_rng(seed)
    noise = random.integers(0, 12, (height, width + 64, 3), np.uint8)
    path = folder / f"{seed:04}.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": "250"} if codec == "libx264" else {}
        stream.codec_context.thread_count = 1
        for index in range(seconds * RATE):
            phase = index / RATE / 7 + seed
            top = int((scale - height) * (0.5 + 0.5 * np.sin(phase)))
            left = int((scale - width) * (0.5 + 0.5 * np.cos(1.3 * phase)))
            shift = index % 64
            view = picture[top : top + height, left : left + width] // 2
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(view + noise[:, shift : shift + width]), format="rgb24"
            )
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _frames_taken(path: Path) -> int:
    return len(_indices(str(path)))


def _indices(path: str) -> list[int]:
    with open_video(path, path, VideoLimits()) as video:
        return sample_frames(video.timeline, VideoOptions(), path)[0]


# the rates


def _rate(count: int, run: Callable[[], Any], device: torch.device | None = None) -> float:
    gc.collect()
    begin = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return count / (time.perf_counter() - begin)


def _tower_rate(encoder: VisionEncoder, path: Path, repeats: int = 5) -> float:
    """The tower on a clip's patches, which are on its device already, piece by piece."""
    patches = load_video(Video(str(path)), encoder.image_config).patches
    pieces = [
        (piece.pixels.to(encoder.device), piece.grids)
        for piece in patches.split_steps(TOKEN_BUDGET[encoder.device.type])
    ]

    def run() -> None:
        for pixels, grids in pieces:
            encoder.forward(pixels, grids, "merged")

    run()  # compiles, and captures the graphs
    repeats = repeats if encoder.device.type == "cuda" else 1
    return max(_rate(1, run, encoder.device) for _ in range(repeats))


def _pyav_rate(paths: Sequence[Path], cores: int) -> float:
    """The sampled frames as RGB arrays: PyAV's own decoding, a thread a core, one clip each."""
    indices = _indices(str(paths[0]))

    def decode(path: Path) -> int:
        import av

        wanted, kept = set(indices), 0
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for index, frame in enumerate(container.decode(stream)):
                kept += frame.to_ndarray(format="rgb24").nbytes > 0 if index in wanted else 0
        return kept

    with ThreadPoolExecutor(cores) as pool:
        return _rate(len(paths), lambda: list(pool.map(decode, paths)))


def _torchcodec_rate(paths: Sequence[Path]) -> float:
    """The same by torchcodec."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found, unused-ignore]

    indices = _indices(str(paths[0]))

    def decode(path: Path) -> int:
        frames = VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(indices=indices)
        return int(frames.data.shape[0])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return _rate(len(paths), lambda: list(pool.map(decode, paths)))


def _torchcodec_in_child(clips: Path) -> float | None:
    """torchcodec's rate in a process whose linker finds the FFmpeg of PyAV's wheel."""
    if _version("torchcodec") is None:
        return None
    import av

    bundled = Path(av.__file__).parent.parent / "av.libs"
    with tempfile.TemporaryDirectory() as links:
        for library in bundled.glob("lib*.so*"):
            match = re.fullmatch(r"(lib\w+?)-[0-9a-f]+(\.so\.\d+)[\d.]*", library.name)
            if match is not None and not Path(links, match[1] + match[2]).exists():
                os.symlink(library, Path(links, match[1] + match[2]))
        of_torch = str(Path(torch.__file__).parent / "lib")
        found = [links, str(bundled), of_torch, os.environ.get("LD_LIBRARY_PATH", "")]
        command = [sys.executable, "-m", "tools.benchmarks.video", "--only-torchcodec", str(clips)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(found)},
        )  # fmt: skip
    if done.returncode:
        click.echo(f"torchcodec failed: {done.stderr.strip().splitlines()[-1:]}", err=True)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def _whole_rate(encoder: VisionEncoder, paths: Sequence[Path]) -> tuple[float, list[int]]:
    """From the files to the features, which are dropped; and the memory at each quarter."""
    next(iter(encoder.encode_iter([Video(str(paths[0]))])))
    memory: list[int] = []
    marks = {len(paths) * quarter // 4 for quarter in (1, 2, 3, 4)}

    def run() -> None:
        videos = (Video(str(path)) for path in paths)
        for count, clip in enumerate(encoder.encode_iter(videos), start=1):
            assert isinstance(clip, VideoFeatures)
            if count in marks:
                memory.append(round(memory_mb(os.getpid())[0]))

    return _rate(len(paths), run, encoder.device), memory


def _hf_rate(paths: Sequence[Path], encoder: VisionEncoder) -> float | None:
    """transformers: its video processor and its tower in the same dtype, one clip after another."""
    try:
        from transformers import Qwen2_5_VLConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel,
        )
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
        from transformers.video_utils import load_video as hf_load_video
    except ImportError as error:
        click.echo(f"transformers is left out: {error}", err=True)
        return None
    device, dtype = encoder.device, encoder.dtype
    config = Qwen2_5_VLConfig(vision_config=encoder.config.to_json()).vision_config
    with torch.device(device):
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, attn_implementation="sdpa", dtype=dtype
        ).eval()
    try:
        processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=True)
    except TypeError:  # an older transformers; clips of 60 s are below the cap
        processor = Qwen2VLVideoProcessor()
    backend = "torchcodec" if _version("torchcodec") else "pyav"

    @torch.no_grad()
    def run(chosen: Sequence[Path]) -> None:
        for path in chosen:
            indices = np.array(_indices(str(path)))
            frames, metadata = hf_load_video(
                str(path), backend=backend, sample_indices_fn=partial(_always, indices)
            )
            made = processor(videos=[frames], video_metadata=[metadata], return_tensors="pt")
            tower(
                made["pixel_values_videos"].to(device, dtype),
                grid_thw=made["video_grid_thw"].to(device),
            )

    try:
        run(paths[:1])
        return _rate(len(paths), lambda: run(paths), device)
    except Exception as error:  # noqa: BLE001 - versions of it differ; the other figures stand
        if backend == "torchcodec":
            backend = "pyav"
            run(paths[:1])
            return _rate(len(paths), lambda: run(paths), device)
        click.echo(f"transformers failed: {error!r}", err=True)
        return None


def _always(indices: Any, *_: Any, **__: Any) -> Any:
    return indices


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _optional_versions() -> dict[str, str | None]:
    return {package: _version(package) for package in OPTIONAL}


if __name__ == "__main__":
    main()
