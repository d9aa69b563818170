"""Run the child process of `decode_in_child`, and write pixels to the given file descriptor."""

import sys
from dataclasses import replace
from typing import Any, BinaryIO

from qwen_vit.common.child_process import answer_request
from qwen_vit.images.decode import decode_bytes
from qwen_vit.images.image import ImageLimits

NEVER_S = 10.0**9  # the child process must not start another one


def _decode(request: dict[str, Any], data: BinaryIO) -> object:
    limits = replace(ImageLimits(**request["limits"]), max_seconds=NEVER_S)
    policy = (request["exif"], request["page"])
    image = decode_bytes(data.read(), request["name"], limits, *policy)
    with open(int(sys.argv[1]), "wb", closefd=False) as pixels:
        pixels.write(image.picture.tobytes())
    return image.picture.size, image.format, image.notes


if __name__ == "__main__":
    answer_request(_decode)
