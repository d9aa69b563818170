"""The child process of `decode_in_child`: one request on stdin, its answer on stdout.

The pixels go into the file whose number is the argument.
"""

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qwen_vit.errors import ImageError
from qwen_vit.images.decode import decode_bytes
from qwen_vit.images.image import ImageLimits

__all__ = ["main"]

NEVER_S = 10.0**9  # the child itself starts no other


def main() -> None:
    """Answer one request."""
    with suppress(OSError):  # where memory ends, this process goes, and not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.loads(sys.stdin.buffer.readline())
    limits = replace(ImageLimits(**request["limits"]), max_seconds=NEVER_S)
    answer: dict[str, object]
    try:
        data, policy = sys.stdin.buffer.read(), (request["exif"], request["page"])
        image = decode_bytes(data, request["name"], limits, *policy)
    except ImageError as error:
        facts = {"fact": error.fact, "name": error.name, "expected": error.expected}
        answer = {"error": {**facts, "remedy": error.remedy}, "code": error.code}
    else:
        answer = {"size": image.picture.size, "format": image.format, "notes": image.notes}
        with open(int(sys.argv[1]), "wb", closefd=False) as pixels:
            pixels.write(image.picture.tobytes())
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
