"""Test that an export never stores another image's features under an id, although a tar or a
Parquet file was written again in another order."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vit.errors import ImageError
from qwen_vit.export.options import ExportOptions
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.parquet import ParquetColumns
from qwen_vit.video.items import open_video_item
from qwen_vit.video.options import VideoLimits
from tests.support.export_stress import tiny_png
from tests.support.growing_exports import content, export
from tests.support.inputs import write_tar
from tests.support.parquet_files import structs, write_rows

SHARDS = ExportOptions(shard_size=4)
ROWS = replace(SHARDS, column="image", id_column="key")
NUMBERS = range(6)
SOURCES = {"tar": ("a.tar", SHARDS), "parquet": ("a.parquet", ROWS)}
LAST_SHARD = Path("out/shard-00000001.safetensors")


def write_source(name: str, numbers: Sequence[int], **names: str) -> None:
    if name.endswith(".tar"):
        write_tar(name, {f"{number}.png": tiny_png(number) for number in numbers})
    else:
        keys = [f"k{number}" for number in numbers]
        write_rows(name, structs(numbers), group=4, **{names.get("column", "key"): keys})


def resume(options: ExportOptions = SHARDS, out: str = "out") -> Any:
    return export(options, out, inputs=None)


@pytest.fixture(params=SOURCES)
def started(request: pytest.FixtureRequest, folder: Path) -> tuple[str, ExportOptions, Any]:
    """An export of one tar or Parquet file, whose last shard is missing. Also return the content of
    the complete export."""
    name, options = SOURCES[request.param]
    write_source(name, NUMBERS)
    export(options, inputs=[name])
    complete = content()
    LAST_SHARD.unlink()
    return name, options, complete


def has_only_listed_images(
    complete: dict[str, Any], code: str = "missing", failed: int = 2
) -> None:
    """Each image has the rows of the complete export, or an error with this code."""
    found = content()
    errors = [each for each in found.values() if isinstance(each[0], str)]
    assert [each[0] for each in errors] == [code] * failed
    assert {k: v for k, v in found.items() if v not in errors}.items() <= complete.items()
    assert found.keys() == complete.keys()


def reverse(name: str) -> None:
    write_source(name, NUMBERS[::-1])


def reverse_and_cut_the_end(name: str) -> None:
    reverse(name)
    os.truncate(name, Path(name).read_bytes().rindex(b"IEND") + 400)


def reverse_and_repeat(name: str) -> None:
    reverse(name)
    Path(name).write_bytes(Path(name).read_bytes() * 2)


def rename_the_ids(name: str) -> None:
    write_source(name, NUMBERS[::-1], column="name")


@pytest.mark.parametrize("way", ["resume", "elsewhere", "extend", "other inputs", "retry"])
def test_images_of_a_reordered_file_fail_until_it_is_restored(
    started: tuple[str, ExportOptions, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options, complete = started
    reverse(name)
    if way == "elsewhere":  # the export cannot list its inputs
        Path("elsewhere").mkdir()
        with monkeypatch.context() as other:
            other.chdir("elsewhere")
            done = resume(options, "../out")
    elif way == "extend":
        write_source(name, [*range(4), 9])  # without the images of the missing shard
        done = export(replace(options, extend=True), inputs=[name])
        complete |= {each: row for each, row in content().items() if "9" in each}
    elif way == "other inputs":
        Path("p").mkdir()
        Path("p/x.png").write_bytes(tiny_png(50))
        done = export(replace(options, extend=True), inputs=["p"])
        complete["x.png"] = content()["x.png"]
    else:
        done = resume(replace(options, retry_failed=way == "retry"))
    assert done.failed == {"missing": 2}
    has_only_listed_images(complete)
    message = next(each[2] for each in content().values() if each[0] == "missing")
    assert f"its {'file' if options.column else 'tar'} {Path(name).resolve()} has ch" in message
    write_source(name, NUMBERS)
    done = resume(options)
    assert not done.failed
    assert content() == complete


@pytest.mark.parametrize("change", [reverse_and_cut_the_end, reverse_and_repeat])
def test_a_damaged_tar_in_another_order_is_recognised(
    folder: Path, change: Callable[[str], None]
) -> None:
    write_source("a.tar", NUMBERS)
    export(SHARDS, inputs=["a.tar"])
    complete = content()
    LAST_SHARD.unlink()
    change("a.tar")
    resume()
    has_only_listed_images(complete)


def test_rows_fail_if_their_id_column_is_lost(folder: Path) -> None:
    write_source("a.parquet", NUMBERS)
    export(ROWS, inputs=["a.parquet"])
    complete = content()
    LAST_SHARD.unlink()
    rename_the_ids("a.parquet")
    resume(ROWS)
    has_only_listed_images(complete, "unreadable")
    message = next(each[2] for each in content().values() if each[0] == "unreadable")
    assert "no column key" in message


def test_a_file_with_more_images_at_its_end_is_no_error(
    started: tuple[str, ExportOptions, Any], caplog: pytest.LogCaptureFixture
) -> None:
    name, options, complete = started
    write_source(name, [*NUMBERS, 6, 7])
    assert resume(options).exported == 6
    assert "to add the new images, pass extend=True" in caplog.text
    assert content() == complete


def test_a_tar_that_was_packed_again_is_no_error(folder: Path) -> None:
    write_source("a.tar", NUMBERS)
    export(SHARDS, inputs=["a.tar"])
    LAST_SHARD.unlink()
    data = bytearray(Path("a.tar").read_bytes())
    data[136:148] = b"%011o\0" % 1_700_000_000  # the time of the first member
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    Path("a.tar").write_bytes(data)
    assert not resume().failed


def test_an_export_whose_listing_lacks_the_check_resumes(
    started: tuple[str, ExportOptions, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions listed no member's hash and no id column."""
    name, options, complete = started
    to_json = Item.to_json
    with monkeypatch.context() as older:
        older.setattr(
            Item, "to_json", lambda item: to_json(replace(item, header=None, id_column=None))
        )
        export(options, "old", inputs=[name])
    Path("old/shard-00000001.safetensors").unlink()
    export(options, "old", inputs=[name])
    assert content("old") == complete


def test_a_complete_export_of_a_reordered_file_is_no_error(
    started: tuple[str, ExportOptions, Any], caplog: pytest.LogCaptureFixture
) -> None:
    name, options, complete = started
    resume(options)
    write_source(name, [6, *reversed(NUMBERS)])
    assert resume(options).exported == 6
    assert content() == complete
    assert "pass extend" not in caplog.text  # moved images cannot be extended
    first = "k5 (it was in row 5 of" if options.column else "a.tar/5.png (it was at byte 5632 of"
    now = "row 1" if options.column else "at byte 1536"
    assert f"1 new, first {'k6' if options.column else 'a.tar/6.png'}; 5 in another" in caplog.text
    assert first in caplog.text
    assert f"{name}, and is in {now} now)" in caplog.text.replace("is at", "is in at")


def test_a_lists_own_ids_of_places_are_no_error(folder: Path, monkeypatch: Any) -> None:
    """A list with offsets or rows may have any ids, and the files need not be tars."""
    write_source("a.tar", NUMBERS)
    write_source("a.parquet", NUMBERS)
    columns = ParquetColumns("image", "key")
    lines = [
        {"id": f"mine-{place}", "path": item.source, **places}
        for place, item in enumerate(find_items(["a.tar", "a.parquet"], columns=columns))
        for places in [
            {"offset": item.offset, "size": item.size} if item.row is None
            else {"row": item.row, "column": item.column}
        ]
    ]  # fmt: skip
    Path("l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert export(ROWS, inputs=["l.jsonl"]).exported == 12
    complete = content()
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    Path("l.jsonl").unlink()
    assert not resume(ROWS).failed
    assert content() == complete


def test_each_file_has_the_id_column_of_its_own_listing(folder: Path) -> None:
    write_source("a.parquet", NUMBERS)
    write_rows("b.parquet", structs([7, 8]), name=["n7", "n8"], key=["k0", "k1"])
    export(ROWS, inputs=["a.parquet"])
    export(replace(ROWS, extend=True, id_column="name"), inputs=["b.parquet"])
    complete = content()
    assert {"k5", "n8"} < complete.keys()
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    assert not resume(ROWS).failed
    assert content() == complete
    LAST_SHARD.unlink()
    reverse("a.parquet")
    resume(ROWS)
    has_only_listed_images(complete)


def test_members_with_equal_endings_differ(folder: Path) -> None:
    write_tar("a.tar", {"x/1.png": tiny_png(1)})
    export(SHARDS, inputs=["a.tar"])
    complete = content()
    Path("out/shard-00000000.safetensors").unlink()
    write_tar("a.tar", {"1.png": tiny_png(5), "x/1.png": tiny_png(1)})
    resume()
    has_only_listed_images(complete, failed=1)


def test_a_shard_that_is_written_again_is_checked_as_well(folder: Path) -> None:
    """A shard is written again if its missing image exists now."""
    write_source("a.tar", [0, 1])
    Path("gone.png").write_bytes(tiny_png(9))
    export(SHARDS, inputs=["a.tar", "gone.png"])
    complete = content()
    Path("out/shard-00000000.safetensors").unlink()
    os.rename("gone.png", "away.png")
    assert resume().failed == {"missing": 1}
    os.rename("away.png", "gone.png")
    write_source("a.tar", [1, 0])
    resume()
    has_only_listed_images(complete)


def test_pages_in_a_tar_and_a_table_keep_their_places(folder: Path) -> None:
    file = BytesIO()
    pages = [Image.new("RGB", (56, 56), (value, 0, 0)) for value in (0, 90, 180)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    options = replace(ROWS, shard_size=2, pages="all")
    members = {"a.tif": file.getvalue(), "b.png": tiny_png(1)}
    write_tar("a.tar", members)
    images = [{"bytes": data, "path": None} for data in members.values()]
    write_rows("a.parquet", images, key=["k0", "k1"])
    assert export(options, inputs=["a.tar", "a.parquet"]).exported == 8
    complete = content()
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    assert not resume(options).failed
    for shard in Path("out").glob("shard-*"):
        shard.unlink()
    write_tar("a.tar", dict(reversed(members.items())))
    write_rows("a.parquet", images[::-1], key=["k1", "k0"])
    resume(options)
    has_only_listed_images(complete, failed=8)


def test_a_video_in_a_changed_tar_is_an_error(folder: Path) -> None:
    write_tar("a.tar", {"a.mp4": b"a" * 100, "b.mp4": b"b" * 100})
    items = list(find_items(["a.tar"]))
    write_tar("a.tar", {"b.mp4": b"b" * 100, "a.mp4": b"a" * 100})
    for item in items:
        with (
            pytest.raises(
                ImageError,
                match=r"mp4: its tar .* has changed: the listed member is not at byte \d+",
            ),
            open_video_item(item, VideoLimits()),
        ):
            pass
