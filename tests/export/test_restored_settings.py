"""Test that an export restores a missing or damaged `export.json` from its shards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from qwen_vit.errors import ExportError
from qwen_vit.export.run import export_features
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.schema import METADATA_KEY
from qwen_vit.feature_files.verify import verify_features
from qwen_vit.feature_files.write import write_features
from tests.support.export_stress import tiny_png
from tests.support.exports import NeverAsked, files
from tests.support.fake_encoder import FakeEncoder
from tests.support.features import random_features
from tests.support.growing_exports import EXTEND, OPTIONS, RETRY, content, export, write

SETTINGS = Path("out/export.json")


@pytest.mark.parametrize("damage", ["cut", "no size", "bad listings", "missing"])
def test_the_same_inputs_and_options_restore_the_settings(
    growing_dir: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
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
    assert caplog.text.count("out/export.json: restored from the shards") == 1


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
    shard = Path("out/shard-00000000.safetensors")
    write_features(shard, [random_features("a", (1, 4, 6))], {}, overwrite=True)
    before = files()
    with pytest.raises(ExportError):
        export()
    assert files() == before


def test_settings_are_restored_although_images_are_missing(growing_dir: Path) -> None:
    export()
    before = content()
    SETTINGS.unlink()
    Path("p/0.png").unlink()
    with pytest.raises(
        ExportError, match=r"to restore export\.json and keep the features of the mis"
    ):
        export()
    done = export(EXTEND)
    assert (done.exported, content()) == (8, before)
    assert export(inputs=None).exported == 8


# Later listings


def test_every_retry_of_the_same_images_is_restored(growing_dir: Path) -> None:
    export()
    for _ in range(2):
        export(RETRY)
    for number in (3, 7):
        write(f"p/{number}.png", tiny_png(number))
    export(RETRY)  # the listing of each retry has the same bytes
    before, settings = content(), json.loads(SETTINGS.read_text())
    assert len({each["listing_sha256"] for each in settings["more_listings"]}) == 1
    SETTINGS.unlink()
    assert not export(encoder=NeverAsked()).failed
    assert content() == before
    assert len(json.loads(SETTINGS.read_text())["more_listings"]) == 3
    write("p/new.png", tiny_png(50))
    assert export(EXTEND).images == 11


@pytest.mark.parametrize("lost", [[0, 1, 2], [3], [0, 1, 2, 3]])
def test_listings_without_an_intact_shard_are_restored(growing_dir: Path, lost: list[int]) -> None:
    export()
    for number in range(2):
        write(f"p/x{number}.png", tiny_png(40 + number))
        export(EXTEND)
    before = content()
    for number in lost:
        Path(f"out/shard-{number:08}.safetensors").unlink()
    SETTINGS.unlink()
    export()
    assert content() == before
    assert len(json.loads(SETTINGS.read_text())["more_listings"]) == 2


def test_a_listing_that_only_withdraws_an_image_is_restored(growing_dir: Path) -> None:
    export()
    write("p/bad.tar", b"no tar" * 100)
    export(EXTEND)
    Path("p/bad.tar").unlink()
    export(EXTEND)
    write("p/x.png", tiny_png(40))
    export(EXTEND)
    before, settings = content(), json.loads(SETTINGS.read_text())
    assert settings["more_listings"][1]["n_images"] == 0
    SETTINGS.unlink()
    with pytest.raises(
        ExportError, match=r"1 missing, first bad\.tar.*to restore.* and withdraw.* pass extend=Tr"
    ):
        export()
    export(EXTEND, encoder=NeverAsked())
    assert content() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
def test_a_damaged_listing_is_restored_with_the_settings(growing_dir: Path, damage: str) -> None:
    export()
    before, listing = files(), Path("out/listing.jsonl")
    lines = listing.read_bytes().splitlines(keepends=True)
    listing.write_bytes(b"".join(lines[:4] if damage == "cut" else []))
    if damage == "missing":
        listing.unlink()
    SETTINGS.unlink()
    export(encoder=NeverAsked())
    assert files() == before


def test_listings_that_contradict_the_shards_are_refused(growing_dir: Path) -> None:
    export()
    write("p/x.png", tiny_png(40))
    export(EXTEND)
    Path("out/listing.jsonl").unlink()
    for number in range(3):
        Path(f"out/shard-{number:08}.safetensors").unlink()
    SETTINGS.unlink()
    before = files()
    with pytest.raises(ExportError, match="Pass another folder"):
        export(inputs=["p/x.png"])  # the listing of the extension
    assert files() == before


# Shards of others


@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_with_another_image_policy_is_refused(growing_dir: Path, number: int) -> None:
    export(replace(OPTIONS, exif="ignore"))
    name = f"shard-{number:08}.safetensors"
    other = Path("out", name).read_bytes()
    shutil.rmtree("out")
    export()
    Path("out", name).write_bytes(other)
    SETTINGS.unlink()
    for exif in ("apply", "ignore"):
        with pytest.raises(ExportError, match="different export"):
            export(replace(OPTIONS, exif=exif))


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_size": 0}, {"n_images": -1}, {"listing_sha256": None}, {"image_policy": 5},
        {"versions": None}, {"accepted": 5}, {"accepted": [5]}, {"inputs": 5}, {"more_listings": 5},
    ],
)  # fmt: skip
def test_values_of_another_type_in_a_shard_are_ignored_or_refused(
    growing_dir: Path, changes: dict[str, Any]
) -> None:
    export()
    before = SETTINGS.read_bytes()
    path = Path("out/shard-00000000.safetensors")
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY]) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {METADATA_KEY: json.dumps(metadata)})
    SETTINGS.unlink()
    if changes.keys() <= {"accepted", "inputs", "more_listings"}:  # of export.json alone
        export(encoder=NeverAsked())
    else:
        with pytest.raises(ExportError, match="it belongs to a different export"):
            export(encoder=NeverAsked())
    assert SETTINGS.read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"accepted": 5}, {"accepted": [5]}, {"inputs": []}, {"inputs": {"paths": 5}},
        {"inputs": {"paths": [5]}}, {"image_policy": 5}, {"versions": [5]},
        {"more_listings": [{"n_images": 0, "listing_sha256": "", "withdrawn": [[]]}]},
    ],
)  # fmt: skip
def test_values_of_another_type_in_the_settings_are_damage(
    growing_dir: Path, changes: dict[str, Any]
) -> None:
    export()
    before = files()
    SETTINGS.write_text(json.dumps(json.loads(SETTINGS.read_text()) | changes))
    for read in (load_features, lambda out: export_features(FakeEncoder(), None, out, OPTIONS)):
        with pytest.raises(ExportError, match=r"export\.json: its .* which restores export\.json"):
            read("out")
    export(encoder=NeverAsked())
    assert files() == before


# Recorded inputs


def test_resuming_a_declined_export_keeps_its_recorded_inputs(growing_dir: Path) -> None:
    def decline(_: Any) -> None:
        raise ExportError("declined")

    with pytest.raises(ExportError, match="declined"):
        export(confirm=decline)
    before = SETTINGS.read_bytes()
    export_features(FakeEncoder(), None, "out", OPTIONS)
    assert SETTINGS.read_bytes() == before
    assert json.loads(before)["inputs"]["paths"] == ["p"]


@pytest.mark.parametrize("extend", [False, True])
def test_resuming_without_shards_keeps_the_listing(
    growing_dir: Path, caplog: pytest.LogCaptureFixture, extend: bool
) -> None:
    """A missing image fails, and does not leave the listing."""
    export()
    before = content()
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    Path("p/0.png").unlink()
    done = export(replace(OPTIONS, extend=extend), inputs=None)
    assert (done.images, done.failed["missing"]) == (10, 1)
    assert {name for name, each in content().items() if before[name] != each} == {"0.png"}
    words = "1 image not in these inputs, first 0.png" if extend else "1 missing, first 0.png"
    assert words in caplog.text


def test_a_new_export_in_place_of_lost_shards_names_the_missing_images(
    growing_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    export()
    assert "no shard exists" not in caplog.text
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    Path("p/0.png").unlink()
    assert export().images == 9
    assert "starts a new export. Its inputs changed: 1 missing, first 0.png" in caplog.text
