"""The tables of a report, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meristem.bench.published import STREAMS, Published, of_stream
from meristem.bench.summary import BASE, METRICS, Group, Method

HEADS = {
    "acc": "ACC",
    "bwt": "BWT",
    "fwt": "FWT (before)",
    "fwt_trained": "FWT (after)",
    "forgetting": "forgetting",
    "plasticity": "just learned",
}
MEANINGS = {
    "ACC": "mean score over all tasks after the last one",
    "BWT": "mean change of earlier tasks since each was learned; negative is forgetting",
    "FWT (before)": "score of a task before it is learned, over the untrained model's",
    "FWT (after)": "score of a task once learned, over that of a model trained on it alone (needs per-task runs)",
    "forgetting": "mean drop from each task's best score",
    "just learned": "mean score of a task right after it was learned (plasticity)",
}


@dataclass(frozen=True)
class Table:
    """``numbers``: how many of the last columns are numbers. ``published`` rows stand apart."""

    columns: list[str]
    rows: list[list[str]]
    numbers: int
    published: frozenset[int] = frozenset()

    def markdown(self) -> str:
        words = len(self.columns) - self.numbers
        rule = ["---"] * words + ["---:"] * self.numbers
        lines = [self.columns, rule, *self.rows]
        return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def results_table(group: Group) -> Table:
    """One line per method, and below them what was published for the same stream."""
    published = [_published_row(number) for number in of_stream(group.protocol)]
    columns = ["method", "runs", "steps", *HEADS.values(), "training s"]
    rows = [[BASE, "1", "0", group.untrained.shown(), *["-"] * (len(METRICS) - 1), "-"]]
    rows += [_row(method) for method in group.methods]
    below = range(len(rows), len(rows) + len(published))
    return Table(columns, rows + published, len(columns) - 1, frozenset(below))


def _row(method: Method) -> list[str]:
    return [
        method.name,
        str(len(method.lines)),
        str(method.steps),
        *(method.metric(name).shown() for name in METRICS),
        method.seconds.shown(0),
    ]


def _published_row(number: Published) -> list[str]:
    told = {"acc": f"{number.acc:.3f}", "bwt": _signed(number.bwt)}
    metrics = [told.get(name, "-") for name in METRICS]
    return [f"published: {number.method}, {number.model}", "-", "-", *metrics, "-"]


def tasks_table(group: Group) -> Table:
    """The score of every task in the end."""
    tasks = group.tasks
    rows = [[method.name, *(method.last_score(task).shown() for task in tasks)] for method in group.methods]
    return Table(["method", *tasks], rows, len(tasks))


def published_table(streams: Sequence[str]) -> Table:
    """What others printed, with model, sign as printed and as read, and how the number was checked."""
    columns = ["stream", "method", "model", "checked", "note", "ACC", "BWT printed", "BWT read"]
    rows = [
        [
            STREAMS[stream],
            number.method,
            number.model,
            {"secondary": "secondary text", "recall": "from memory, unverified"}[number.mark],
            number.note or "-",
            f"{number.acc:.3f}",
            number.printed or "-",
            _signed(number.bwt),
        ]
        for stream in streams
        for number in of_stream(stream)
    ]
    return Table(columns, rows, 3)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
