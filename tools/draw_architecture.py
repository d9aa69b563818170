"""Draw docs/architecture.svg: the package's subpackages and modules in layers, from the imports.

The import contract in pyproject.toml gives the layers. grimp finds the imports in the source. The
picture omits an arrow that other arrows imply. If A imports B and C, and B imports C, it omits
A -> C. The picture's metadata and each box's tooltip list all direct imports.
"""

import html
import json
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import grimp

from tools.common import ROOT

PACKAGE = "qwen_vit"
PUBLIC = "qwen_vit"  # the box of the public names, in the layer of `downstream`
PICTURE = ROOT / "docs" / "architecture.svg"
SWEEPS = 200  # iterations of ordering and of straightening, enough to converge
STRAIGHT = (8.0, 2.0, 1.0)  # weights of arrows: lane to lane, lane to box, box to box

FONT = "font-family='Helvetica, Arial, sans-serif'"
MARGIN, GAP, ROW_GAP, BAND_GAP = 24.0, 26.0, 34.0, 30.0
NAME_PX, SMALL_PX, LINE_PX = 14, 10, 13.0
MAX_LINE = 34  # characters per line of the small print
LANE = 16.0  # the width of an arrow that crosses a row
COLOURS = ("#2563eb", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", "#a21caf")
Edge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Imports:
    """Hold the drawing: boxes by layer from the top down, the content of the boxes, and the
    imports."""

    layers: tuple[tuple[str, ...], ...]
    inside: dict[str, tuple[str, ...]]  # the modules of each subpackage
    edges: tuple[Edge, ...]  # all direct imports, sorted

    @property
    def drawn(self) -> tuple[Edge, ...]:
        """Return the edges without edges that a longer path implies."""
        below = defaultdict[str, set[str]](set)
        for source, target in self.edges:
            below[source].add(target)

        def reachable(start: str) -> set[str]:
            seen: set[str] = set()
            waiting = [start]
            while waiting:
                new = below[waiting.pop()] - seen
                seen |= new
                waiting += new
            return seen

        further = {name: reachable(name) for names in self.layers for name in names}
        return tuple(
            (source, target)
            for source, target in self.edges
            if not any(target in further[other] for other in below[source] - {target})
        )


def read_layers(pyproject: Path = ROOT / "pyproject.toml") -> list[list[str]]:
    """Return the contract's layers from the top down, including planned layers."""
    contracts = tomllib.loads(pyproject.read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[name.strip(" ()") for name in re.split("[:|]", layer)] for layer in layers]


def read_imports() -> Imports:
    """Return the package's imports, by subpackage and top module, without `__main__`."""
    graph = grimp.build_graph(PACKAGE)
    found = {name.removeprefix(f"{PACKAGE}."): name for name in graph.find_children(PACKAGE)}
    del found["__main__"]  # it only starts the command line
    found[PUBLIC] = PACKAGE
    layers = [[name for name in layer if name in found] for layer in read_layers()]
    next(layer for layer in layers if "downstream" in layer).insert(0, PUBLIC)

    def box_of(module: str) -> str:
        return PUBLIC if module == PACKAGE else module.split(".")[1]

    edges = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            source, target = box_of(module), box_of(imported)
            if source != target and source != "__main__":
                edges.add((source, target))
    inside = {
        name: tuple(sorted(child.rpartition(".")[2] for child in graph.find_children(module)))
        for name, module in found.items()
        if name != PUBLIC
    }
    return Imports(
        tuple(tuple(layer) for layer in layers if layer),
        {name: children for name, children in sorted(inside.items()) if children},
        tuple(sorted(edges)),
    )


@dataclass(slots=True)
class Node:
    """Hold a box, or a lane, which is the place where an arrow crosses a row."""

    name: str | None
    width: float
    height: float
    x: float = 0.0  # the position of its middle
    y: float = 0.0

    @property
    def is_box(self) -> bool:
        return self.name is not None


def ranks(imports: Imports) -> tuple[dict[str, int], list[range]]:
    """Return the row of each box and the rows of each layer. Boxes of a layer that import each
    other are in different rows."""
    row_of: dict[str, int] = {}
    bands, first = [], 0
    for layer in imports.layers:
        depth = dict.fromkeys(layer, 0)
        for _ in layer:
            for source, target in imports.edges:
                if source in depth and target in depth:
                    depth[target] = max(depth[target], depth[source] + 1)
        row_of |= {name: first + depth[name] for name in layer}
        bands.append(range(first, first + max(depth.values()) + 1))
        first = bands[-1].stop
    return row_of, bands


def small_print(modules: Sequence[str]) -> list[str]:
    lines = [""]
    for name in modules:
        if lines[-1] and len(lines[-1]) + len(name) + 3 > MAX_LINE:
            lines.append("")
        lines[-1] += f"{' · ' if lines[-1] else ''}{name}"
    return [line for line in lines if line]


def box(name: str, modules: Sequence[str]) -> Node:
    lines = small_print(modules)
    width = max([0.64 * NAME_PX * len(name), *(0.53 * SMALL_PX * len(line) for line in lines)])
    return Node(name, math.ceil(width) + 24, 30 + LINE_PX * len(lines))


class Drawing:
    """Return rows of boxes and lanes, and the nodes of each arrow."""

    def __init__(self, imports: Imports) -> None:
        self.imports = imports
        self.row_of, self.bands = ranks(imports)
        self.rows: list[list[Node]] = [[] for _ in range(self.bands[-1].stop)]
        self.boxes: dict[str, Node] = {}
        for layer in imports.layers:
            for name in layer:
                self.boxes[name] = box(name, imports.inside.get(name, ()))
                self.rows[self.row_of[name]].append(self.boxes[name])
        self.paths: dict[Edge, list[Node]] = {}
        for source, target in imports.drawn:
            path = [self.boxes[source]]
            for row in range(self.row_of[source] + 1, self.row_of[target]):
                path.append(Node(None, LANE, 0.0))
                self.rows[row].append(path[-1])
            self.paths[source, target] = [*path, self.boxes[target]]
        self.order()
        self.assign_places()

    def neighbours(self) -> tuple[dict[int, list[Node]], dict[int, list[Node]]]:
        above, below = defaultdict[int, list[Node]](list), defaultdict[int, list[Node]](list)
        for path in self.paths.values():
            for one, other in pairwise(path):
                below[id(one)].append(other)
                above[id(other)].append(one)
        return above, below

    def order(self) -> None:
        """Sort each row by the positions of its neighbours, alternately from above and from
        below."""
        above, below = self.neighbours()
        position = {id(node): float(i) for row in self.rows for i, node in enumerate(row)}
        best, fewest = [list(row) for row in self.rows], self.crossings()
        for sweep in range(SWEEPS):
            rows, others = (self.rows, above) if sweep % 2 == 0 else (self.rows[::-1], below)
            for row in rows:
                wanted = {
                    id(node): mean((position[id(n)] for n in others[id(node)]), position[id(node)])
                    for node in row
                }
                row.sort(key=lambda node, wanted=wanted: wanted[id(node)])  # type: ignore[misc]
                for i, node in enumerate(row):
                    position[id(node)] = (i + 0.5) / len(row)
            if (crossings := self.crossings()) < fewest:
                best, fewest = [list(row) for row in self.rows], crossings
        self.rows = best

    def crossings(self) -> int:
        place = {id(node): i for row in self.rows for i, node in enumerate(row)}
        row_of = {id(node): i for i, row in enumerate(self.rows) for node in row}
        by_row = defaultdict[int, list[tuple[int, int]]](list)
        for path in self.paths.values():
            for one, other in pairwise(path):
                by_row[row_of[id(one)]].append((place[id(one)], place[id(other)]))
        return sum(
            (a - c) * (b - d) < 0
            for steps in by_row.values()
            for i, (a, b) in enumerate(steps)
            for c, d in steps[:i]
        )

    def assign_places(self) -> None:
        """Give each node a place, with straight arrows if the boxes have enough space."""
        above, below = self.neighbours()
        for row in self.rows:
            pack(row, [node.x for node in row])
        for sweep in range(SWEEPS):
            rows = self.rows if sweep % 2 == 0 else self.rows[::-1]
            for row in rows:
                pack(row, [pulled(node, above[id(node)] + below[id(node)]) for node in row])
        left = min(node.x - node.width / 2 for row in self.rows for node in row)
        y = MARGIN
        for band in self.bands:
            for row in (self.rows[i] for i in band):
                height = max(node.height for node in row)
                for node in row:
                    node.x += MARGIN + 20 - left
                    node.y = y + height / 2
                    node.height = node.height if node.is_box else height
                y += height + ROW_GAP
            y += BAND_GAP - ROW_GAP
        self.height = y - BAND_GAP + MARGIN
        right = max(node.x + node.width / 2 for row in self.rows for node in row)
        self.width = right + MARGIN + 20

    def svg(self) -> str:
        """Return the picture as SVG text, reproducible for the same imports."""
        width, height = math.ceil(self.width), math.ceil(self.height)
        facts = {
            "layers": self.imports.layers,
            "modules": self.imports.inside,
            "imports": self.imports.edges,
            "drawn": self.imports.drawn,
        }
        lines = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'"
            f" viewBox='0 0 {width} {height}' {FONT} role='img'>",
            "<title>Which part of qwen_vit imports which</title>",
            f"<metadata>{html.escape(json.dumps(facts), quote=False)}</metadata>",
            f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
            *self.stripes(width),
            *(line for edge in self.paths for line in self.arrow(edge)),
            *(line for name in self.boxes for line in self.drawn_box(name)),
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def stripes(self, width: int) -> Iterable[str]:
        for band in self.bands:
            nodes = [node for i in band for node in self.rows[i]]
            top = min(node.y - node.height / 2 for node in nodes) - 9
            bottom = max(node.y + node.height / 2 for node in nodes) + 9
            yield (
                f"<rect x='10' y='{top:.1f}' width='{width - 20}' height='{bottom - top:.1f}'"
                " rx='8' fill='#f1f5f9'/>"
            )

    def arrow(self, edge: Edge) -> Iterable[str]:
        """Return a curve through the lanes with an arrow head, in one colour for each source."""
        names = list(self.boxes)
        colour = COLOURS[names.index(edge[0]) % len(COLOURS)]
        path = self.paths[edge]
        start, end = path[0], path[-1]
        outgoing = [p for e, p in self.paths.items() if e[0] == edge[0]]
        incoming = [p for e, p in self.paths.items() if e[1] == edge[1]]
        at = (port(start, path[1], [p[1] for p in outgoing]), start.y + start.height / 2)
        to = (port(end, path[-2], [p[-2] for p in incoming]), end.y - end.height / 2 - 6)
        curve = f"M {at[0]:.1f} {at[1]:.1f}"
        for lane in path[1:-1]:
            top, bottom = lane.y - lane.height / 2, lane.y + lane.height / 2
            curve += f"{bend(at, (lane.x, top))} L {lane.x:.1f} {bottom:.1f}"
            at = (lane.x, bottom)
        curve += bend(at, to)
        yield f"<path d='{curve}' fill='none' stroke='{colour}' stroke-width='1.4'/>"
        x, y = to
        yield f"<path d='M {x - 4:.1f} {y:.1f} h 8 l -4 6 z' fill='{colour}'/>"

    def drawn_box(self, name: str) -> Iterable[str]:
        node, modules = self.boxes[name], self.imports.inside.get(name, ())
        left, top = node.x - node.width / 2, node.y - node.height / 2
        fill = "#dbeafe" if modules else "#ffffff"
        uses = ", ".join(target for source, target in self.imports.edges if source == name)
        yield f"<g><title>{name} imports {uses or 'nothing of the package'}</title>"
        yield (
            f"<rect x='{left:.1f}' y='{top:.1f}' width='{node.width:.1f}'"
            f" height='{node.height:.1f}' rx='5' fill='{fill}' stroke='#334155'/>"
        )
        yield text(node.x, top + 20, NAME_PX, name, "font-weight='bold' fill='#0f172a'")
        for i, line in enumerate(small_print(modules)):
            yield text(node.x, top + 34 + LINE_PX * i, SMALL_PX, line, "fill='#475569'")
        yield "</g>"


def mean(values: Iterable[float], otherwise: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else otherwise


def pulled(node: Node, neighbours: Sequence[Node]) -> float:
    """Return the preferred place of a node from its arrows. Lanes have the largest weight, so that
    long arrows are straight."""
    pulls = [(STRAIGHT[node.is_box + other.is_box], other.x) for other in neighbours]
    total = sum(weight for weight, _ in pulls)
    return sum(weight * x for weight, x in pulls) / total if total else node.x


def pack(row: Sequence[Node], wanted: Sequence[float]) -> None:
    """Set x as near to `wanted` as order and gaps allow. Nodes without a gap move together."""
    groups: list[tuple[list[tuple[Node, float]], float]] = []  # [(node, offset)], start
    for node, x in zip(row, wanted, strict=True):
        members, start = [(node, 0.0)], x
        while groups:
            before, before_start = groups[-1]
            last, offset = before[-1]
            distance = (last.width + members[0][0].width) / 2 + gap(last, members[0][0])
            if before_start + offset + distance <= start:
                break
            shift = offset + distance
            count, other = len(before), len(members)
            members = [*before, *((each, shift + more) for each, more in members)]
            start = (before_start * count + (start - shift) * other) / (count + other)
            groups.pop()
        groups.append((members, start))
    for members, start in groups:
        for node, offset in members:
            node.x = start + offset


def gap(one: Node, other: Node) -> float:
    return GAP if one.is_box and other.is_box else GAP / 2 if one.is_box or other.is_box else 0.0


def port(node: Node, towards: Node, others: Sequence[Node]) -> float:
    """Return the place on a box's edge where an arrow begins or ends, side by side in order."""
    ordered = sorted(others, key=lambda other: other.x)
    index = next(i for i, other in enumerate(ordered) if other is towards)
    step = min(14.0, (node.width - 16) / max(1, len(ordered)))
    return node.x + (index - (len(ordered) - 1) / 2) * step


def bend(at: tuple[float, float], to: tuple[float, float]) -> str:
    middle = (at[1] + to[1]) / 2
    return f" C {at[0]:.1f} {middle:.1f} {to[0]:.1f} {middle:.1f} {to[0]:.1f} {to[1]:.1f}"


def text(x: float, y: float, size: int, content: str, style: str) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='middle' {style}>"
        f"{html.escape(content)}</text>"
    )


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=PICTURE, show_default=True)
def main(out: Path) -> None:
    imports = read_imports()
    out.write_text(Drawing(imports).svg(), "utf-8")
    print(f"{out}: {len(imports.edges)} imports between parts, {len(imports.drawn)} drawn")


if __name__ == "__main__":
    main()
