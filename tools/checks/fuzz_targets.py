"""What is fuzzed: parsers of bytes from outside, and what must hold for any input."""

import io
import json
import tempfile
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
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.read import read_item

__all__ = ["MAX_BYTES", "TARGETS", "WrongAcceptanceError", "check", "run_target"]

MAX_BYTES = 2**20
LIMITS = ImageLimits(max_pixels=4_000_000, max_file_bytes=MAX_BYTES)


class WrongAcceptanceError(Exception):
    """Input that must be refused, or noted, passed as good."""


def header(data: bytes) -> None:
    """The JSON header of a safetensors file."""
    parse_header(data, file_bytes=8 + len(data) + 1_000, source="x.safetensors")


def documents(data: bytes) -> None:
    """config.json and preprocessor_config.json."""
    document = parse_json(data, source="config.json")
    for kind in (VisionConfig, ImageConfig):
        check(lambda kind=kind: kind.from_json(document))  # type: ignore[misc]


def tars(data: bytes) -> None:
    """A tar's members, found and read."""
    _listed(data, "a.tar")


def lists(data: bytes) -> None:
    """A list of paths, and one of JSON objects."""
    for name in ("a.txt", "a.jsonl"):
        check(lambda name=name: _listed(data, name))  # type: ignore[misc]


def _listed(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        for item in find_items([str(path)]):
            if item.offset is not None:
                check(lambda item=item: read_item(item, LIMITS))  # type: ignore[misc]


def features(data: bytes) -> None:
    """A feature file, with every row read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.safetensors")
        path.write_bytes(data)
        for each in load_features(path, verify=True):
            assert each.embeds.dim() == 2


def images(data: bytes) -> None:
    """An encoded image: refused, or its pixels, and then libjpeg has no warning without a note."""
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


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "documents": documents,
    "tars": tars,
    "lists": lists,
    "features": features,
    "images": images,
}


def check(call: Callable[[], object]) -> None:
    """Run a call that may raise our own errors alone, each one printable line with data."""
    try:
        call()
    except QwenVitError as error:
        text = str(error)
        if not text.isprintable() or not error.fact or len(text) > 5_000:
            raise WrongAcceptanceError(f"an error of {len(text)} characters: {text!r}") from None
        if isinstance(error, ImageError) and error.code == "invalid":
            raise WrongAcceptanceError(f"an image error without a code: {text}") from None


def run_target(name: str, data: bytes) -> None:
    """One input to one target; raises whatever must not happen."""
    check(lambda: TARGETS[name](data[:MAX_BYTES]))


def example_documents() -> dict[str, bytes]:
    """The smallest good inputs of targets that are JSON."""
    entry = {"dtype": "F32", "shape": [10, 25], "data_offsets": [0, 1_000]}
    config = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 64}}
    return {"header": json.dumps({"x": entry}).encode(), "documents": json.dumps(config).encode()}
