"""``bench report``: what the runs of a folder come to, as Markdown and as one HTML page, with pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from meristem._version import __version__
from meristem.bench import plots, results, tables
from meristem.bench.plots import Picture
from meristem.bench.published import STREAMS
from meristem.bench.results import Result
from meristem.bench.summary import Group, groups
from meristem.bench.tables import MEANINGS, Table
from meristem.store.packs import disk_failure, write_file_durably

PLOTS = "plots"
UNITS = {
    "cit": "share of test items answered rightly",
    "cpt": "minus bits per byte of held-out text; nearer 0 is better",
    "ca": "share of held-out pairs where the chosen answer is the likelier one",
}
NOT_COMPARABLE = "Published numbers are of other models, budgets, prompts and test sets: they say what range to expect, not who wins."


@dataclass(frozen=True)
class Section:
    """One group of runs, ready to be written."""

    title: str
    facts: list[tuple[str, str]]
    results: Table
    tasks: Table
    pictures: list[Picture]
    orders: dict[str, list[str]]
    warnings: list[str]


def write_report(out: Path, to: Path | None = None) -> tuple[Path, Path]:
    """The Markdown and the HTML file of the results under ``out``, written to ``to`` (default ``out/report``).

    Raises ``BadInput`` when there are no results, ``EnvironmentFailure`` when the disk refuses.
    """
    found = groups(results.read_all(out))
    folder = to or out / "report"
    try:
        sections = [_section(group, folder, f"{at}-{group.protocol}") for at, group in enumerate(found, 1)]
        published = tables.published_table(list(STREAMS))
        pages = folder / "report.md", folder / "report.html"
        write_file_durably(pages[0], _markdown(sections, published).encode())
        write_file_durably(pages[1], _html(sections, published, folder).encode())
    except OSError as error:
        raise disk_failure(error, folder) from error
    return pages


def _section(group: Group, folder: Path, prefix: str) -> Section:
    return Section(
        title=f"{group.protocol} on {group.conditions['model']['source']}{_split(group)}",
        facts=_facts(group),
        results=tables.results_table(group),
        tasks=tables.tasks_table(group),
        pictures=plots.draw(group, folder / PLOTS, prefix),
        orders=group.orders,
        warnings=_warnings(group),
    )


def _split(group: Group) -> str:
    return ", development items" if "split" in group.conditions else ""


def _facts(group: Group) -> list[tuple[str, str]]:
    settings, recipe = group.conditions, group.conditions["recipe"]
    data = next(iter(settings["data"].values()))
    lora = recipe["lora"] or {}
    length = f"{recipe['max_steps']} steps" if recipe["max_steps"] else f"{recipe['epochs']:g} epochs"
    batch = recipe["batch_size"] * recipe["gradient_accumulation"]
    shape = ", ".join(f"{key} {value}" for key, value in lora.items())
    words = f", texts cut to {settings['words']} words" if settings["words"] else ""
    return [
        ("score", UNITS[recipe["stage"]]),
        ("data per task", f"{data['train_rows']} training rows, {data['test_items']} test items{words}"),
        ("training per task", f"{length} of {batch} rows, learning rate {recipe['learning_rate']:g}"),
        ("weights", "all") if recipe.get("weights") == "full" else ("LoRA", shape or "the defaults"),
        ("precision and device", f"{recipe['dtype']} on {recipe['device']}"),
        ("model", str(settings["model"]["content"])),
    ]


def _warnings(group: Group) -> list[str]:
    lines = [line for method in group.methods for line in method.lines]
    found = []
    seeds = {method.name: {line.result["seed"] for line in method.lines} for method in group.methods}
    if len({frozenset(own) for own in seeds.values()}) > 1:
        told = "; ".join(f"{name}: {', '.join(map(str, sorted(own)))}" for name, own in seeds.items())
        found.append(f"The methods have different seeds ({told}).")
    if len({str(sorted(_code(line.result).items())) for line in lines}) > 1:
        found.append("These runs were made with different library versions; see the result files.")
    if any(line.single is None for line in lines if line.result["single"] is None):
        found.append("Without a per-task run of the same seed there is no FWT (after).")
    return found


def _code(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = result["settings"]["code"]
    return found


def _markdown(sections: Sequence[Section], published: Table) -> str:
    lines = [
        "# Benchmark report",
        "",
        f"Meristem {__version__}. Mean ± standard deviation over orders and seeds.",
    ]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"- {name}: {text}" for name, text in section.facts]
        lines += [f"- order {name}: {' → '.join(tasks)}" for name, tasks in section.orders.items()]
        lines += ["", *(f"**{warning}**\n" for warning in section.warnings), section.results.markdown(), ""]
        if section.results.published:
            lines += [NOT_COMPARABLE, ""]
        lines += ["Score of every task in the end:", "", section.tasks.markdown()]
        for picture in section.pictures:
            path = picture.path(Path(PLOTS), "png").as_posix()
            lines += ["", f"### {picture.title}", "", f"![{picture.title}]({path})", "", picture.caption]
    lines += ["", "## What the columns mean", ""]
    lines += [f"- {name}: {text}" for name, text in MEANINGS.items()]
    lines += ["", "## Published numbers", "", NOT_COMPARABLE, "", published.markdown(), ""]
    return "\n".join(lines)


def _html(sections: Sequence[Section], published: Table, folder: Path) -> str:
    environment = Environment(
        loader=PackageLoader("meristem.bench", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )

    def embedded(picture: Picture) -> str:
        body = picture.path(folder / PLOTS, "svg").read_bytes()
        return "data:image/svg+xml;base64," + base64.b64encode(body).decode()

    return environment.get_template("report.html.j2").render(
        sections=sections,
        published=published,
        meanings=MEANINGS,
        not_comparable=NOT_COMPARABLE,
        embedded=embedded,
        tool=__version__,
    )
