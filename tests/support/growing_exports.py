"""Provide a growing folder and its exports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from tests.support.fake_encoder import FakeEncoder

OPTIONS = ExportOptions(shard_size=4)
EXTEND, RETRY = replace(OPTIONS, extend=True), replace(OPTIONS, retry_failed=True)


def write(path: str, data: bytes) -> None:
    """Write a file that is newer than every earlier listing."""
    Path(path).write_bytes(data)


def export(options: ExportOptions = OPTIONS, out: str = "out", **more: Any) -> Any:
    encoder: Any = more.pop("encoder", None) or FakeEncoder()
    return export_features(encoder, more.pop("inputs", ["p"]), out, options, **more)


def content(out: str = "out") -> dict[str, Any]:
    """Return each image's rows, grid, size and notes, or its error, independent of the order of
    shards."""
    features = load_features(out)
    good = {
        each.id: (each.grid_thw, each.size_px, each.notes, each.embeds.numpy().tobytes())
        for each in features
    }
    assert list(good) == list(features.ids)
    assert len(good) == len(features)
    bad = {each.id: (each.code, each.stage, each.message) for each in features.errors}
    assert not good.keys() & bad.keys()
    return {**good, **bad}
