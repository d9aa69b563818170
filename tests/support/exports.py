"""Make small exports with the fake encoder, and read their files."""

from pathlib import Path
from typing import Any

from qwen_vit.export.manifest import ManifestRow
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.plan import ExportPlan, open_export
from qwen_vit.export.result import ExportReport
from qwen_vit.export.run import export_features
from qwen_vit.export.shards import export_shards
from tests.support.fake_encoder import FakeEncoder

SMALL = ExportOptions(shard_size=4)


def export(
    *inputs: str, out: str = "out", encoder: Any = None, options: ExportOptions = SMALL, **more: Any
) -> ExportReport:
    encoder = encoder or FakeEncoder()
    return export_features(encoder, inputs or ("p",), out, options, **more)


def plan_of(out: str = "out", encoder: Any = None, options: ExportOptions = SMALL) -> Any:
    return open_export(encoder or FakeEncoder(), ["p"], Path(out), options)


def files(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards(folder: str = "out") -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith("safetensors")}


def parts(data: bytes) -> tuple[bytes, bytes]:
    """Return a safetensors file's header and tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return data[8:start], data[start:]


class NeverAsked(FakeEncoder):
    def encode_iter(self, images: Any, **options: Any) -> Any:
        raise AssertionError("an image was encoded again")


def make_shard(encoder: Any, plan: ExportPlan, shard: int) -> list[ManifestRow]:
    [done] = export_shards(encoder, plan, [shard])
    return done.rows
