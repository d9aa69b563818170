"""Provide trials of Parquet and object storage, for tests and soak runs."""

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from PIL import Image

from qwen_vit.common import storage
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.file import FeatureFile
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.inputs import remote
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Listing
from tests.support import export_stress, fake_encoder
from tests.support.export_stress import tiny_png
from tests.support.parquet_files import write_rows
from tests.support.process_memory import peak_mb
from tests.support.s3_server import BUCKET, s3_server

ROWS_PER_FILE = 10_000
WIDTH = 512  # the width of the features in `random_reads`


def parquet_folder(folder: Path, count: int) -> list[Path | str]:
    """Write Parquet files of images, every 97th broken. Returns the arguments that export them."""
    folder.mkdir()
    for start in range(0, count, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, count))
        images = [tiny_png(n)[: 60 if n % 97 == 0 else None] for n in numbers]
        structs = [{"bytes": data, "path": None} for data in images]
        write_rows(folder / f"{start:08}.parquet", structs, group=100)
    return [folder, "--column", "image"]


flat_memory_of_parquet = partial(export_stress.flat_memory, write=parquet_folder)


def random_reads(folder: Path, *, images: int, chosen: int, seed: int = 0) -> dict[str, Any]:
    """Read images of a remote export at random, while the server counts the sent bytes. Only the
    rows, the headers of the shards, the listing and export.json may be sent.
    """
    inputs, out = folder / "images", folder / "out"
    inputs.mkdir()
    values = np.random.default_rng(seed)
    for number in range(images):
        pixels = values.integers(0, 256, (112, 112, 3), np.uint8)
        Image.fromarray(pixels).save(inputs / f"{number:06}.bmp")
    with (
        mock.patch.object(fake_encoder, "WIDTH", WIDTH),
        mock.patch.object(fake_encoder.FakeEncoder.config, "out_hidden_size", WIDTH),
    ):
        encoder: Any = fake_encoder.FakeEncoder()
        export_features(encoder, [inputs], out, ExportOptions())
    with s3_server() as server:
        server.put_folder(out, "out")
        stored = load_features(f"s3://{BUCKET}/out")
        assert isinstance(stored, FeatureFolder)
        opened = server.sent
        names = random.Random(seed).sample(list(stored.listing), chosen)
        rows = sum(stored[name].embeds.nbytes for name in names)
        sent, requests = server.sent, len(server.requests)
    headers = opened + sum(map(header_bytes, sorted(out.glob("shard-*"))))
    figures = {
        "images": images,
        "chosen": chosen,
        "row_bytes": rows,
        "header_and_listing_bytes": headers,
        "sent_bytes": sent,
        "over_percent": round(100 * (sent - headers - rows) / rows, 3),
        "requests": requests,
        "export_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }
    assert sent <= headers + 1.01 * rows, figures
    return figures


def large_listing(folder: Path, *, objects: int, real: int) -> dict[str, Any]:
    """Freeze the listing of a prefix twice, from moto's answers and from fake answers.

    moto's answers show the time with parsing. The fake answers show the memory, because moto keeps
    its objects in this process.
    """
    address, out = f"s3://{BUCKET}/photos/", folder / "listing.jsonl"
    with s3_server():
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for number in range(real):
            backend.put_object(BUCKET, f"photos/{number:08}.jpg", b"")
        begin = time.process_time()
        assert Listing.save(out, find_items([address]), 512).n_images == real
        real_seconds = time.process_time() - begin  # includes moto's own time
    before = peak_mb(forget=True)
    begin, wall = time.process_time(), time.monotonic()
    with (
        mock.patch.object(storage, "_pages_of_s3", return_value=_fake_pages(objects)),
        mock.patch.object(storage, "is_s3", return_value=True),
        mock.patch.object(storage, "files_of", lambda address: (None, address[5:])),
        mock.patch.object(remote, "find_object", return_value=None),
    ):
        items = find_items([address])
        listing = Listing.save(out, items, 512)
    most = peak_mb()
    assert listing.n_images == objects
    figures = {
        "objects": objects,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "seconds": round(time.monotonic() - wall, 1),
        "grown_mb": round(most - before, 1),
        "listing_mb": round(out.stat().st_size / 1e6, 1),
        "objects_of_moto": real,
        "cpu_ms_per_page_with_moto": round(1e6 * real_seconds / real, 1),
    }
    assert figures["grown_mb"] <= 100 + 24e-6 * objects, figures
    return figures


def _fake_pages(objects: int) -> Iterator[dict[str, Any]]:
    for first in range(0, objects, 1_000):
        entries = [
            {"Key": f"photos/{number:08}.jpg", "Size": 10**6, "ETag": f'"{number:032x}"'}
            for number in range(first, min(first + 1_000, objects))
        ]
        yield {"Contents": entries, "IsTruncated": True}


def header_bytes(path: Path) -> int:
    """Return the number of bytes of a shard's header, grids and offsets."""
    file = FeatureFile(path)
    with open(path, "rb") as raw:
        length = 8 + int.from_bytes(raw.read(8), "little")
    return length + file.image_grid_thw.nbytes + 8 * (len(file) + 1)
