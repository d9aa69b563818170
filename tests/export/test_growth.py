"""Test that an export grows, repairs its failures, and equals a new export of the same images."""

import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_vit.cli.text import estimate_text
from qwen_vit.cli.verification import verify_stored
from qwen_vit.errors import ExportError
from qwen_vit.export import folder as folder_module
from qwen_vit.export.estimate import estimate_export
from qwen_vit.export.progress import Progress
from qwen_vit.feature_files.describe import describe_features
from qwen_vit.feature_files.read import FeatureFolder, load_features
from qwen_vit.feature_files.verify import verify_features
from qwen_vit.inputs.listing import Listing
from tests.support.export_stress import tiny_png
from tests.support.fake_encoder import FakeEncoder
from tests.support.growing_exports import EXTEND, OPTIONS, RETRY, content, export, write


def manifest(out: str = "out") -> dict[str, tuple[Any, ...]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    names = ("status", "tokens", "sha256", "rows_sha256", "error_code")
    rows = pq.read_table(f"{out}/manifest.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == len({row["index"] for row in rows}) == len(rows)
    return {row["id"]: tuple(row[name] for name in names) for row in rows}


def equals_a_fresh_export(done: Any) -> None:
    """The collection, the manifest and the report equal the results of a new export of the same
    images."""
    shutil.rmtree("fresh", ignore_errors=True)
    fresh = export(replace(OPTIONS, shard_size=100), "fresh")
    assert content() == content(str(fresh.folder))
    assert manifest() == manifest(str(fresh.folder))
    assert (done.images, done.exported, done.failed, done.rows) == (
        fresh.images, fresh.exported, fresh.failed, fresh.rows,
    )  # fmt: skip
    assert verify_features("out").problems == ()


def test_extend_is_suggested_only_if_it_works(growing_dir: Path) -> None:
    """--extend cannot add images that another setting would encode."""
    export()
    write("p/new.png", tiny_png(99))
    for options, works in ((OPTIONS, True), (replace(OPTIONS, shard_size=7), False)):
        with pytest.raises(ExportError) as caught:
            export(options)
        assert ("to add the new images, pass extend=True" in str(caught.value)) is works


def listings() -> list[str]:
    return sorted(name for name in os.listdir("out") if name.startswith("listing"))


@pytest.mark.parametrize("growths", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_growing_export_equals_a_new_export(growing_dir: Path, growths: int) -> None:
    """The folder gets new images, changed images, repaired images and images that remain broken."""
    rng = random.Random(0)
    number, broken = 10, {"3.png", "7.png"}
    equals_a_fresh_export(export())
    for step in range(growths):
        for _ in range(rng.randint(0, 6)):
            is_broken = rng.random() < 0.3
            write(f"p/{number}.png", tiny_png(number)[: 50 if is_broken else None])
            broken |= {f"{number}.png"} if is_broken else set()
            number += 1
        if step % 3 == 0:
            write(f"p/{rng.randrange(3)}.png", tiny_png(1_000 + step))  # a good image changes
        repaired = [name for name in sorted(broken) if rng.random() < 0.4]
        if step % 2:
            equals_a_fresh_export(export(EXTEND))
            for name in repaired:
                write(f"p/{name}", tiny_png(2_000 + step))
                broken.discard(name)
            equals_a_fresh_export(export(RETRY))
        else:
            equals_a_fresh_export(export(replace(EXTEND, retry_failed=True)))
    before = {name: Path("out", name).read_bytes() for name in os.listdir("out")}
    export()  # the command without --retry-failed then resumes
    assert {name: Path("out", name).read_bytes() for name in os.listdir("out")} == before


def test_old_shards_keep_their_bytes_and_only_new_images_are_encoded(growing_dir: Path) -> None:
    export()
    before = {path.name: path.read_bytes() for path in Path("out").glob("shard-*")}
    write("p/a.png", tiny_png(20))
    encoder = FakeEncoder()
    done = export(EXTEND, encoder=encoder)
    assert encoder.encoded == 1
    assert (done.images, done.exported, done.resumed) == (11, 9, 10)
    assert {name: Path("out", name).read_bytes() for name in before} == before
    assert listings() == ["listing-0001.jsonl", "listing.jsonl"]
    assert load_features("out")["a.png"].grid_thw == (1, 4, 4)


def test_retry_failed_encodes_only_failed_images(growing_dir: Path) -> None:
    export()
    write("p/3.png", tiny_png(3))
    encoder = FakeEncoder()
    done = export(RETRY, encoder=encoder)
    assert encoder.encoded == 1
    assert (done.images, done.exported, done.failed) == (10, 9, {"truncated": 1})
    assert done.failed_earlier == 0  # 7.png failed again
    [entry] = json.loads(Path("out/export.json").read_text())["more_listings"]
    assert (entry["kind"], entry["n_images"]) == ("retry", 2)
    with pytest.raises(KeyError, match=r"'7.png' has no features.*truncated"):
        load_features("out")["7.png"]
    assert "3.png" in load_features("out")
    assert load_features("out")[8].id == "3.png"


def test_extending_without_new_images_changes_nothing(growing_dir: Path) -> None:
    export(out="out")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    export(EXTEND)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_nul_in_a_list_is_a_failed_image_of_an_extension(growing_dir: Path) -> None:
    Path("l.jsonl").write_text('{"path": "p/0.png"}\n{"path": "nul\\u0000.png"}\n')
    for options in (OPTIONS, EXTEND):
        done = export(options, inputs=["l.jsonl"])
        assert (done.exported, done.failed) == (1, {"unreadable": 1})


def test_changed_inputs_are_named(growing_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    export()
    write("p/0.png", tiny_png(100))
    os.utime("p/1.png")  # a newer file with the same content
    Path("p/2.png").unlink()
    write("p/x.png", tiny_png(5))
    with pytest.raises(
        ExportError, match=r"1 missing, first 2.png; 1 new, first x.png.*extend=True"
    ):
        export()
    encoder = FakeEncoder()
    done = export(EXTEND, encoder=encoder)
    assert "1 image changed since the export, first 0.png: exported again" in caplog.text
    assert (
        "1 image not in these inputs, first 2.png: the export keeps its listed images"
        in caplog.text
    )
    assert encoder.encoded == 2
    assert (done.images, done.exported) == (11, 9)


def test_failed_images_in_newer_files_are_not_called_changed(
    growing_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    for number in (1, 3, 7):
        os.utime(f"p/{number}.png")
    export(EXTEND)
    assert (
        "2 images failed earlier, in files that are newer now, first 3.png: the export tries"
        in caplog.text
    )
    assert "changed since the export" not in caplog.text


def test_moved_images_are_an_error(growing_dir: Path) -> None:
    export()
    os.rename("p", "q")
    with pytest.raises(ExportError, match=r"10 in another place, first 0\.png.*move them back"):
        export(EXTEND, inputs=["q"])


def test_moved_images_are_an_error_when_a_resume_extends(growing_dir: Path) -> None:
    """An export without inputs once ignored them, and kept the features of the old files."""
    Path("list.jsonl").write_text('{"id": "cat", "path": "p/0.png"}')
    export(inputs=["list.jsonl"])
    Path("list.jsonl").write_text('{"id": "cat", "path": "p/1.png"}')
    with pytest.raises(ExportError, match="1 in another place, first cat"):
        export(EXTEND, inputs=None)


def test_a_tar_that_was_torn_is_listed_again(growing_dir: Path) -> None:
    """The new listing withdraws the listing failure, because a new export has no such failure."""
    write("p/t.tar", b"x" * 600)
    done = export()
    assert done.failed == {"truncated": 3}
    with tarfile.open("p/t.tar", "w") as tar:
        tar.add("p/0.png", "zero.png")
    equals_a_fresh_export(export(EXTEND))
    found = load_features("out")
    assert isinstance(found, FeatureFolder)
    assert "t.tar" not in found.listing


def killed_at(name: str) -> Callable[[Any, Any], None]:
    def count(self: Any, features: Any) -> None:
        if features.id == name:
            raise OSError("as a kill")

    return count


def test_a_killed_extension_resumes_with_the_plain_command(
    growing_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    for number in range(10, 20):
        write(f"p/{number}.png", tiny_png(number))
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", killed_at("15.png"))
        with pytest.raises(OSError, match="as a kill"):
            export(EXTEND)
    assert not load_features("out").is_complete
    equals_a_fresh_export(export())


@pytest.mark.parametrize("at", ["listing", "description"])
def test_a_kill_while_a_listing_is_appended_loses_nothing(
    growing_dir: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    before = content()
    write("p/x.png", tiny_png(30))

    def die(*_: Any, **__: Any) -> Any:
        raise RuntimeError("as a kill")

    with monkeypatch.context() as patch:
        if at == "listing":
            patch.setattr(Listing, "save", die)
            patch.setattr("qwen_vit.export.plan.list_inputs", lambda *_: frozen())
        else:
            patch.setattr(folder_module, "atomic_file", die)
        with pytest.raises(RuntimeError):
            export(EXTEND)
    assert content() == before
    equals_a_fresh_export(export(EXTEND))


def frozen() -> Any:
    """Make the listing of p before the test patches `save`."""
    from qwen_vit.inputs.find import find_items
    from qwen_vit.inputs.listing import Listing

    path = Path("frozen.tmp")
    lines = "".join(item.to_json() + "\n" for item in find_items(["p"]))
    path.write_text(lines)
    return Listing.open(path, 4)


def test_an_unfinished_retry_ends_before_the_next_retry(
    growing_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "count", killed_at("7.png"))
        with pytest.raises(OSError, match="as a kill"):
            export(RETRY)
    export(RETRY)
    assert (
        "an earlier run with retry_failed is unfinished: this run finishes its retries"
        in caplog.text
    )
    assert listings() == ["listing-0001.jsonl", "listing.jsonl"]


def test_parts_extend_together(growing_dir: Path) -> None:
    for number in (1, 2):
        export(replace(OPTIONS, part=(number, 2)))
    for number in range(10, 30):
        write(f"p/{number}.png", tiny_png(number))
    write("p/3.png", tiny_png(3))
    for number in (1, 2):
        options = replace(EXTEND, part=(number, 2), retry_failed=True)
        export(options)
    assert listings() == ["listing-0001.jsonl", "listing-0002.jsonl", "listing.jsonl"]
    assert load_features("out").is_complete
    export(out="fresh")
    assert content() == content("fresh")
    assert manifest() == manifest("fresh")


def test_an_encoder_cache_has_the_added_images(growing_dir: Path) -> None:
    export(ec_cache="cache")
    before = {path.name for path in Path("cache").rglob("*.safetensors")}
    write("p/x.png", tiny_png(40))
    write("p/3.png", tiny_png(3))
    export(replace(EXTEND, retry_failed=True), ec_cache="cache")
    export(out="fresh", ec_cache="fresh-cache")
    after = {path.relative_to("cache") for path in Path("cache").rglob("*.safetensors")}
    fresh = {p.relative_to("fresh-cache") for p in Path("fresh-cache").rglob("*.safetensors")}
    assert len(after) > len(before)
    assert after == fresh


def test_a_dry_run_counts_new_images_and_writes_nothing(growing_dir: Path) -> None:
    export()
    write("p/x.png", tiny_png(41))
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    found = estimate_export(FakeEncoder(), ["p"], EXTEND, folder="out")
    assert (found.done, found.failed, found.to_do) == (8, 2, 1)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_dry_run_names_missing_and_failed_images(growing_dir: Path) -> None:
    """Images with missing files once counted as "unreadable", although the export keeps their
    features."""
    export()
    for name in ("0", "1"):
        Path(f"p/{name}.png").unlink()
    write("p/x.png", tiny_png(41))
    write("p/2.png", tiny_png(42))  # changed: its old features are superseded
    found = estimate_export(FakeEncoder(), ["p"], EXTEND, folder="out")
    counts = (found.images, found.done, found.to_do, found.failed)
    assert counts == (11, 7, 2, 2)
    assert (found.missing, found.unreadable) == (0, 0)
    done = export(EXTEND)
    assert (done.images, done.rows) == (found.images, found.rows)
    text = estimate_text(found, Path("out"))
    assert text.startswith("images       7 done, 2 to do, 2 failed earlier\n")
    again = estimate_export(FakeEncoder(), ["p"], EXTEND, folder="out")
    assert (again.images, again.done, again.to_do, again.rows) == (11, 9, 0, found.rows)
    assert again.bytes == sum(path.stat().st_size for path in Path("out").glob("shard-*"))
    Path("list.txt").write_text("p/3.png\np/4.png\np/none.png\n")
    Path("p/3.png").write_bytes(b"no image")
    fresh = estimate_export(FakeEncoder(), ["list.txt"], OPTIONS)
    assert (fresh.to_do, fresh.missing, fresh.unreadable) == (3, 1, 1)
    text = estimate_text(fresh, Path("out"))
    assert text.startswith("images       3 to do (1 missing, 1 that cannot be encoded)\n")


def test_a_changed_image_is_found_without_new_images_and_after_a_resume(growing_dir: Path) -> None:
    """The listing once had the time of the last run, so the export never read earlier changes."""
    export()
    write("p/2.png", tiny_png(42))
    export()  # all images are exported
    equals_a_fresh_export(export(EXTEND))
    write("p/1.png", tiny_png(43))
    Path("out/listing.jsonl").write_bytes(b"damaged")
    equals_a_fresh_export(export(EXTEND))


def test_verify_and_info_name_superseded_images(
    growing_dir: Path,
) -> None:
    """Images that the export encoded again once counted twice."""
    export()
    write("p/2.png", tiny_png(42))
    write("p/3.png", tiny_png(43))
    export(replace(EXTEND, retry_failed=True))
    found, facts = verify_features("out"), describe_features("out")
    assert (found.images, found.superseded, found.problems) == (9, 1, ())
    assert found.digests == found.images == facts["images_done"] == len(load_features("out"))
    assert found.rows == facts["rows"] == sum(len(each.embeds) for each in load_features("out"))
    assert verify_stored("out").text().endswith("; also read 1 superseded image")
