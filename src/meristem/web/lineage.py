"""The lineage tree as inline SVG: one band per model, released versions on its first lane."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from meristem.ecosystem.records import Model
from meristem.ecosystem.versions import VersionEntry
from meristem.web.charts import line, svg, tag, text
from meristem.web.report_data import Snapshot, Standing, standing

_LABELS, _PITCH, _WIDTH, _HEIGHT, _LANE, _GAP = 168.0, 176.0, 148.0, 46.0, 64.0, 22.0
_SIDE = {"blocked", "unproven", "passed", "new"}  # never released: the second lane


@dataclass(frozen=True)
class Node:
    version: VersionEntry
    standing: Standing
    x: float
    y: float

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + _HEIGHT / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + _WIDTH, self.y + _HEIGHT / 2


@dataclass(frozen=True)
class Band:
    model: Model
    nodes: list[Node]
    y: float
    height: float


def lineage(data: Snapshot) -> Markup:
    bands = _bands(data)
    nodes = {node.version.digest: node for band in bands for node in band.nodes}
    width = max([node.x + _WIDTH for node in nodes.values()], default=_LABELS) + 12
    height = bands[-1].y + bands[-1].height
    return svg(
        width,
        height,
        f"Lineage of {data.model.name}",
        *[_background(band, width, band.model.name == data.model.name) for band in bands],
        *[_edges(node, nodes) for node in nodes.values()],
        *[_box(node) for node in nodes.values()],
        class_="lineage",
    )


def _bands(data: Snapshot) -> list[Band]:
    bands, y = [], 0.0
    for model in data.family:
        found = [(version, standing(data, version)) for version in data.versions_of(model.name)]
        lanes = 2 if any(stands.key in _SIDE for _, stands in found) else 1
        height = 2 * _GAP + _HEIGHT + (lanes - 1) * _LANE
        nodes = [
            Node(v, s, _LABELS + column * _PITCH, y + _GAP + (_LANE if s.key in _SIDE else 0))
            for column, (v, s) in enumerate(found)
        ]
        bands.append(Band(model, nodes, y, height))
        y += height
    return bands


def _background(band: Band, width: float, own: bool) -> Markup:
    return tag(
        "g",
        tag(
            "rect",
            x=0,
            y=band.y + 3,
            width=width,
            height=band.height - 6,
            rx=8.0,
            class_="band own" if own else "band",
        ),
        text(16, band.y + _GAP + 20, band.model.name, "model"),
        text(16, band.y + _GAP + 38, band.model.tier, "tier"),
    )


def _edges(node: Node, nodes: dict[str, Node]) -> Markup:
    """Parent to child, and the pinned base to a version that does not get it from its parent."""
    record = node.version.record
    parents = [nodes[digest] for digest in record.parents if digest in nodes]
    drawn = [_curve(parent.right, node.left, "edge") for parent in parents]
    inherited = any(parent.version.record.base == record.base for parent in parents)
    if record.base in nodes and not inherited:
        base = nodes[record.base]
        start, end = (base.x + 28, base.y + _HEIGHT), (node.x + 28, node.y)
        drawn.append(_drop(start, end))
    return tag("g", *drawn)


def _curve(start: tuple[float, float], end: tuple[float, float], class_: str) -> Markup:
    (x1, y1), (x2, y2) = start, end
    turn = min(x1 + 14, x2)
    bend = min(x2, x1 + 28)
    path = f"M{x1:.1f},{y1:.1f}C{turn:.1f},{y1:.1f} {turn:.1f},{y2:.1f} {bend:.1f},{y2:.1f}L{x2:.1f},{y2:.1f}"
    return tag("path", d=path, class_=class_)


def _drop(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    (x1, y1), (x2, y2) = start, end
    if x1 == x2:
        return line(x1, y1, x2, y2, "edge base")
    middle = (y1 + y2) / 2
    path = f"M{x1:.1f},{y1:.1f}C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"
    return tag("path", d=path, class_="edge base")


def _box(node: Node) -> Markup:
    stands = node.standing
    return tag(
        "g",
        tag("rect", x=node.x, y=node.y, width=_WIDTH, height=_HEIGHT, rx=7.0, class_="box"),
        text(node.x + 12, node.y + 19, _fitted(node.version.label), "label"),
        text(node.x + 12, node.y + 36, f"{stands.symbol} {stands.words}", "state"),
        class_=f"node {stands.key}",
    )


def _fitted(label: str, most: int = 17) -> str:
    """A long model name gives way; its band carries it in full."""
    name, _, number = label.rpartition("@")
    keep = most - len(number) - 1
    return label if len(label) <= most else f"{name[: keep - 1]}…@{number}"
