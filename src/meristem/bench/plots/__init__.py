"""Pictures of a group of runs, each as PNG and SVG: accuracy curves, task matrices, the stability-plasticity plane."""

from __future__ import annotations

from pathlib import Path

from meristem.bench.plots.curves import curves
from meristem.bench.plots.matrices import matrices
from meristem.bench.plots.picture import STYLE, Picture, import_pyplot, saved
from meristem.bench.plots.plane import plane
from meristem.bench.summary import Group

__all__ = ["Picture", "draw"]


def draw(group: Group, folder: Path, prefix: str) -> list[Picture]:
    """Every picture that the runs of ``group`` allow, written under ``folder``."""
    pyplot = import_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with pyplot.rc_context(STYLE):
        for order, tasks in group.orders.items():
            for drawer in (curves, matrices):
                made.append(saved(drawer(pyplot, group, order, tasks), folder, prefix))
        if any(line.matrix.bwt is not None for method in group.methods for line in method.lines):
            made.append(saved(plane(pyplot, group), folder, prefix))
    return made
