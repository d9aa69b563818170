"""Test that an export rejects other versions until the user accepts them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from qwen_vit.errors import ExportError
from qwen_vit.export.segments import count_kept
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.verify import verify_features
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.growing_exports import EXTEND, OPTIONS, export, write
from tests.support.interrupted_exports import Stop


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
    export(encoder=Newer())  # later runs accept both versions
    export()


def test_other_settings_are_not_accepted_as_versions(growing_dir: Path) -> None:
    export()
    before = Path("out/export.json").read_bytes()
    with pytest.raises(ExportError, match="output was merged, is mean now"):
        export(replace(OPTIONS, accept_versions=True, output="mean"), encoder=Newer())
    assert Path("out/export.json").read_bytes() == before


def test_a_shard_of_versions_that_were_not_accepted_belongs_to_another_export(
    growing_dir: Path,
) -> None:
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


class Has(FakeEncoder):
    """Return the same encoder with other versions."""

    def __init__(self, **versions: str | None) -> None:
        super().__init__()
        self._versions = {name.replace("_", "-"): each for name, each in versions.items()}

    def metadata(self) -> dict[str, Any]:
        return {**super().metadata(), "versions": {"torch": "2", **self._versions}}


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        ({"pillow_heif": "not installed"}, {"pillow_heif": "1.8.1"}, "pillow-heif"),
        ({"libwebp": None}, {"libwebp": "1.6.0"}, "libwebp"),
    ],
)
def test_a_decoder_installed_later_does_not_stop_an_export(
    growing_dir: Path, before: dict[str, Any], now: dict[str, Any], name: str
) -> None:
    """An install of pillow-heif once stopped an export without HEIC images."""
    export(encoder=Has(**before))
    Path("out/shard-00000001.safetensors").unlink()
    export(encoder=Has(**now))
    found = [
        load_features(f"out/shard-{number:08}.safetensors").metadata["versions"][name]
        for number in range(3)
    ]
    [old], [new] = before.values(), now.values()
    assert found == [old, new, old]
    assert verify_features("out").problems == ()
    export(encoder=Has(**now))
    for other in ({next(iter(now)): "2"}, {**now, "torch": "3"}, {**now, "new": "1"}):
        with pytest.raises(ExportError, match="contains a different export"):
            export(encoder=Has(**other))


def test_videos_are_read_after_pyav_was_installed(
    growing_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, as_video=True)
    monkeypatch.setattr("qwen_vit.export.settings.decoder_name", lambda: None)
    export(options)
    Path("out/shard-00000001.safetensors").unlink()
    monkeypatch.setattr("qwen_vit.export.settings.decoder_name", lambda: "PyAV 17.1.0")
    export(options)
    policies = [
        load_features(path).metadata["image_policy"] for path in sorted(Path("out").glob("shard-*"))
    ]
    assert [each["video"]["decoder"] for each in policies] == [None, "PyAV 17.1.0", None]
    assert verify_features("out").problems == ()
    export(options)
    monkeypatch.setattr("qwen_vit.export.settings.decoder_name", lambda: "PyAV 18.0.0")
    for each in (options, replace(options, accept_versions=True)):
        with pytest.raises(ExportError, match=r"decoder was .*, is PyAV 18.0.0 now"):
            export(each)


def test_a_decoder_that_was_removed_is_refused(growing_dir: Path) -> None:
    export(encoder=Has(pillow_heif="1.8.1"))
    Path("out/shard-00000001.safetensors").unlink()
    with pytest.raises(ExportError, match=r"pillow-heif was 1.8.1, is not installed now"):
        export(encoder=Has(pillow_heif="not installed"))


def test_saved_images_stay_after_a_decoder_was_installed(
    growing_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.fake_encoder.BATCH", 2)
    options, stop = replace(OPTIONS, shard_size=10), cast(Any, Stop(9))
    with pytest.raises(KeyboardInterrupt):
        export(options, encoder=Has(libwebp=None), stop=stop)
    encoder, kept = Has(libwebp="1.6.0"), count_kept(Path("out"))
    assert kept > 0
    assert export(options, encoder=encoder).exported == kept + encoder.encoded
    metadata = load_features("out/shard-00000000.safetensors").metadata
    assert metadata["versions"]["libwebp"] == "1.6.0"
