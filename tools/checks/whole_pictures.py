"""Check for false alarms: complete images of every installed encoder must load, as in Pillow.

\b
    python -m tools.checks.whole_pictures --ledger tools/benchmarks/ledger.jsonl
    python -m tools.checks.whole_pictures /usr/share --no-encoders
    python -m tools.checks.whole_pictures --no-encoders --sources FOLDER

It uses these encoders if installed: Pillow, cjpeg, ImageMagick, libvips, FFmpeg, cwebp, mozjpeg,
OpenCV. A JPEG of a folder counts as complete if `djpeg -strict` decodes it. It exits with 1 for a
false alarm.

`--sources` reads the test images in the source packages that tools/checks/picture_sources.py names.
An image is a false alarm if Pillow, libvips and the tools of its format open it without a warning,
but qwen_vit rejects it without a documented rule. qwen_vit must reject an image with a warning, or
add a note.
"""

import io
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.images.jpeg import check_blocks, read_jpeg
from qwen_vit.images.load import load_image
from qwen_vit.images.patches import patchify
from tools.checks.picture_judges import judge
from tools.checks.picture_sources import source_pictures
from tools.common import ROOT, ledger_options, ledger_row, publish

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
SIZES = ((640, 427), (317, 211), (64, 64), (17, 33), (8, 8), (1, 1), (1, 97), (1200, 37))
CONFIG = ImageConfig.from_json({})
SAMPLINGS = ("1x1", "2x1", "2x2", "1x2")


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--encoders/--no-encoders", default=True, help="Make images with the installed encoders."
)
@click.option(
    "--sources",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Judge the images in this folder's source packages instead.",
)
@ledger_options
def main(
    folders: tuple[Path, ...], encoders: bool, sources: Path | None, ledger: Path | None,
    commit: str,
) -> None:  # fmt: skip
    """Load all images, and print counts by encoder."""
    packages = ("pillow", "simplejpeg")
    publish(ledger_row("jpeg check", commit, "cpu", packages, **judge_shares()), ledger)
    if sources is not None:
        verdicts = judge_sources(sources)
        row = ledger_row("whole pictures sources", commit, "cpu", packages)
        publish(row | verdicts, ledger)
        sys.exit(1 if verdicts["false_alarms"] else 0)
    tried: Counter[str] = Counter()
    alarms = []
    pictures = itertools.chain(encoder_images() if encoders else (), *map(folder_images, folders))
    for maker, name, data in pictures:
        tried[maker] += 1
        if reason := false_alarm(data):
            alarms.append(f"{maker}, {name}: {reason}")
            print(alarms[-1], file=sys.stderr)
    figures: dict[str, Any] = {"pictures": tried.total(), "false_alarms": len(alarms)}
    figures["encoders"] = dict(sorted(tried.items()))
    publish(ledger_row("whole pictures", commit, "cpu", packages, **figures), ledger)
    sys.exit(1 if alarms else 0)


# Codes that a rule in docs/errors.md allows for complete images.
BY_RULE = ("ratio", "too-many-pixels", "mode", "format", "zero-side")


def judge_sources(folder: Path) -> dict[str, Any]:
    """Compare our result for each image of the source packages with the warnings of other
    programs."""
    packages: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for package, name, data in source_pictures(folder):
        packages[package] += 1
        warned = judge(data)
        try:
            notes, error = load_image(data).notes, None
        except ImageError as caught:
            notes, error = (), caught
        verdict = verdict_of(warned, notes, error)
        verdicts[verdict] += 1
        if error is not None and not warned:
            refused[error.code] += 1
        if verdict in ("false alarm", "refused by a rule", "not noted"):
            print(f"{verdict}: {package} {name}: {error or warned}", file=sys.stderr)
    return {
        "pictures": packages.total(),
        "false_alarms": verdicts["false alarm"],
        "verdicts": dict(sorted(verdicts.items())),
        "refused_without_a_warning": dict(sorted(refused.items())),
        "packages": dict(sorted(packages.items())),
    }


def verdict_of(warned: str, notes: tuple[str, ...], error: ImageError | None) -> str:
    """Return a judgement, in words, of our result for an image with or without other programs'
    warnings."""
    if warned:
        return "refused with others" if error else "noted" if notes else "not noted"
    if error is None:
        return "loaded"
    return "refused by a rule" if error.code in BY_RULE else "false alarm"


def false_alarm(data: bytes) -> str:
    """Return the reason why qwen_vit rejects a complete image or gives other pixels than Pillow, or
    an empty text."""
    try:
        pixels = load_image(data).pixels
    except ImageError as error:
        return str(error)
    image = Image.open(io.BytesIO(data))
    image.decodermaxblock = len(data)  # Pillow cannot decode arithmetic coding in pieces
    if image.mode == "RGB" and not image.has_transparency_data and 274 not in image.getexif():
        return "" if np.array_equal(pixels, np.asarray(image)) else "other pixels than Pillow's"
    return ""


def judge_shares() -> dict[str, dict[str, float]]:
    """Return the CPU time of the check for missing blocks, as a share of an image's other CPU time.

    "entropy_share_at_least" is the minimum time of entropy decoding alone, for a progressive image.
    The check of the same image as a baseline JPEG does the same other work.
    """
    photograph = Image.open(ROOT / "tests" / "photographs" / "rocket.jpg").convert("RGB")
    shares: dict[str, float] = {}
    least: dict[str, float] = {}
    for size, quality in itertools.product(((640, 427), (1920, 1280)), (85, 95)):
        picture = photograph.resize(size)
        baseline_s = 0.0
        for kind in ("baseline", "progressive"):
            data = _saved(picture, "JPEG", quality=quality, progressive=kind == "progressive")
            check_s = _seconds(partial(_check, data))
            rest_s = _seconds(partial(_load_and_cut, data)) - check_s
            name = f"{size[0]}x{size[1]} {kind} {quality}"
            shares[name] = round(check_s / rest_s, 3)
            if kind == "baseline":
                baseline_s = check_s
            else:
                least[name] = round((check_s - baseline_s) / rest_s, 3)
    return {"share": shares, "entropy_share_at_least": least}


def _load_and_cut(data: bytes) -> None:
    patchify(load_image(data).picture, CONFIG)


def _check(data: bytes) -> None:
    check_blocks(read_jpeg(data, ""), "")


def _seconds(call: Callable[[], Any], times: int = 15) -> float:
    """Return the lowest CPU time of a call."""
    least = math.inf
    for _ in range(times):
        begin = time.process_time()
        call()
        least = min(least, time.process_time() - begin)
    return least


def folder_images(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield a folder's images that Pillow decodes, and JPEGs only without djpeg warnings."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size < 2**25:
            data = path.read_bytes()
            try:
                image = Image.open(io.BytesIO(data))
                image.load()
                ratio = max(image.size) / min(image.size)
            except Exception:  # noqa: BLE001 - plug-ins raise anything
                continue
            if ratio > 200 or image.format not in ("JPEG", "MPO") or _djpeg_accepts(data):
                yield f"found {image.format}", str(path), data


def _djpeg_accepts(data: bytes) -> bool:
    if not shutil.which("djpeg"):
        return False
    return subprocess.run(["djpeg", "-strict"], input=data, capture_output=True).returncode == 0


def encoder_images() -> Iterator[tuple[str, str, bytes]]:
    """Yield the images of every installed encoder: maker, name, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for picture_name, picture in pictures():
            source = Path(folder, "source.ppm")
            picture.save(source)
            for maker, options, target, command in commands(str(source), folder):
                if shutil.which(command[0]):
                    Path(target).unlink(missing_ok=True)
                    done = subprocess.run(command, capture_output=True, check=False)
                    if done.returncode == 0 and Path(target).is_file():
                        yield maker, f"{picture_name} {options}", Path(target).read_bytes()
            for maker, options, data in by_libraries(picture):
                yield maker, f"{picture_name} {options}", data


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Return the test photographs, noise and flat colour, at odd sizes."""
    photographs = [
        (path.name, Image.open(path).convert("RGB"))
        for path in sorted((ROOT / "tests" / "photographs").iterdir())
        if path.suffix in (".jpg", ".png")
    ]
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), np.uint8)
    photographs += [
        ("noise", Image.fromarray(noise)),
        ("grey", Image.new("RGB", (640, 427), "gray")),
    ]
    for name, picture in photographs:
        for size in SIZES:
            yield f"{name} {size[0]}x{size[1]}", picture.resize(size)


def commands(source: str, folder: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Return the commands of encoders: maker, options, the written file, the command."""
    jpeg, webp, png = (f"{folder}/out.{suffix}" for suffix in ("jpg", "webp", "png"))
    kinds = (["-baseline"], ["-progressive"], ["-optimize"], ["-restart", "1"], ["-arithmetic"])
    for kind, sampling in itertools.product(kinds, SAMPLINGS):
        options = [*kind, "-quality", "83", "-sample", sampling]
        yield "cjpeg", str(options), jpeg, ["cjpeg", *options, "-outfile", jpeg, source]
    for options in (["-interlace", "JPEG"], ["-sampling-factor", "4:1:1"], ["-colorspace", "CMYK"]):
        yield "ImageMagick", str(options), jpeg, ["convert", source, *options, jpeg]
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tiff", "avif"):
        target = f"{folder}/out.{suffix}"
        yield f"ImageMagick {suffix}", "", target, ["convert", source, target]
        yield f"FFmpeg {suffix}", "", target, _ffmpeg(source, target)
    for save in ("Q=75", "interlace", "optimize_coding,trellis_quant", "subsample_mode=off,Q=96"):
        yield "libvips", save, jpeg, ["vips", "copy", source, f"{jpeg}[{save}]"]
    for quality in ("2", "15"):
        yield "FFmpeg", quality, jpeg, _ffmpeg(source, "-q:v", quality, jpeg)
    for options in ([], ["-lossless"], ["-m", "6", "-sharp_yuv"]):
        yield "cwebp", str(options), webp, ["cwebp", source, *options, "-o", webp]
    yield "libvips png", "", png, ["vips", "copy", source, f"{png}[interlace]"]


def _ffmpeg(source: str, *rest: str) -> list[str]:
    return ["ffmpeg", "-y", "-i", source, "-frames:v", "1", *rest]


def by_libraries(picture: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    """Yield images of Pillow's encoders, and of the installed encoders of mozjpeg and OpenCV."""
    for quality, progressive, sampling, restart in itertools.product(
        (20, 75, 100), (False, True), (0, 2), (0, 3)
    ):
        options = {"quality": quality, "progressive": progressive, "subsampling": sampling}
        try:
            data = _saved(picture, "JPEG", restart_marker_blocks=restart, **options)
        except OSError:  # Pillow's buffer is too small for tiny images of noise at quality 100
            continue
        yield "Pillow", f"{options} {restart}", data
        if quality == 75 and not restart:
            yield from _mozjpeg(data)
    for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"):
        yield f"Pillow {kind.lower()}", "", _saved(picture, kind)
    for mode in ("L", "CMYK"):
        yield "Pillow", mode, _saved(picture.convert(mode), "JPEG", optimize=True)
    try:
        import cv2
    except ImportError:
        return
    for flags in ((), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)):
        ok, encoded = cv2.imencode(".jpg", np.asarray(picture)[..., ::-1], flags)
        if ok:
            yield "OpenCV", str(flags), encoded.tobytes()


def _mozjpeg(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    try:
        from mozjpeg_lossless_optimization import optimize
    except ImportError:
        return
    yield "mozjpeg", "", optimize(data)


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


if __name__ == "__main__":
    main()
