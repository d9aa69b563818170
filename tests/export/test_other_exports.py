"""Test that an export rejects a folder with another export, and names the difference."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_vit.errors import ExportError
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.options import ExportOptions
from qwen_vit.feature_files.read import load_features
from qwen_vit.feature_files.write import write_features
from qwen_vit.features import ImageFeatures
from qwen_vit.inputs.find import find_items
from tests.support.export_stress import tiny_png
from tests.support.exports import SMALL, export, files, plan_of, shards
from tests.support.fake_encoder import WIDTH, FakeEncoder

# Resuming


def test_a_shard_of_another_export_is_not_overwritten(export_dir: Path) -> None:
    export()
    path = Path("out/shard-00000001.safetensors")
    foreign = write_features(
        "f", [ImageFeatures("a", torch.ones(1, WIDTH), (1, 2, 2))], {}
    ).read_bytes()
    path.write_bytes(foreign)
    with pytest.raises(
        ExportError, match=r"shard-00000001.*: it belongs to a different export.*Move the file away"
    ):
        export()
    assert path.read_bytes() == foreign
    export(out="others", options=replace(SMALL, output="mean"))
    for other in ("out/shard-00000000.safetensors", "others/shard-00000001.safetensors"):
        path.write_bytes(Path(other).read_bytes())
        with pytest.raises(ExportError, match="it belongs to a different export"):
            export()


DIFFERENT: dict[str, tuple[Any, ExportOptions, str]] = {
    "model": (FakeEncoder(), SMALL, "weights_sha256 was 0000"),
    "quantization": (FakeEncoder(), SMALL, "quantization was None, is fp8 now"),
    "policy": (FakeEncoder(max_pixels=50176), SMALL, "image_policy.max_pixels was "),
    "output": (FakeEncoder(), replace(SMALL, output="mean"), "output was merged, is mean now"),
    "dtype": (
        FakeEncoder(),
        replace(SMALL, dtype="bfloat16"),
        "dtype was float32, is bfloat16 now",
    ),
    "shard size": (FakeEncoder(), replace(SMALL, shard_size=5), "shard_size was 4, is 5 now"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_changed_settings_are_refused_with_the_difference(export_dir: Path, what: str) -> None:
    export()
    before = files()
    encoder, options, words = DIFFERENT[what]
    changed = {"model": {"weights_sha256": "2" * 64}, "quantization": {"quantization": "fp8"}}
    metadata = encoder.metadata() | changed.get(what, {})
    encoder.metadata = lambda: metadata
    with pytest.raises(ExportError, match="out: the folder contains a different export") as caught:
        export(encoder=encoder, options=options)
    assert caught.value.name == "out"
    assert words in caught.value.fact
    assert caught.value.remedy == (
        "To continue this export, pass its original inputs and settings; to start a new export, "
        "pass another folder."
    )
    assert files() == before


def test_different_images_are_refused_and_counted(export_dir: Path) -> None:
    export()
    before = files()
    Path("p/0.png").unlink()
    Path("p/y.png").write_bytes(b"")
    Path("p/z.png").write_bytes(b"")
    with pytest.raises(ExportError, match=r"its images: 1 missing, first 0.png; 2 new, first y.p"):
        export()
    os.rename("p", "q")
    Path("q/0.png").write_bytes(b"")
    for name in ("y", "z"):
        Path(f"q/{name}.png").unlink()
    with pytest.raises(ExportError, match=r"its images: 11 in another place, first 0.png") as error:
        export("q")
    assert f"(it was in {export_dir / 'p/0.png'}, and is in " in str(error.value)
    assert "as input, pass" not in str(error.value)  # the paths of the listing no longer exist
    names = sorted(os.listdir("q"), reverse=True)
    Path("l.jsonl").write_text("\n".join(json.dumps({"id": n, "path": f"p/{n}"}) for n in names))
    with pytest.raises(ExportError, match="its images: in another order"):
        export("l.jsonl")
    assert files() == before


def test_another_name_for_the_same_weights_is_the_same_export(export_dir: Path) -> None:
    export(out="whole")
    export()
    Path("out/shard-00000001.safetensors").unlink()
    encoder = FakeEncoder()
    metadata = {**encoder.metadata(), "model": "/elsewhere/model", "commit": "f" * 40}
    encoder.metadata = lambda: metadata  # type: ignore[method-assign]
    export(encoder=encoder)
    assert files() == files("whole")


def test_a_folder_with_other_files_is_refused_and_unchanged(export_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    for given, words in (
        ("out", r"out: the folder contains notes.txt \(1 in all\) and no export.json"),
        ("p/x.png", r"p/x.png: not a folder\. Pass another folder"),
        ("dangling", r"dangling: not a folder\. Pass another folder"),
        ("no/out", r"no: does not exist\. Create the folder first"),
        ("n" * 300 + "/out", "File name too long|does not exist"),
        ("caf\udce9", r"caf\\udce9': not UTF-8\. Expected a path that safetensors can open"),
    ):
        with pytest.raises(ExportError, match=words):
            export(out=given)
    assert files() == {"notes.txt": b"mine"}


@pytest.mark.parametrize("line", ["[]", '{"id": ["x"]}', '{"id": "x", "error": 5}', "{", None])
def test_a_damaged_listing_is_reported(export_dir: Path, line: str | None) -> None:
    export()
    listing = Path("out/listing.jsonl")
    lines = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join([f"{line}\n", *lines[1:]]))
    if line is None:
        listing.unlink()
    Path("p/more.png").write_bytes(tiny_png(3))
    with pytest.raises(
        ExportError, match=r"cannot compare images: listing.jsonl is missing or corrupt"
    ):
        export()


def reword_listing_errors(patch: pytest.MonkeyPatch, code: str | None = None) -> None:
    """List like another version of the package, with other error messages."""

    def items(*arguments: Any, **named: Any) -> Any:
        for item in find_items(*arguments, **named):
            words = item.error and (code or item.error[0], f"{item.id} was worded differently")
            yield replace(item, error=words)

    patch.setattr("qwen_vit.export.list_inputs.find_items", items)


def list_as_before(folder: Path) -> None:
    """Give an export's listing the messages of an older version, as if that version had begun the
    export."""
    lines = [json.loads(line) for line in (folder / "listing.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if "error" in line] == ["torn.tar"]
    for line in lines:
        if "error" in line:
            line["error"][1] = "torn.tar was worded differently"
    listing = "".join(json.dumps(line) + "\n" for line in lines).encode()
    settings = json.loads((folder / "export.json").read_text())
    settings["listing_sha256"] = hashlib.sha256(listing).hexdigest()
    (folder / "listing.jsonl").write_bytes(listing)
    (folder / "export.json").write_text(json.dumps(settings, sort_keys=True, indent=1) + "\n")


def test_a_listing_that_differs_only_in_messages_is_resumed(
    export_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error messages differ between versions, and the listing's hash is part of every shard."""
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with monkeypatch.context() as older:
        reword_listing_errors(older)
        export()
    before = files()
    for name in ("shard-00000000.safetensors", "shard-00000002.safetensors"):
        Path("out", name).unlink()  # rows of good images, and of the damaged tar
    assert estimate_export(FakeEncoder(), ["p"], SMALL, folder="out").images == 12
    for part in ((1, 2), (1, 1)):
        done = export(options=replace(SMALL, part=part))
        assert files() == before
    assert (done.resumed, done.failed) == (12, {"truncated": 2})
    messages = {error.id: error.message for error in load_features("out").errors}
    assert messages["torn.tar"] == "torn.tar was worded differently"
    [line] = [line for line in before["listing.jsonl"].splitlines() if b"torn.tar" in line]
    assert b"worded differently" in line


def test_an_edited_listing_is_kept_only_if_the_export_began_with_it(export_dir: Path) -> None:
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with plan_of(options=replace(SMALL, part=(1, 2))):  # stop before any shard
        pass
    new = files()
    list_as_before(export_dir / "out")
    with plan_of(options=replace(SMALL, part=(1, 2))) as plan:
        assert plan.listing.shard(2)[-2].error == ("truncated", "torn.tar was worded differently")
        assert plan.settings["listing_sha256"] == plan.listing.all[0].sha256
    assert b"worded differently" in files()["listing.jsonl"]
    Path("out/export.json").write_bytes(new["export.json"])  # the hash of the original listing
    with plan_of(options=replace(SMALL, part=(1, 2))):
        assert files()["listing.jsonl"] == new["listing.jsonl"]


@pytest.mark.parametrize("change", ["code", "order", "more"])
def test_a_listing_that_differs_in_more_than_messages_is_refused(
    export_dir: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p/torn.tar").write_bytes(b"x" * 600)
    with monkeypatch.context() as older:
        reword_listing_errors(older, code="damaged" if change == "code" else None)
        export()
    before = files()
    inputs, difference = ["p"], "1 in another place, first torn.tar"
    if change == "more":
        Path("p/y.png").write_bytes(b"")
        difference = "its images: 1 new, first y.png. To"  # the error does not mention the messages
    elif change == "order":
        lines = Path("out/listing.jsonl").read_text().splitlines()
        Path("l.jsonl").write_text("\n".join(reversed(lines)).replace("worded", "said"))
        inputs, difference = ["l.jsonl"], "its images: in another order"
    with pytest.raises(ExportError, match=difference):
        export(*inputs)
    assert files() == before


def test_settings_may_change_before_the_first_shard(export_dir: Path) -> None:
    """After the warning about a large export, a user may pass fewer images or another output."""

    def too_large(estimate: Any) -> None:
        raise ExportError("too large")

    for count in (1, 2):
        with pytest.raises(ExportError, match="too large"):
            export(options=replace(SMALL, part=(1, count)), confirm=too_large)
        assert shards() == {}
    # other parts may be running
    with pytest.raises(
        ExportError, match=r"output was merged, is mean now.*delete out/export.json"
    ):
        export(options=replace(SMALL, output="mean", part=(1, 2)))
    assert export("p/0.png", options=replace(SMALL, output="mean")).rows == 1
    assert load_features("out").ids == ["p/0.png"]
    with pytest.raises(ExportError, match="output was mean, is merged now"):
        export("p/0.png")


def test_a_foreign_file_with_a_name_of_ours_remains(export_dir: Path) -> None:
    Path("out").mkdir()
    Path("out/export.json").write_text('{"theme": "dark"}')
    with pytest.raises(ExportError, match=r"export.json: n_images is None.* Pass another folder"):
        export()
    assert files() == {"export.json": b'{"theme": "dark"}'}


# The command


def test_only_the_users_changes_are_named(export_dir: Path) -> None:
    """The hash of the configs changes with the configs, and gives no information to a user."""
    export()
    encoder = FakeEncoder()
    metadata = encoder.metadata()
    policy = {**metadata["image_policy"], "max_pixels": 5_000}
    changed = {**metadata, "config_sha256": "f" * 64, "image_policy": policy}
    encoder.metadata = lambda: changed  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=r"max_pixels was .* is 5000 now") as caught:
        export(encoder=encoder)
    assert "config_sha256" not in str(caught.value)
