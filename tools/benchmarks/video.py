"""Measure clips per second from video files to features, and the rates that bound them.

It makes 720p clips with PyAV; each repeats its first ten seconds. Then it runs these parts:

\b
    checks        a clip's frames against PyAV's own frames, and the bits of the clip in pieces
    tower         the tower alone, on patches in GPU memory
    files         `encode_iter` on files
    decode        decoding alone on all cores, with PyAV and with torchcodec
    loading       the loader threads alone, without a tower
    transformers  its tower's features against ours; the rate of its video processor and tower

The share divides the `encode_iter` rate by the lower rate of the tower and the better decoder. It
prints each result immediately, and one JSON line. --part runs some parts alone.

\b
    python -m tools.benchmarks.video --ledger tools/benchmarks/ledger.jsonl
    python -m tools.benchmarks.video --part loading --part files --clips 40
    python -m tools.benchmarks.video --model tiny --clips 4 --seconds 4 --size 160x90   # anywhere

torchcodec uses the FFmpeg of PyAV's wheel, and needs no system library. Without torchcodec the
column is empty. Without --model, it uses a 7B-shaped tower in bf16 with random weights.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from qwen_vit.batching import TOKEN_BUDGET
from qwen_vit.common.prefetch import core_count, thread_count, work_ahead
from qwen_vit.encoder import VisionEncoder
from qwen_vit.features import VideoFeatures
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.picture import resizes_on
from qwen_vit.loading import ImageLoader
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits, VideoOptions
from qwen_vit.video.reader import open_video
from qwen_vit.video.sampling import sample_frames
from tests.support.process_memory import memory_mb
from tools.benchmarks.video_checks import (
    Figures,
    check_clip,
    check_features,
    draw,
    hf_tower_like,
)
from tools.benchmarks.video_clips import make_clips
from tools.common import ROOT, default_device, four_digits, ledger_options, ledger_row, publish
from tools.random_tower import write_model

PARTS = ("checks", "tower", "files", "decode", "loading", "transformers")
PACKAGES = ("av", "pillow", "triton")
OPTIONAL = ("torchcodec", "transformers", "torchvision")


@click.command(help=__doc__)
@click.option("--model", help="Use this checkpoint instead of random weights.")
@click.option(
    "--clips",
    default=100,
    show_default=True,
    help="Number of files, which link to the --distinct clips.",
)
@click.option("--distinct", default=8, show_default=True, help="Number of clips to make.")
@click.option(
    "--seconds", default=60, show_default=True, help="Set the length of a clip, in seconds."
)
@click.option(
    "--size", default="1280x720", show_default=True, help="Set width x height of a clip, in pixels."
)
@click.option("--codec", default="libx264", show_default=True, help="Choose PyAV's encoder.")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(PARTS), help="Run this part alone; repeat."
)
@click.option(
    "--decode-threads", type=int, help="Set the loader threads; default: one per two cores."
)
@click.option(
    "--decode-clips", default=32, show_default=True, help="Number of clips for decoding alone."
)
@click.option(
    "--hf-clips", default=4, show_default=True, help="Number of clips for transformers; 0 skips it."
)
@click.option(
    "--partial", type=click.Path(path_type=Path), help="Write the results so far to this JSON file."
)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the rates into this PNG.")
@click.option("--only-torchcodec", type=click.Path(path_type=Path), hidden=True)
@ledger_options
def main(
    model: str | None, clips: int, distinct: int, seconds: int, size: str, codec: str,
    parts: tuple[str, ...], decode_threads: int | None, decode_clips: int, hf_clips: int,
    partial: Path | None, chart: Path | None, only_torchcodec: Path | None, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    if only_torchcodec is not None:  # this is the child process, which only times torchcodec
        chosen = sorted(only_torchcodec.iterdir())[:decode_clips]
        click.echo(json.dumps(_torchcodec_rate(chosen)))
        return
    figures = Figures(partial)
    device = default_device()
    with tempfile.TemporaryDirectory(prefix="qwen-vit-video-") as name:
        folder = Path(name)
        begin = time.perf_counter()
        paths = make_clips(folder / "clips", clips, min(distinct, clips), seconds, size, codec)
        figures.add(clips_made_in_s=four_digits(time.perf_counter() - begin))
        chosen_parts = set(parts or PARTS) - (set() if hf_clips else {"transformers"})
        if model is None:
            (folder / "model").mkdir()
            write_model(folder / "model", device)
        encoder = VisionEncoder.from_pretrained(model or str(folder / "model"), device=device)
        threads = thread_count(decode_threads)
        _measure(encoder, paths, chosen_parts, threads, decode_clips, hf_clips, figures)
    row = ledger_row(
        "video", commit, device, PACKAGES, clips=clips, distinct=distinct, seconds=seconds,
        size=size, codec=codec, decode_clips=decode_clips, hf_clips=hf_clips,
        decode_threads=threads,
        parts=sorted(chosen_parts),
        optional=_optional_versions(), **figures.found,
    )  # fmt: skip
    publish(row, ledger)
    if chart is not None and chosen_parts == set(PARTS):
        draw(row, chart)


def _measure(
    encoder: VisionEncoder, paths: list[Path], parts: set[str], threads: int, decode_clips: int,
    hf_clips: int, figures: Figures,
) -> None:  # fmt: skip
    """Run the checks first, and then measure every rate, the most important rates first."""
    indices = _indices(str(paths[0]))
    figures.add(frames_per_clip=len(indices))
    found = figures.found
    if "checks" in parts:
        figures.add(**check_clip(encoder, paths[0], indices))
    if "tower" in parts:
        figures.add(tower_clips_per_s=four_digits(_tower_rate(encoder, paths[0])))
    if "files" in parts:
        figures.add(**_whole_rate(encoder, paths, threads))
    if "decode" in parts:
        by_pyav = _pyav_rate(paths[:decode_clips], indices, core_count())
        figures.add(pyav_clips_per_s=four_digits(by_pyav))
        by_torchcodec = _torchcodec_in_child(paths[0].parent, decode_clips)
        figures.add(torchcodec_clips_per_s=by_torchcodec and four_digits(by_torchcodec))
    end_to_end = found.get("whole_clips_per_s")
    if parts >= {"tower", "files", "decode"}:
        decoder = max(found["pyav_clips_per_s"], found["torchcodec_clips_per_s"] or 0.0)
        bound = min(found["tower_clips_per_s"], decoder)
        figures.add(share_of_the_lower=four_digits(end_to_end / bound))
    if "loading" in parts:
        figures.add(**_loading_rate(encoder, paths, threads))
    if "transformers" in parts:
        hf = hf_tower_like(encoder)
        figures.add(**check_features(encoder, hf, paths[0]))
        theirs = _hf_rate(paths[:hf_clips], encoder, hf)
        figures.add(
            transformers_clips_per_s=theirs and four_digits(theirs),
            times_transformers=theirs and end_to_end and four_digits(end_to_end / theirs),
        )


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
    """Measure the tower on a clip's patches on the device, piece by piece."""
    patches = load_video(Video(str(path)), encoder.image_config).patches
    pieces = [
        (piece.pixels.to(encoder.device), piece.grids)
        for piece in patches.split_steps(TOKEN_BUDGET[encoder.device.type])
    ]

    def run() -> None:
        for pixels, grids in pieces:
            encoder.forward(pixels, grids, "merged")

    run()  # compiles kernels and captures graphs
    repeats = repeats if encoder.device.type == "cuda" else 1
    return max(_rate(1, run, encoder.device) for _ in range(repeats))


def _pyav_rate(paths: Sequence[Path], indices: list[int], cores: int) -> float:
    """Measure PyAV's own decoding of the sampled frames to RGB arrays, with one thread per core and
    one clip per thread."""

    def decode(path: Path) -> int:
        import av

        chosen, kept = set(indices), 0
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for index, frame in enumerate(container.decode(stream)):
                kept += frame.to_ndarray(format="rgb24").nbytes > 0 if index in chosen else 0
        return kept

    with ThreadPoolExecutor(cores) as pool:
        return _rate(len(paths), lambda: list(pool.map(decode, paths)))


def _torchcodec_rate(paths: Sequence[Path]) -> float:
    """Measure torchcodec's decoding rate."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found, unused-ignore]

    indices = _indices(str(paths[0]))

    def decode(path: Path) -> int:
        frames = VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(indices=indices)
        return int(frames.data.shape[0])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return _rate(len(paths), lambda: list(pool.map(decode, paths)))


def _torchcodec_in_child(clips: Path, count: int) -> float | None:
    """Measure torchcodec's rate in a process whose linker finds the FFmpeg of PyAV's wheel."""
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
        command += ["--decode-clips", str(count)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(found)},
        )  # fmt: skip
    if done.returncode:
        click.echo(f"torchcodec failed: {done.stderr.strip().splitlines()[-1:]}", err=True)
        return None
    return float(done.stdout.strip().splitlines()[-1])


def _whole_rate(encoder: VisionEncoder, paths: Sequence[Path], threads: int) -> dict[str, Any]:
    """Encode files and drop the features. Return the rate, and the memory at each quarter."""
    next(iter(encoder.encode_iter([Video(str(paths[0]))])))
    memory: list[int] = []
    marks = {len(paths) * quarter // 4 for quarter in (1, 2, 3, 4)}

    def run() -> None:
        videos = (Video(str(path)) for path in paths)
        clips = encoder.encode_iter(videos, decode_threads=threads)
        for count, clip in enumerate(clips, start=1):
            assert isinstance(clip, VideoFeatures)
            if count in marks:
                memory.append(round(memory_mb(os.getpid())[0]))

    begin = time.process_time()
    rate = _rate(len(paths), run, encoder.device)
    return {
        "whole_clips_per_s": four_digits(rate),
        "whole_cpu_s_per_clip": four_digits((time.process_time() - begin) / len(paths)),
        "memory_mb_at_quarters": memory,
    }


def _loading_rate(encoder: VisionEncoder, paths: Sequence[Path], threads: int) -> dict[str, Any]:
    """Load files as `encode_iter` does, and drop the patches."""
    loader = ImageLoader(
        encoder.config, encoder.image_config, "auto", ImageLimits(), "raise",
        video_threads=max(1, core_count() // threads),
        piece_patches=TOKEN_BUDGET[encoder.device.type], on_gpu=resizes_on(encoder.device),
    )  # fmt: skip

    def run() -> None:
        jobs = loader.jobs((Video(str(path)) for path in paths), is_ahead=threads > 1)
        for loaded in work_ahead(jobs, threads=threads):
            if loaded.stream is not None:
                deque(loaded.stream.pieces(), maxlen=0)

    begin = time.process_time()
    rate = _rate(len(paths), run)
    return {
        "loading_clips_per_s": four_digits(rate),
        "loading_cpu_s_per_clip": four_digits((time.process_time() - begin) / len(paths)),
    }


def _hf_rate(paths: Sequence[Path], encoder: VisionEncoder, tower: Any) -> float | None:
    """Measure transformers' video processor and tower in the same dtype, one clip at a time."""
    try:
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
        from transformers.video_utils import load_video as hf_load_video
    except (ImportError, RuntimeError) as error:
        click.echo(f"transformers is skipped: {error}", err=True)
        return None
    device, dtype = encoder.device, encoder.dtype
    try:
        processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=True)
    except TypeError:  # an older transformers without this limit, which clips of 60 s do not reach
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
