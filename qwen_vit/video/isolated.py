"""Reading a video in a process of its own first: a damaged file may crash FFmpeg's C code.

`python -m qwen_vit.video.isolated` is the child: one request on stdin, its answer on stdout.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.inputs.listing import Item
from qwen_vit.video.items import open_video_item, video_of_item
from qwen_vit.video.load import load_video
from qwen_vit.video.options import VideoLimits, VideoOptions
from qwen_vit.video.source import TAKE_A_PART

__all__ = ["load_in_child", "main"]

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
MARGIN_S = 60.0  # for the start of the process, beyond what the limit allows


def load_in_child(
    item: Item, options: VideoOptions, limits: VideoLimits, config: ImageConfig
) -> None:
    """Load a video in a child process, which may die, and drop what it gives.

    Raises ImageError as `load_video` does, with code "slow" for one that took too long, and with
    code "memory" for one that killed its process.
    """
    request = {
        "item": json.loads(item.to_json()),
        "options": asdict(options),
        "limits": asdict(limits),
        "config": config.to_json(),
    }
    path = os.pathsep.join([str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qwen_vit.video.isolated"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.max_decode_s + MARGIN_S,
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ImageError(
            f"not decoded after {limits.max_decode_s:g} s",
            name=item.id,
            expected="at most VideoLimits.max_decode_s",
            remedy=TAKE_A_PART,
            code="slow",
        ) from None
    if done.returncode != 0:
        code = done.returncode
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ImageError(
            f"the process that decoded it ended with {what}",
            name=item.id,
            remedy="leave it out, or free some memory",
            code="memory",
        )
    answer = json.loads(done.stdout)
    if answer is not None:
        facts, code = answer
        raise ImageError(**facts, code=code)


def main() -> None:
    """Answer one request."""
    with suppress(OSError):  # where memory ends, this process goes, and not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.loads(sys.stdin.buffer.read())
    item = Item.from_json(request["item"])
    answer: tuple[dict[str, str], str] | None = None
    try:
        limits = VideoLimits(**request["limits"])
        with open_video_item(item, limits) as (file, _):
            load_video(
                video_of_item(item, VideoOptions(**request["options"])),
                ImageConfig.from_json(request["config"]),
                limits=limits,
                file=file,
            )
    except ImageError as error:
        facts = {"fact": error.fact, "name": error.name, "expected": error.expected}
        answer = {**facts, "remedy": error.remedy}, error.code
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
