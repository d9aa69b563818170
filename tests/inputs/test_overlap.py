"""Test that inputs with a common image are rejected, and that options without effect are named."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vit.errors import ExportError
from qwen_vit.export.options import ExportOptions
from qwen_vit.export.run import export_features
from qwen_vit.inputs.find import find_items
from qwen_vit.inputs.listing import Item
from qwen_vit.inputs.overlap import Overlap
from qwen_vit.video.options import VideoOptions
from tests.support import ROOT
from tests.support.encoders import picture, png, tiny
from tests.support.inputs import write_tar

OUT = ("--model", "tiny", "--out", "f.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "im" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        (tmp_path / "im" / name).write_bytes(png(picture(56, 56)))
    write_tar("im/c.tar", {"d.png": png(picture(56, 56))})
    return tmp_path


# Inputs with a common image


@pytest.mark.parametrize("other", ["im/a.png", "im/sub", "im/c.tar", "im/sub/*.png", "./im/a.png"])
def test_an_image_of_a_folder_that_is_another_input_is_refused(other: str) -> None:
    for inputs in (["im", other], [other, "im"]):
        with pytest.raises(ExportError, match=r"also in the folder im, .* Omit one of the two"):
            list(find_items(inputs))
    with pytest.raises(ExportError, match="also in the folder im"):
        export_features(tiny(), ["im", other], "out")


def test_one_file_with_two_names_is_refused(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"a\.png: the same file as im/a\.png\. Expected each"):
        list(find_items(["im/a.png", str(folder / "im" / "a.png")]))


def test_a_list_may_repeat_an_image_of_a_folder() -> None:
    lines = [json.dumps({"id": name, "path": "im/a.png"}) for name in ("x", "y")]
    Path("list.jsonl").write_text("\n".join(lines))
    Path("im/names.txt").write_text("a.png\n")
    assert len(list(find_items(["im", "list.jsonl"]))) == 5
    assert len(list(find_items(["im", "im/names.txt"]))) == 4
    assert len(list(find_items(["im/a.png", "im/sub", "im/c.tar"]))) == 3


def test_a_file_that_the_search_of_a_folder_skips_is_accepted() -> None:
    Path("im/scan").write_bytes(png(picture(56, 56)))
    Path("im/table.parquet").write_bytes(b"")
    found = [item.id for item in find_items(["im", "im/scan", "im/table.parquet"])]
    assert found == ["a.png", "c.tar/d.png", "sub/b.png", "im/scan", "im/table.parquet"]


def test_the_images_of_a_tar_take_no_memory() -> None:
    Path("other").mkdir()
    overlap = Overlap(["a.tar", "b.tar", "other"])
    source = str(Path("a.tar").absolute())
    items = (Item(f"a.tar/{n}.jpg", source, offset=n, size=1) for n in range(50_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in overlap.checked("a.tar", items)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# Options without effect


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--column", "x", "--id-column", "y"], "--column and --id-column: no input is a Parquet"),
        (["--as-video"], "--as-video: no input is an animated GIF, WebP or PNG"),
        (["--fps", "1"], "--fps: no input has the extension of a video"),
        (["--start", "1", "--max-frame-pixels", "99999"], "--start, --max-frame-pixels: no input"),
        (["--pages", "all"], "--pages: no input has the extension of a format with pages or"),
        (["--formats", "ppm"], "--formats: every input has the extension of another format"),
        (["--allow-urls", "example.org"], "--allow-urls: no input is an https:// address"),
    ],
)
def test_an_option_that_applies_to_no_input_gives_a_warning(
    options: list[str], expected: str, qwen_vit: Any
) -> None:
    shutil.copy(ROOT / "tests" / "photographs" / "rocket.jpg", "rocket.jpg")
    done = qwen_vit("encode", "rocket.jpg", *OUT, *options)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "ignored" in line] == [
        line for line in done.err.splitlines() if f"ignored {expected}" in line
    ]
    assert done.err.count("ignored") == 1


def test_an_option_for_images_gives_a_warning_if_every_input_is_a_video(qwen_vit: Any) -> None:
    shutil.copy(ROOT / "tests" / "videos" / "clip.mp4", "clip.mp4")
    size = ("--max-frame-pixels", "12544", "--min-frame-pixels", "3136")
    done = qwen_vit("encode", "clip.mp4", *OUT, *size, "--exif", "ignore")
    assert "ignored --exif: every input has the extension of a video" in done.err
    assert done.err.count("ignored") == 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_as_video_gives_a_warning_for_still_images(kind: str, qwen_vit: Any) -> None:
    frames = [Image.fromarray(picture(56, 56, seed)) for seed in range(2)]
    for name, rest in (("still", []), ("moving", frames[1:])):
        frames[0].save(f"{name}.{kind.lower()}", save_all=True, append_images=rest)
    warning = "ignored --as-video: no input is an animated GIF, WebP or PNG\n"
    size = ("--max-frame-pixels", "12544", "--min-frame-pixels", "3136")
    for names, expected in ((["still"], kind != "GIF"), (["still", "moving"], False)):
        files = [f"{name}.{kind.lower()}" for name in names]
        done = qwen_vit("encode", *files, *OUT, "--as-video", *size, "--overwrite")
        assert (done.code, warning in done.err) == (0, expected), done.err
        assert ("max-frame-pixels: no input" in done.err) == expected


def test_as_video_gives_a_warning_if_each_frame_is_an_image(
    qwen_vit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(picture(56, 56, seed)) for seed in range(2)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    options = ExportOptions(as_video=True, pages="all")
    export_features(tiny(), ["a.gif"], "out", options)
    assert 'ignored as_video: with pages="all", each frame is an image' in caplog.text
    done = qwen_vit("encode", "a.gif", *OUT, "--as-video", "--pages", "all", "--fps", "1")
    assert "ignored --as-video: with --pages all, each frame is an image\n" in done.err
    assert "ignored --fps: no input has the extension of a video" in done.err


@pytest.mark.parametrize("option", [["--as-video"], ["--pages", "all"]])
def test_an_option_that_applies_to_an_input_gives_no_warning(
    option: list[str], qwen_vit: Any
) -> None:
    shutil.copy(ROOT / "tests" / "videos" / "clip.mp4", "clip.mp4")
    options = (*option, "--max-frame-pixels", "12544", "--fps", "1")
    done = qwen_vit("encode", "im", "clip.mp4", *OUT, *options, "--min-frame-pixels", "3136")
    assert (done.code, done.err.count("ignored")) == (0, 0), done.err


def test_an_export_and_a_comparison_give_the_same_warning(
    qwen_vit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    export_features(tiny(), ["im/a.png"], "out", ExportOptions(video=VideoOptions(fps=1)))
    assert "ignored video (fps): no input has the extension of a video" in caplog.text
    done = qwen_vit("compare", "im/a.png", "--model", "tiny", "--fps", "1")
    assert "ignored --fps: no input has the extension of a video" in done.err


def test_quiet_and_verbose_do_not_go_together(qwen_vit: Any) -> None:
    for flags in (["-q", "-v"], ["--verbose", "--quiet"]):
        done = qwen_vit("info", "tiny", *flags)
        assert done.code == 2
        assert "--quiet works only without --verbose. Omit one of the two." in done.err
    assert qwen_vit("info", "tiny", "-q").code == 0
