"""What every picture shares: its style, colours per method, and its two files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.bench.summary import Group
from meristem.errors import BadInput

FORMATS = ("png", "svg")
# Okabe & Ito's colours, which people with any colour vision tell apart; black is the bounds'.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a00", "#5b4b9a")
_MARKERS = "osD^vPX*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e8ed",
    "axes.edgecolor": "#8796a5",
    "svg.hashsalt": "meristem",  # the same picture has the same bytes
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Picture:
    """``stem``: its files' name without ending. ``caption`` says how to read it."""

    stem: str
    title: str
    caption: str

    def path(self, folder: Path, form: str) -> Path:
        return folder / f"{self.stem}.{form}"


def import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput("matplotlib is not installed; pip install 'meristem[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def saved(drawn: tuple[Any, Picture], folder: Path, prefix: str) -> Picture:
    from matplotlib import pyplot

    figure, picture = drawn
    named = Picture(f"{prefix}-{picture.stem}", picture.title, picture.caption)
    for form in FORMATS:
        plain = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(named.path(folder, form), dpi=150, bbox_inches="tight", metadata=plain)
    pyplot.close(figure)
    return named


def unit(group: Group) -> str:
    shape = group.conditions["recipe"]["stage"]
    return {"cpt": "minus bits per byte", "ca": "share preferred rightly"}.get(shape, "accuracy")


def looks(group: Group) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method that follows an order."""
    ordered = [method.name for method in group.methods if method.ordered]
    # Past the last colour the markers are shifted by one more each round, so that no pair comes twice.
    return {
        name: (_COLOURS[at % len(_COLOURS)], _MARKERS[(at + at // len(_COLOURS)) % len(_MARKERS)])
        for at, name in enumerate(ordered)
    }
