"""Test that docs/architecture.md and its picture match the source."""

import ast
import html
import json
import re
from functools import cache
from itertools import pairwise

import pytest

from tests.support import ROOT
from tools.draw_architecture import PICTURE, Drawing, Imports, read_imports, read_layers

TEXT = (ROOT / "docs" / "architecture.md").read_text("utf-8")
STEPS = sorted(set(re.findall(r"`([\w/]+\.py:[\w.]+)`", TEXT)))
STALE = "docs/architecture.svg is stale: python -m tools.draw_architecture"


@cache
def imports() -> Imports:
    return read_imports()


def test_the_picture_shows_the_current_imports() -> None:
    svg = PICTURE.read_text("utf-8")
    [metadata] = re.findall(r"<metadata>(.*)</metadata>", svg)
    drawn = json.loads(html.unescape(metadata))
    as_json = json.loads(json.dumps([imports().edges, imports().drawn, imports().layers]))
    assert [drawn["imports"], drawn["drawn"], drawn["layers"]] == as_json, STALE
    assert svg == Drawing(imports()).svg(), STALE


def test_the_same_imports_give_the_same_picture() -> None:
    assert Drawing(imports()).svg() == Drawing(read_imports()).svg()


def test_every_box_and_every_arrow_is_drawn_once_and_arrows_point_downwards() -> None:
    drawing = Drawing(imports())
    svg = drawing.svg()
    for name in (name for layer in imports().layers for name in layer):
        assert svg.count(f">{name}</text>") == 1
    assert svg.count("fill='none'") == len(imports().drawn)
    for source, target in imports().drawn:
        assert drawing.row_of[source] < drawing.row_of[target]


def test_nothing_overlaps() -> None:
    for row in Drawing(imports()).rows:
        for left, right in pairwise(row):
            assert left.x + left.width / 2 <= right.x - right.width / 2 + 1e-6


def test_an_arrow_that_others_imply_is_omitted() -> None:
    layers = (("a",), ("b", "c"), ("d",))
    edges = (("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("c", "d"))
    drawing = Drawing(Imports(layers, {"b": ("x", "y")}, edges))
    assert drawing.imports.drawn == (("a", "b"), ("b", "c"), ("c", "d"))
    assert [drawing.row_of[name] for name in "abcd"] == [0, 1, 2, 3]
    assert "x · y" in drawing.svg()


def test_layers_are_those_of_the_contract() -> None:
    layers = read_layers()
    assert layers[0] == ["__main__"]
    assert ["checkpoint", "images", "inputs", "kernels"] in layers
    assert layers[-1] == ["errors"]


def test_every_part_has_a_sentence() -> None:
    described = re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXT, re.MULTILINE)
    names = [name for name, _ in described]
    known = [name for layer in read_layers() for name in layer]
    assert {name for layer in imports().layers for name in layer} <= {*names}
    assert {*names} <= {*known, "qwen_vit"}
    order = [known.index(name) for name in names if name in known]
    assert order == sorted(order)  # layers are from the top down
    assert all(re.fullmatch(r"[A-Z`].*\.", sentence) for _, sentence in described)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_a_walk_exists(step: str) -> None:
    file, _, name = step.partition(":")
    path = ROOT / "qwen_vit" / file
    assert path.is_file(), f"{file} does not exist"
    body: list[ast.stmt] = ast.parse(path.read_bytes()).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        assert found, f"{file} defines no {name}"
        body = found[0].body
