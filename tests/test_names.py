"""Test that no module defines a retired name, so that one thing has one name, the field's name.

A retired name differs from the field's name: `Tiling` is a `SegmentTiling`, and `_Crew` is a
`Prefetcher`. Ordinary English words are retired only as functions, classes or modules, not as local
variables.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

# Names retired in every definition: function, class, variable, attribute, parameter or module.
RETIRED = {
    # faults, other processes, fakes
    *("planted", "Planted", "with_fault", "sm90", "own_process", "rope_apart", "Apart"),
    *("tower_apart", "hub_chaos", "export_trials", "reading_trials", "NURSERY", "Nursery"),
    *("stand_in", "StandIn", "Held", "DEATHS"),
    # kernels
    *("beside_product", "AddedLinear", "linear_added", "with_squares", "regime", "_with_room"),
    *("budget_for", "rows_for", "keep_until_here", "show_to_tensor_cores"),
    *("Tiles", "Tiling"),
    # pipeline and export
    *("_Crew", "Behind", "Clock", "_Pace", "Breaker", "Tally", "RowForm", "Described", "_Begin"),
    *("_or_its_error", "_loaded_now", "_cut", "_given", "_settle", "_settled", "clear_away"),
    *("rehearse_export", "head_room", "hold_moment", "_way_on_told"),
    # checkpoints and feature files
    *("_knock", "_prove", "_arrange", "Elsewhere", "Opened", "_Choice", "Maps"),
    # figures and text
    *("LANDMARK", "_take_turns", "_shown"),
}
# Names retired only for functions, methods and classes; `shown` is a good variable name.
# Allowed: `do`, `take` and `rest`, which standard interfaces have, and the command `show`.
RETIRED_AS_DEFINITIONS = {
    *("told", "shown", "counted", "place", "product", "apart", "holds", "serves", "rested"),
    *("_fetch", "_multiply", "_attend", "Plan", "Tile"),
}
# Names retired only for modules; a fixture may have the name `comparison`.
RETIRED_MODULES = {
    *("consumers", "guarded", "distributed", "comparison", "comparison_text", "hub_client"),
}
RETIRED_CONSTANTS = re.compile(r"_?(LEAST|MOST|LARGEST)_[A-Z0-9_]+|_?RESTED_[A-Z0-9_]+")
FILES = sorted(
    path for top in ("qwen_vit", "tests", "tools") for path in (ROOT / top).rglob("*.py")
)


def definitions(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, line, whether it is a function or class) for every definition of a file."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno, True
            case ast.ClassDef(name=name):
                yield name, node.lineno, True
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno, False
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno, False
            case ast.alias(asname=str(name)):
                yield name, getattr(node, "lineno", 0), False


def retired(path: Path, text: str) -> list[str]:
    """Return a file's definitions with retired names, and their lines."""
    wrong = [f"{path}:1: {path.stem}"] if path.stem in RETIRED | RETIRED_MODULES else []
    return wrong + [
        f"{path}:{line}: {name}"
        for name, line, is_definition in definitions(ast.parse(text))
        if name in RETIRED
        or (is_definition and name in RETIRED_AS_DEFINITIONS)
        or RETIRED_CONSTANTS.fullmatch(name)
    ]


def test_no_retired_name_is_defined() -> None:
    found = [retired(path.relative_to(ROOT), path.read_text("utf-8")) for path in FILES]
    assert [line for lines in found for line in lines] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class Tiling: ...", ["Tiling"]),
        ("def f(regime): ...", ["regime"]),
        ("async def counted(): ...", ["counted"]),
        ("counted = told = 3", []),
        ("for _cut in x: ...", ["_cut"]),
        ("with x as Held: ...", ["Held"]),
        ("self.head_room = 1", ["head_room"]),
        ("if (_given := 1): ...", ["_given"]),
        ("from x import y as Behind", ["Behind"]),
        ("_MOST_BYTES, LARGEST_X = 1, 2", ["_MOST_BYTES", "LARGEST_X"]),
        ("lambda planted: 1", ["planted"]),
        ("try: ...\nexcept E as Opened: ...", ["Opened"]),
        ("x = y.regime(_cut)", []),
    ],
)
def test_the_definition_of_a_retired_name_is_detected(text: str, found: list[str]) -> None:
    assert [line.rpartition(" ")[2] for line in retired(Path("x.py"), text)] == found


def test_a_retired_module_is_detected() -> None:
    assert retired(Path("tests/sm90.py"), "") == ["tests/sm90.py:1: sm90"]
    assert retired(Path("export/distributed.py"), "") == ["export/distributed.py:1: distributed"]
