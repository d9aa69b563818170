"""Make small exports into a bucket, and read the written files."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from tests.support.fake_encoder import FakeEncoder
from tests.support.s3_server import BUCKET, Request

OUT = f"s3://{BUCKET}/out"


def on_host(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Continue as on another machine, which has a separate scratch folder."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def export(out: str = OUT, *, encoder: Any = None, inputs: Any = ("p",), **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("stop",) if name in options}
    options = {"shard_size": 3, **options}
    return export_features(
        encoder or FakeEncoder(), inputs and list(inputs), out, ExportOptions(**options), **more
    )


def local(folder: str = "local") -> dict[str, bytes]:
    if not Path(folder).exists():
        export(folder)
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def scratch() -> list[str]:
    """Return the files that remain on this machine."""
    return [path.name for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file()]


def is_put(request: Request) -> bool:
    return request.method == "PUT" and "shard-" in request.path
