"""Test that an export rejects other versions until the user accepts them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.growing_exports import EXTEND, OPTIONS, export, write


class Newer(FakeEncoder):
    """Return the same encoder with another Pillow version."""

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "versions": {"torch": "2", "pillow": "13"}}


def test_other_versions_are_refused_until_they_are_accepted(growing_dir: Path) -> None:
    export()
    Path("out/shard-00000001.safetensors").unlink()
    with pytest.raises(ExportError, match=r"versions.pillow was .*, is 13 now") as caught:
        export(encoder=Newer())
    assert "pass accept_versions=True" in caught.value.remedy
    export(replace(OPTIONS, accept_versions=True), encoder=Newer())
    found = [
        load_features(f"out/shard-{number:08}.safetensors").metadata["versions"]["pillow"]
        for number in range(3)
    ]
    assert found[0] == found[2] != found[1] == "13"
    features = load_features("out")
    assert features.is_complete
    assert len(list(features)) == 8
    assert verify_features("out").problems == ()
    Path("out/shard-00000002.safetensors").unlink()
    export(encoder=Newer())  # both are accepted from now on
    export()


def test_other_settings_are_not_accepted_as_versions(growing_dir: Path) -> None:
    export()
    before = Path("out/export.json").read_bytes()
    with pytest.raises(ExportError, match="output was merged, is mean now"):
        export(replace(OPTIONS, accept_versions=True, output="mean"), encoder=Newer())
    assert Path("out/export.json").read_bytes() == before


def test_a_shard_of_versions_that_were_not_accepted_is_of_another_export(growing_dir: Path) -> None:
    export()
    other = Path("out/shard-00000001.safetensors")
    other.unlink()
    export(replace(OPTIONS, accept_versions=True), encoder=Newer())
    description = json.loads(Path("out/export.json").read_text())
    del description["accepted"]
    Path("out/export.json").write_text(json.dumps(description))
    with pytest.raises(ExportError, match="belongs to a different export"):
        list(load_features("out"))


def test_a_description_counts_the_shards_of_every_listing(growing_dir: Path) -> None:
    export()
    for number in range(10, 16):
        write(f"p/{number}.png", tiny_png(number))
    export(EXTEND)
    shards = sorted(Path("out").glob("*.safetensors"))
    facts = describe_features("out")
    assert (facts["shards"], facts["shards_missing"]) == (len(shards), 0) == (5, 0)
    assert facts["bytes"] == sum(path.stat().st_size for path in shards)
    assert facts["rows"] == verify_features("out").rows
    shards[-1].unlink()
    assert describe_features("out")["shards_missing"] == 1
