"""Record the frames and sizes that qwen-vl-utils 0.0.14 chooses for random videos."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import torch

from tests.support.video_cases import CASES, GOLDEN, SamplingCase, digest, sampling_cases

OURS = {"n_frames": "nframes", "start": "video_start", "end": "video_end"}  # our names: theirs


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=GOLDEN, help="Write this file.")
def main(out: Path) -> None:
    """Record the results of qwen-vl-utils 0.0.14 for the cases of tests/support/video_cases.py.

    \b
    pip install --no-deps qwen-vl-utils==0.0.14 requests
    python -m tools.make_video_golden

    The library's own functions compute everything from the options to the size. The command
    replaces only the decoder and the resize, so that it needs no video.
    """
    library = _library()
    rows = [_answer(library, case) for case in sampling_cases()]
    refused = sum(row is None for row in rows)
    facts = {"made_by": "qwen-vl-utils 0.0.14", "torch": torch.__version__, "rows": rows}
    out.write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    click.echo(f"wrote {CASES} cases, of which the library rejects {refused}")


def _library() -> Any:
    """Return qwen_vl_utils.vision_process with a fake decoder and a fake resize."""
    decoders: Any = ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = _Decoder
    sys.modules["torchcodec"] = ModuleType("torchcodec")
    sys.modules["torchcodec.decoders"] = decoders
    import qwen_vl_utils.vision_process as library  # type: ignore[import-not-found, unused-ignore]

    def resize(video: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
        if min(size) < 1:
            raise ValueError("a side of 0")
        return torch.empty(1).expand(*video.shape[:2], *size)

    library.transforms = SimpleNamespace(functional=SimpleNamespace(resize=resize))
    library.get_video_reader_backend = lambda: "torchcodec"
    library.VIDEO_READER_BACKENDS["torchvision"] = _refuse
    return library


def _refuse(_: Any) -> Any:
    raise ValueError("refused")


class _Decoder:
    """Replace torchcodec's decoder. The path names the case."""

    def __init__(self, path: str, **_: Any) -> None:
        n_frames, rate, self.height, self.width = json.loads(path)
        self.metadata = SimpleNamespace(average_fps=rate, num_frames=n_frames)

    def get_frames_at(self, indices: list[int]) -> Any:
        size = (len(indices), 3, self.height, self.width)
        return SimpleNamespace(data=torch.empty(1).expand(size))


def _answer(library: Any, case: SamplingCase) -> list[Any] | None:
    """Return a digest of the indices, rate, height and width, or None if the library rejects the
    case."""
    path = json.dumps([case.n_frames, case.rate, case.height, case.width])
    request = {"video": path, **{OURS.get(k, k): v for k, v in case.options.items()}}
    if "nframes" in request:
        request.pop("fps", None)
    try:
        (video, metadata), rate = library.fetch_video(
            request, return_video_sample_fps=True, return_video_metadata=True
        )
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    return [digest(list(metadata["frames_indices"])), rate, *video.shape[-2:]]


if __name__ == "__main__":
    main()
