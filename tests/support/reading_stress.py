"""Make export folders by hand, and run a trial of many shards."""

import json
import os
import random
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

from qwen_vit.feature_files.read import SHARDS_OPEN, load_features
from qwen_vit.feature_files.schema import METADATA_KEY
from qwen_vit.features import ImageFeatures
from tests.support.features import features_of
from tests.support.process_memory import memory_mb, open_files

SETTINGS = {"model": "tiny", "dtype": "float32", "output": "merged"}


@dataclass
class Folder:
    """Make an export of seven images in shards of three, in which c and all of the second shard
    failed."""

    path: Path
    names: tuple[str, ...] = tuple("abcdefg")
    failed: tuple[str, ...] = tuple("cdef")
    size: int = 3

    @property
    def good(self) -> list[str]:
        return [name for name in self.names if name not in self.failed]

    @property
    def images(self) -> dict[str, ImageFeatures]:
        """Make images of 1, 2, 3, ... tokens in each shard."""
        starts = range(0, len(self.names), self.size)
        made = (features_of(*self.names[i : i + self.size]) for i in starts)
        return {image.id: image for images in made for image in images}

    def shard(self, index: int) -> Path:
        return self.path / f"shard-{index:08}.safetensors"

    def write(self) -> Self:
        description = {**SETTINGS, "schema_version": 1, "shard_size": self.size}
        description["n_images"] = len(self.names)
        self.path.mkdir(exist_ok=True)
        (self.path / "export.json").write_text(json.dumps(description))
        lines = [json.dumps({"id": name, "source": f"/data/{name}"}) for name in self.names]
        (self.path / "listing.jsonl").write_text("".join(f"{line}\n" for line in lines))
        everything = self.images
        for index, start in enumerate(range(0, len(self.names), self.size)):
            names = self.names[start : start + self.size]
            images = [everything[name] for name in names if name not in self.failed]
            embeds = [image.embeds for image in images]
            facts = {
                **description,
                "ids": [image.id for image in images],
                "patches_per_row": 4,
                "images": [
                    {"size_px": [28, i], "notes": ["EXIF"], "sha256": "0"}
                    for i, _ in enumerate(images)
                ],
                "errors": [
                    {"id": name, "stage": "decode", "code": "truncated", "message": f"{name} ends"}
                    for name in names
                    if name in self.failed
                ],
            }
            offsets = [0, *accumulate(len(rows) for rows in embeds)]
            tensors = {
                "image_embeds": torch.cat([torch.zeros(0, 6), *embeds]),
                "image_grid_thw": torch.tensor(
                    [image.grid_thw for image in images], dtype=torch.int64
                ).reshape(-1, 3),
                "image_token_offsets": torch.tensor(offsets),
            }
            save_file(tensors, self.shard(index), metadata={METADATA_KEY: json.dumps(facts)})
        return self


def many_shards(folder: str | Path, *, shards: int, seed: int = 0) -> dict[str, Any]:
    """Read one image of each shard, in order and then at random by id, and measure the process."""
    names = tuple(f"{i:06}.jpg" for i in range(shards))
    path = Folder(Path(folder) / "many", names, failed=(), size=1).write().path
    begin = time.monotonic()
    features = load_features(path)
    open_s = time.monotonic() - begin
    assert len(features) == shards
    count_s = time.monotonic() - begin - open_s
    order = random.Random(seed).sample(names, shards)
    watched: list[tuple[int, int, float]] = []  # open files, mapped shards, MB
    for step, key in enumerate([*range(shards), *order]):
        image = features[key]
        assert image.id == (key if isinstance(key, str) else names[key])
        assert len(image.embeds) == 1
        if step % 10 == 9:
            watched.append(watch(path))
    files, mapped, memory = zip(*watched, strict=True)
    figures = {
        "shards": shards,
        "open_s": round(open_s, 2),
        "count_s": round(count_s, 2),
        "images_per_s": round(2 * shards / (time.monotonic() - begin - open_s - count_s)),
        "open_files_after_first": files[0],
        "open_files_most": max(files),
        "mapped_most": max(mapped),
        "grown_mb": round(max(memory) - memory[0], 1),
    }
    assert max(files) == files[0], figures
    assert max(mapped) <= SHARDS_OPEN + 1, figures  # the open shards, and one that is being opened
    assert figures["grown_mb"] <= 50, figures
    return figures


def watch(path: Path) -> tuple[int, int, float]:
    """Return this process's open files, mapped shards and resident MB."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split()[-1] for line in lines if line.endswith(".safetensors")}
    here = sum(1 for name in mapped if name.startswith(str(path)))
    return open_files(os.getpid()), here, sum(memory_mb(os.getpid()))
