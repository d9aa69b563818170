"""Decoding in a child process, which can be ended: C code cannot be interrupted."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.images.image import ExifPolicy, ImageLimits, RgbImage
from qwen_vit.images.refusals import too_much_memory

__all__ = ["decode_in_child"]

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def decode_in_child(
    data: bytes,
    name: str,
    limits: ImageLimits,
    exif: ExifPolicy = "apply",
    page: int | None = None,
) -> RgbImage:
    """Decode a file in a process of its own, which ends after `limits.max_seconds`.

    Raises ImageError as `decode_bytes` does, with code "slow" for a file that took too long, and
    with code "memory" for one that killed its process.
    """
    pixels = os.memfd_create("qwen-vit-pixels")
    facts = {"name": name, "limits": asdict(limits), "exif": exif, "page": page}
    request = json.dumps(facts).encode()
    path = os.pathsep.join([str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qwen_vit.images.decode_child", str(pixels)],
            input=request + b"\n" + data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.max_seconds,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            pass_fds=(pixels,),
            check=False,
        )
        if done.returncode != 0:
            raise _killed(done.returncode, name)
        answer = json.loads(done.stdout)
        if "error" in answer:
            facts, code = answer["error"], answer["code"]
            raise ImageError(**facts, code=code)
        return _picture(pixels, answer, name)
    except subprocess.TimeoutExpired:
        raise ImageError(
            f"not decoded after {limits.max_seconds:g} s",
            name=name,
            expected="at most ImageLimits.max_seconds",
            remedy="make it smaller, or raise ImageLimits.max_seconds in Python",
            code="slow",
        ) from None
    except MemoryError:
        raise too_much_memory(name) from None
    finally:
        os.close(pixels)


def _killed(code: int, name: str) -> ImageError:
    what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ImageError(
        f"the process that decoded it ended with {what}",
        name=name,
        remedy="leave it out, or free some memory",
        code="memory",
    )


def _picture(file: int, answer: dict[str, object], name: str) -> RgbImage:
    width, height = map(int, answer["size"])  # type: ignore[call-overload]
    with open(file, "rb", closefd=False) as pixels:
        pixels.seek(0)
        picture = Image.frombytes("RGB", (width, height), pixels.read())
    return RgbImage(picture, str(answer["format"]), name, tuple(answer["notes"]))  # type: ignore[arg-type]
