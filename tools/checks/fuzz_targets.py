"""Define the fuzz targets, which parse untrusted bytes, and their rules for any input."""

import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import simplejpeg
from PIL import Image

from qwen_vit.common.safetensors_header import parse_header
from qwen_vit.common.strict_json import parse_json
from qwen_vit.config import ImageConfig, VisionConfig
from qwen_vit.errors import ImageError, QwenVitError
from qwen_vit.feature_files.read import load_features
from qwen_vit.images.image import ImageLimits
from qwen_vit.images.load import load_image
from qwen_vit.images.memory import set_decoding_memory
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.inputs.read import read_item
from qwen_vit.video.load import load_video
from qwen_vit.video.options import Video, VideoLimits

__all__ = ["MAX_BYTES", "TARGETS", "WrongAcceptanceError", "check", "run_target"]

MAX_BYTES = 2**20
LIMITS = ImageLimits(max_pixels=4_000_000, max_file_bytes=MAX_BYTES)
VIDEO_LIMITS = VideoLimits(
    max_pixels=1_000_000, max_file_bytes=MAX_BYTES, max_frames=2_000, max_decode_s=3
)
DECODING_BYTES = 2**28  # also for a Parquet page
MAX_CPU_S = 5.0  # for one input
GROWTH, MAX_TIMES = 10, 30  # the factor of an input's size, and the allowed factor of its time
MAX_TIMES_OF_HALF = 3  # from GROWTH / 2 to GROWTH; 2 is linear, and 4 is quadratic
MIN_COMPARED_S = 0.05  # shorter times are too noisy
REPEATS = 5  # a finding uses the shortest time, which has no full garbage collection


class WrongAcceptanceError(Exception):
    """Report input that a target accepts but must reject or note."""


class TooSlowError(Exception):
    """Report an input that took too long, absolutely or for its size."""


def header(data: bytes) -> None:
    """Parse the JSON header of a safetensors file."""
    parse_header(data, file_bytes=8 + len(data) + 1_000, source="x.safetensors")


def documents(data: bytes) -> None:
    """Parse config.json and preprocessor_config.json."""
    document = parse_json(data, source="config.json")
    for kind in (VisionConfig, ImageConfig):
        check(lambda kind=kind: kind.from_json(document))  # type: ignore[misc]


def tars(data: bytes) -> None:
    """Find and read a tar's members."""
    _listed(data, "a.tar")


def lists(data: bytes) -> None:
    """Parse a list of paths and a list of JSON objects.

    A line takes 6 us, and twice as long under atheris.
    """
    data = data[: MAX_BYTES // 4]
    for name in ("a.txt", "a.jsonl"):
        check(lambda name=name: _listed(data, name))  # type: ignore[misc]


def _listed(data: bytes, name: str, columns: ParquetColumns | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        for item in find_items([str(path)], columns=columns):
            if item.offset is not None or item.row is not None:
                check(lambda item=item: read_item(item, LIMITS))  # type: ignore[misc]


def parquet(data: bytes) -> None:
    """List and read a Parquet file's rows, with ids by row and from a column."""
    set_decoding_memory(DECODING_BYTES)
    try:
        for columns in (ParquetColumns("image"), ParquetColumns("image", "key")):
            check(lambda columns=columns: _listed(data, "a.parquet", columns))  # type: ignore[misc]
    finally:
        set_decoding_memory(None)


def features(data: bytes) -> None:
    """Read every row of a feature file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        path.write_bytes(data)
        for each in load_features(path, verify=True):
            assert each.embeds.dim() == 2


def images(data: bytes) -> None:
    """Decode an encoded image. If libjpeg warns about an accepted image, the result must have a
    note."""
    image = load_image(data, limits=LIMITS)
    if image.picture.mode != "RGB" or not image.pixels.size:
        raise WrongAcceptanceError(f"a picture of mode {image.picture.mode}")
    if image.format == "JPEG" and not image.notes:
        components = len(Image.open(io.BytesIO(data)).getbands())
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if components == 4 else "GRAY", strict=True)
        except ValueError as error:
            if str(error).startswith(("Corrupt JPEG data", "Premature end")):
                raise WrongAcceptanceError(str(error)) from None


def videos(data: bytes) -> None:
    """Decode four frames of a container or an animation."""
    video = Video(data, name="a.mp4", n_frames=4, min_pixels=784, max_pixels=50_176)
    loaded = load_video(video, ImageConfig.from_json({}), limits=VIDEO_LIMITS)
    if loaded.patches.grids[0].t != -(-len(loaded.timing.frame_seconds) // 2):
        raise WrongAcceptanceError(f"{loaded.timing.frame_seconds} for {loaded.patches.grids}")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "documents": documents,
    "tars": tars,
    "lists": lists,
    "parquet": parquet,
    "features": features,
    "images": images,
    "videos": videos,
}


def check(call: Callable[[], object]) -> None:
    """Run a call that may raise only our own errors. Each error must be one printable line with
    data."""
    try:
        call()
    except QwenVitError as error:
        text = str(error)
        if not text.isprintable() or not error.fact or len(text) > 5_000:
            raise WrongAcceptanceError(f"an error of {len(text)} characters: {text!r}") from None
        if isinstance(error, ImageError) and error.code == "invalid":
            raise WrongAcceptanceError(f"an image error without a code: {text}") from None


def run_target(name: str, data: bytes) -> None:
    """Run one input on one target; raise an error for a broken rule."""
    data = data[:MAX_BYTES]
    took = _cpu_seconds(name, data)
    if took > MAX_CPU_S:
        raise TooSlowError(f"{len(data):,} bytes took {took:.1f} s")
    if took > MIN_COMPARED_S / GROWTH and 8 <= len(data) <= MAX_BYTES // GROWTH:
        longer = _cpu_seconds(name, grown(data))
        if longer > max(MIN_COMPARED_S, MAX_TIMES * took):
            # Interleave the runs, because the speed of a busy machine changes.
            runs = [
                [_cpu_seconds(name, grown(data, times)) for times in (1, GROWTH // 2, GROWTH)]
                for _ in range(REPEATS)
            ]
            took, half, longer = map(min, zip(*runs, strict=True))
            if longer > max(MIN_COMPARED_S, MAX_TIMES * took, MAX_TIMES_OF_HALF * half):
                raise TooSlowError(
                    f"{len(data):,} bytes took {took:.3f} s, {GROWTH // 2} times as many "
                    f"{half:.3f} s, and {GROWTH} times as many {longer:.3f} s"
                )


def _cpu_seconds(name: str, data: bytes) -> float:
    """Return CPU seconds, because the clock of a busy machine varies."""
    begin = time.process_time()
    check(lambda: TARGETS[name](data))
    return time.process_time() - begin


def grown(data: bytes, times: int = GROWTH) -> bytes:
    """Repeat a chunk until the data is `times` as long. The same data gives the same result."""
    chance = random.Random(len(data))
    begin, end = sorted(chance.sample(range(len(data) + 1), 2))
    missing = (times - 1) * len(data)
    chunk = data[begin:end] * -(-missing // (end - begin))
    return data[:end] + chunk[:missing] + data[end:]


def example_documents() -> dict[str, bytes]:
    """Return the smallest valid inputs of the JSON targets."""
    entry = {"dtype": "F32", "shape": [10, 25], "data_offsets": [0, 1_000]}
    config = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 64}}
    return {"header": json.dumps({"x": entry}).encode(), "documents": json.dumps(config).encode()}
