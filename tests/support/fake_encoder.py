"""Provide a fast fake encoder for tests of other parts, and a command that uses it.

    python -m tests.support.fake_encoder JOURNAL export INPUT... --out DIR

runs like `qwen-vit export --model ...`. The rows are a plain function of the pixels, so that the
same image gives the same bytes on every machine. The encoder appends one byte to JOURNAL for each
encoded image, which a later kill does not remove.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL
import torch
from torch import Tensor

from qwen_vit.batching import BatchEncoder
from qwen_vit.cli import main as cli
from qwen_vit.common.prefetch import Job
from qwen_vit.config import ImageConfig
from qwen_vit.errors import ImageError
from qwen_vit.export import run as export
from qwen_vit.features import FailedImage, ImageFeatures
from qwen_vit.images.patches import Patches
from qwen_vit.loading import LoadedImage
from qwen_vit.outputs import OutputOptions

WIDTH, DEPTH = 16, 4
# An image with only the value POISON gives NaN, and with only TOO_LARGE an out-of-memory error.
POISON, TOO_LARGE = 7, 9
HELD = 5  # an image with only this value waits until the test removes a file
BATCH = 32


VISION_ENCODER: Any = object  # so that a type checker accepts a fake as a VisionEncoder


class FakeEncoder(VISION_ENCODER):  # type: ignore[misc]
    """Implement the part of VisionEncoder that an export needs."""

    config = SimpleNamespace(hidden_size=WIDTH, out_hidden_size=WIDTH, merge_unit=4, depth=DEPTH)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, journal: Path | None = None, **settings: Any) -> None:
        self.image_config = ImageConfig.from_json(settings)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.journal = None if journal is None else os.open(journal, flags)
        self.encoded = 0

    def metadata(self) -> dict[str, Any]:
        return {
            "model": "stand-in",
            "commit": None,
            "weights_sha256": "0" * 64,
            "config_sha256": "1" * 64,
            "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
            "device": "cpu",
            "gpu": None,
            "quantization": None,
            "dtype": "float32",
            "image_policy": self.image_config.to_json(),
        }

    def encode_iter(
        self, images: Iterable[Any], **options: Any
    ) -> Iterator[ImageFeatures | FailedImage]:
        """Encode in batches and read ahead, like the real encoder."""
        batch: list[Patches] = []
        for image in images:
            batch.append(image)
            if len(batch) == BATCH:
                yield from self._encode(batch, options)
                batch = []
        yield from self._encode(batch, options)

    def encode(self, images: Iterable[Any], **options: Any) -> list[ImageFeatures]:
        """Encode paths, as in a dry run."""
        return [ImageFeatures(str(each), torch.zeros(1, WIDTH), (1, 2, 2)) for each in images]

    def _encode(
        self, batch: list[Patches], options: dict[str, Any]
    ) -> Iterator[ImageFeatures | FailedImage]:
        output = options.get("output", "merged")
        for patches in batch:
            name = str(patches.name)
            self.encoded += 1
            if self.journal is not None:
                os.write(self.journal, b".")
            [grid] = patches.grids
            rows = patches.pixels[:, :WIDTH].float()
            layers = {block: rows + block for block in options.get("layers", ())}
            if output != "patch":
                rows = rows.reshape(-1, 4, WIDTH).mean(dim=1)
            if (patches.pixels == POISON).all():
                rows[-1, -1] = float("nan")
            if output == "mean":
                rows = rows.mean(dim=0, keepdim=True)
            if options.get("normalize"):
                rows = rows / rows.norm(dim=1, keepdim=True)
            if (patches.pixels == TOO_LARGE).all():
                fact = f"its {len(rows)} patches do not fit into the memory of cpu"
                yield FailedImage(name, ImageError(fact, name=name, code="out-of-memory"))
            else:
                yield ImageFeatures(
                    name, rows, (grid.t, grid.h, grid.w), layers=layers, output=output,
                    normalized=bool(options.get("normalize")),
                )  # fmt: skip


class BatchedEncoder(FakeEncoder):
    """Encode in batches like the real encoder on a CPU, with rows that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []  # the number of images in each batch

    def encode_iter(
        self, images: Iterable[Any], **options: Any
    ) -> Iterator[ImageFeatures | FailedImage]:
        """Encode in batches of `TOKEN_BUDGET["cpu"]` patches."""
        config: Any = SimpleNamespace(patch_dim=2 * 588, merge_unit=4)
        encoder = BatchEncoder(self._forward, self.device, config, OutputOptions(), "skip")
        jobs = (Job(partial(LoadedImage, str(each.name), patches=each)) for each in images)
        return encoder.encode(jobs, threads=1)

    def _forward(self, pixels: Tensor, grids: Any, *_: Any) -> Tensor:
        self.batches.append(len(grids))
        return pixels[:, :WIDTH].float().reshape(-1, 4, WIDTH).mean(dim=1) + len(grids)


class BlockingEncoder(FakeEncoder):
    """Encode slowly, so that tests can kill a worker of a cluster."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "journal")
        self.hold = folder / "hold"
        (folder / "workers" / str(os.getpid())).touch()

    def _encode(
        self, batch: list[Patches], options: dict[str, Any]
    ) -> Iterator[ImageFeatures | FailedImage]:
        for patches in batch:
            while (patches.pixels == HELD).all() and self.hold.exists():
                time.sleep(0.01)
            time.sleep(0.005)
            yield from super()._encode([patches], options)


def load_blocking_encoder(*_: Any, held: Path, **__: Any) -> BlockingEncoder:
    """Replace export.load_encoder."""
    return BlockingEncoder(held)


def load_fake_encoder(*_: Any, **__: Any) -> FakeEncoder:
    """Replace export.load_encoder, also in a worker."""
    return FakeEncoder()


def main() -> None:
    journal = Path(sys.argv.pop(1))
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: FakeEncoder(journal))
    export.VisionEncoder = loader  # type: ignore[attr-defined,assignment]
    cli.main()


if __name__ == "__main__":
    main()
