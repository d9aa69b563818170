"""Test that an export restores a missing or damaged `export.json` from its shards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.feature_files.verify import verify_features
from qwen_vit.feature_files.write import write_features
from tests.support.export_stress import tiny_png
from tests.support.exports import NeverAsked, files
from tests.support.fake_encoder import FakeEncoder
from tests.support.features import random_features
from tests.support.growing_exports import EXTEND, OPTIONS, content, export, write

SETTINGS = Path("out/export.json")


@pytest.mark.parametrize("damage", ["cut", "no size", "bad listings", "missing"])
def test_the_same_inputs_and_options_restore_the_settings(growing_dir: Path, damage: str) -> None:
    export()
    before = files()
    text = SETTINGS.read_text()
    if damage == "missing":
        SETTINGS.unlink()
    else:
        more = {"no size": {"shard_size": None}, "bad listings": {"more_listings": 5}}
        damaged = json.dumps(json.loads(text) | more.get(damage, {}))
        SETTINGS.write_text(text[:9] if damage == "cut" else damaged)
    done = export(encoder=NeverAsked())
    assert (done.exported, done.resumed) == (8, 10)
    assert files() == before


def test_the_shards_and_not_the_options_give_the_settings(growing_dir: Path) -> None:
    export()
    SETTINGS.write_text("{")
    before = files()
    with pytest.raises(ExportError, match="output was merged, is mean now"):
        export(replace(OPTIONS, output="mean"))
    Path("p/new.png").write_bytes(tiny_png(50))
    words = r"images: 1 new, first new.png. To continue this export, pass its original inputs and s"
    with pytest.raises(ExportError, match=words) as caught:
        export()
    assert "inputs of None" not in str(caught.value)  # needs export.json
    assert files() == before


def test_a_damaged_shard_is_written_again(growing_dir: Path) -> None:
    export()
    before = files()
    SETTINGS.unlink()
    Path("out/shard-00000000.safetensors").write_bytes(b"")
    export()
    assert files() == before


def test_extensions_and_accepted_versions_are_restored(growing_dir: Path) -> None:
    class Newer(FakeEncoder):
        def metadata(self) -> dict[str, Any]:
            return {**super().metadata(), "gpu": "newer"}

    export()
    for number in range(2):
        write(f"p/x{number}.png", tiny_png(40 + number))
        export(replace(EXTEND, accept_versions=True), encoder=Newer())
    before, settings = content(), json.loads(SETTINGS.read_text())
    assert len(settings["more_listings"]) == 2
    SETTINGS.write_text("{")
    export(encoder=NeverAsked())
    assert content() == before
    assert json.loads(SETTINGS.read_text()) == settings
    assert verify_features("out").problems == ()


def test_files_of_others_with_a_shards_name_are_kept(growing_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/shard-00000000.safetensors").write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"out: a folder of shards without.*Pass another folder"):
        export()
    assert files() == {"shard-00000000.safetensors": b"mine"}
    write_features("out/shard-00000000.safetensors", [random_features("a", (1, 4, 6))], {})
    before = files()
    with pytest.raises(ExportError):
        export()
    assert files() == before
