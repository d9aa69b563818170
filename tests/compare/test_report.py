"""Test that the page of `compare --report` is self-contained, safe and correct."""

import base64
import re
from dataclasses import replace
from datetime import date
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vit import __version__
from qwen_vit.common.installation import install_command
from qwen_vit.compare import plots, report
from qwen_vit.compare.result import Comparison
from qwen_vit.compare.run import compare
from qwen_vit.errors import ArgumentError, ExportError, ImageError, with_options
from qwen_vit.images.patches import resize_image
from qwen_vit.show import draw
from qwen_vit.show.strips import StripLayout
from tests.support import IMAGES
from tests.support.comparisons import encoder

CHELSEA = str(IMAGES / "chelsea.png")
TODAY = date(2026, 1, 31)
COMMAND = "qwen-vit compare 'a cat.png' --report page"


@cache
def comparison() -> Comparison:
    return compare(encoder(), [CHELSEA], keep_maps=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "page"
    return report.write_report(folder, comparison(), command=COMMAND, today=TODAY)


class Tags(HTMLParser):
    """Collect every tag with its attributes and the text, and check that tags are closed
    correctly."""

    VOID = ("meta", "img", "br", "link", "source")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_no_other_file(page: Path) -> None:
    tags = Tags(page.read_text("utf-8"))
    assert tags.open == []
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe", "object"} == set()
    addresses = [
        value for _, attributes in tags.found for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]  # fmt: skip
    stages = 4
    assert len(addresses) == 1 + 2 + 3 * stages  # windows; drift twice; three maps a stage
    assert all(str(address).startswith("data:image/png;base64,") for address in addresses)
    assert "url(" not in page.read_text("utf-8")
    assert all(attributes["alt"] for tag, attributes in tags.found if tag == "img")


def test_the_pictures_are_beside_the_page_and_inside_it(page: Path) -> None:
    files = sorted(page.parent.glob("*.png"))
    assert [file.name for file in files] == [
        f"01-chelsea-{what}.png" for what in ("drift", "features", "windows")
    ]
    inside = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text("utf-8"))
    assert (page.parent / "01-chelsea-windows.png").read_bytes() in map(base64.b64decode, inside)
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert min(image.size) > 300


def test_the_page_has_the_figures_of_the_table(page: Path) -> None:
    text = " ".join(Tags(page.read_text("utf-8")).text.split())
    [image] = comparison().images
    for stage in image.stages:
        assert (
            f"{stage.name} {stage.difference.relative:.2e} {stage.difference.largest:.2e}" in text
        )
    assert "agrees: 1 of 1 image, 7 stages" in text
    assert "closer to float64: ours, at 7 of 7 stages" in text
    assert "differs" not in text


def test_the_same_comparison_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    again = report.write_report(tmp_path / "page", comparison(), command=COMMAND, today=TODAY)
    assert again.read_bytes() == page.read_bytes()


def test_a_difference_and_a_skipped_image_are_shown(undrawn: None, tmp_path: Path) -> None:
    [image] = comparison().images
    [*before, last] = image.stages
    verdict = replace(last.verdict, problem="0.5 from Hugging Face, allowed 1e-05")
    stages = (*before, replace(last, verdict=verdict))
    skipped = (("torn.png", ImageError("is large", remedy=with_options("lower {}", "max_pixels"))),)
    wrong = replace(comparison(), images=(replace(image, stages=stages),), skipped=skipped)
    tags = Tags(report.write_report(tmp_path / "page", wrong).read_text("utf-8"))
    text = " ".join(tags.text.split())
    assert "torn.pngskipped is large. Lower --max-pixels." in text
    assert "merger: 0.5 from Hugging Face, allowed 1e-05" in text
    assert text.index("tiny differs from Hugging Face") < text.index("torn.pngskipped")
    badges = [attributes["class"] for tag, attributes in tags.found if tag == "span"]
    assert badges.count("badge bad") == 1  # one for the image; the heading has the summary


@pytest.mark.slow
def test_odd_file_names_are_text_on_the_page_and_no_paths(tmp_path: Path) -> None:
    names = ['<img src=x onerror="a()">.png', "../../up.png", "a\udcff猫\n.png"]
    images = tuple(replace(comparison().images[0], id=name) for name in names)
    page = report.write_report(tmp_path / "page", replace(comparison(), images=images))
    tags = Tags(page.read_text("utf-8"))
    assert [tag for tag, _ in tags.found].count("img") == 3 * (2 + 3 * 4)
    assert not any("onerror" in attributes for _, attributes in tags.found)
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "page"}
    assert len(list(page.parent.iterdir())) == 10
    assert all(path.name.isascii() for path in page.parent.iterdir())


def test_the_picture_has_the_pixels_of_the_towers_input() -> None:
    """The pixels from the processor's rows must return to their places in the first frame."""
    maps = comparison().images[0].maps
    assert maps is not None
    with Image.open(CHELSEA) as image:
        rgb = resize_image(np.asarray(image.convert("RGB")), encoder().image_config)
    assert np.array_equal(maps.rgb.numpy(), rgb)


def test_feature_maps_have_the_order_of_the_image() -> None:
    """A patch's embedding contains its brightness, so the map must follow the image and not the
    tower's order."""
    maps = comparison().images[0].maps
    assert maps is not None
    patches = maps.rgb.double().unfold(0, 14, 14).unfold(1, 14, 14).flatten(2)  # (h, w, 588)
    for stage in ("patch_embed", "block.1", "block.4"):
        ours, theirs = maps.stages[stage]
        assert torch.allclose(ours, theirs, atol=1e-4)
        values = ours.double().flatten(0, 1)
        values = torch.cat([values - values.mean(0), torch.ones(len(values), 1)], 1)[:, ::4]
        brightness = patches.mean(-1).flatten()
        fit = values @ torch.linalg.lstsq(values, brightness[:, None]).solution
        explained = 1 - float((fit[:, 0] - brightness).var() / brightness.var())
        shuffled = brightness[torch.randperm(len(brightness))]
        fit = values @ torch.linalg.lstsq(values, shuffled[:, None]).solution
        by_chance = 1 - float((fit[:, 0] - shuffled).var() / shuffled.var())
        print(f"{stage}: {explained:.2f}, by chance {by_chance:.2f}")
        assert explained > by_chance + 0.2


def test_both_maps_use_the_same_principal_axes() -> None:
    """Separate axes would hide a rotation of all features."""
    theirs = torch.randn(6, 8, 40, generator=torch.Generator().manual_seed(0))
    same = plots.StageMaps.of("merger", theirs.clone(), theirs)
    assert np.array_equal(same.ours, same.theirs)
    rotation = torch.linalg.qr(torch.randn(40, 40))[0]
    turned = plots.StageMaps.of("merger", theirs @ rotation, theirs)
    assert np.array_equal(turned.theirs, same.theirs)
    assert np.abs(turned.ours - turned.theirs).mean() > 0.1
    missing = plots.StageMaps.of("merger", theirs * float("nan"), theirs * float("nan"))
    assert missing.ours.shape == (6, 8, 3)
    assert plots.StageMaps.of("m", theirs[:1, :1], theirs[:1, :1]).ours.shape == (1, 1, 3)


def test_the_error_map_shows_the_wrong_token() -> None:
    theirs = torch.ones(5, 7, 40) + torch.arange(40)
    ours = theirs.clone()
    ours[3, 2] *= 1.5
    error = plots.StageMaps.of("merger", ours, theirs).error
    assert tuple(map(int, np.unravel_index(error.argmax(), error.shape))) == (3, 2)
    assert error.max() == pytest.approx(0.5)
    assert np.count_nonzero(error) == 1


def test_strips_of_an_error_map_have_one_scale() -> None:
    """With a separate scale for each strip, rounding would look like a fault."""
    from matplotlib.figure import Figure

    theirs = torch.ones(4, 400, 8)
    ours = theirs.clone()
    ours[0, 399] *= 1.5
    layout = StripLayout.of(4, 400, 8)
    assert layout.is_cut
    axes = Figure().subplots()
    plots.StageMaps.of("merger", ours, theirs).draws()["relative error"](layout, axes)
    assert {image.get_clim() for image in axes.images} == {(0.0, 0.5)}
    assert len(axes.images) == len(layout.sources)


def test_a_long_picture_is_cut_into_visible_strips(tmp_path: Path) -> None:
    """An image of 12000 x 60 once became a line of 3 pixels under overlapping titles."""
    Image.fromarray(np.zeros((60, 6000, 3), np.uint8)).save(tmp_path / "long.png")
    done = compare(encoder(), [tmp_path / "long.png"], keep_maps=True)
    page = report.write_report(tmp_path / "page", done)
    assert "A long image is cut into strips" in page.read_text("utf-8")
    for name in ("windows", "features"):
        with Image.open(page.parent / f"01-long-{name}.png") as picture:
            assert picture.width < 3 * picture.height < 12 * picture.width


def test_the_page_states_its_date_version_and_command(page: Path) -> None:
    text = " ".join(Tags(page.read_text("utf-8")).text.split())
    assert f"Made by qwen_vit {__version__} on 2026-01-31." in text
    assert COMMAND in text
    assert text.index("agrees: 1 of 1 image") < text.index("reference")  # the verdict is first
    for word in ("patch_embed", "block.N", "merger", "ours - HF", "ratio", "measured, allowed"):
        assert word in text[text.index("What the stages and columns mean") :]


def test_the_headline_counts_skipped_images(undrawn: None, tmp_path: Path) -> None:
    """A skipped image once made the page say that the model differs."""
    error = ImageError("a truncated PNG", name="torn.png", code="truncated")
    torn = replace(comparison(), skipped=(("torn.png", error),))
    page = report.write_report(tmp_path / "page", torn).read_text("utf-8")
    title = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    assert title is not None
    assert " ".join(title[1].split()) == "tiny agrees with Hugging Face; 1 skipped"
    assert (torn.agrees, torn.passed) == (True, False)


def test_other_weights_than_the_goldens_have_no_ratio(undrawn: None, tmp_path: Path) -> None:
    """Our error against float64 and the golden file's error belong to two models."""
    golden = {"path": "g", "weights_sha256": "0" * 64, "changed_weights": ("merger.ln_q.weight",)}
    other = replace(comparison(), facts={**comparison().facts, "golden": golden})
    page = report.write_report(tmp_path / "page", other).read_text("utf-8")
    assert "weights differ from the golden" in page
    assert "ratio" not in page
    assert "closer" not in page


def test_a_folder_with_files_is_refused_without_the_option(page: Path, tmp_path: Path) -> None:
    """A report once put its pictures between photographs, which `encode` then took for inputs."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    report.check_report(photographs, overwrite=False)
    (photographs / "a.jpg").touch()
    for folder in (page.parent, photographs):
        with pytest.raises(
            ExportError,
            match=r": the folder already contains files\. Expected a new or empty folder\. "
            r"Pass overwrite=True to write into this folder\.",
        ):
            report.check_report(folder, overwrite=False)
        report.check_report(folder, overwrite=True)


def test_only_the_pictures_of_an_older_report_are_removed(undrawn: None, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    left = {"notes.txt", "01-holiday.png", "cat-drift.png"}
    for name in (*left, "03-other_photo-drift.png", "01--windows.png"):
        (folder / name).write_bytes(b"")
    report.write_report(folder, comparison())
    names = {path.name for path in folder.iterdir()}
    assert left <= names
    assert not {"03-other_photo-drift.png", "01--windows.png"} & names
    assert len(names) == len(left) + 1 + 3 * len(comparison().images)


def test_without_the_extra_the_package_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(draw, "find_spec", lambda name: None if name == "matplotlib" else name)
    command = re.escape(install_command("show"))
    with pytest.raises(ArgumentError, match=rf"installed: matplotlib\. Run {command}"):
        report.check_report(tmp_path / "page", overwrite=False)


def test_a_comparison_without_maps_is_refused(tmp_path: Path) -> None:
    without = replace(comparison(), images=(replace(comparison().images[0], maps=None),))
    with pytest.raises(ArgumentError, match="keep_maps"):
        report.write_report(tmp_path / "page", without)
    assert not (tmp_path / "page").exists()
