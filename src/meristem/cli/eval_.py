"""``meristem eval``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, opened, show, table

if TYPE_CHECKING:
    from meristem.data.matching import ItemMatch
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.exports.finding import Finding
    from meristem.evaluation.service import EvaluationEntry

app = typer.Typer(name="eval", help="Evaluations and paired comparisons.", no_args_is_help=True)

REF = Annotated[str, typer.Argument(metavar="REF")]
MOST_ITEMS = 20  # listed on a terminal
SUITE = Annotated[str, typer.Option()]


@app.command("run")
def run(
    reference: REF,
    suite: SUITE,
    expert: Annotated[
        str | None, typer.Option(metavar="TASK", help="Ask that task's expert, whatever the router says.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Score a version on a suite (from the store when it was measured before)."""
    with opened() as ws:
        entry = ws.evaluate(reference, suite, expert=expert)
        by = f", by the expert of {expert}" if expert else ""
        lines = _scores(f"{ws.version(reference).label} on {suite}{by}", entry)
        show(as_json, {"cached": entry.cached, **entry.record.document()}, "\n".join(lines))


@app.command("compare")
def compare(
    new: Annotated[str, typer.Argument(metavar="NEW")],
    old: Annotated[str, typer.Argument(metavar="OLD")],
    suite: SUITE,
    margin: Annotated[
        float | None, typer.Option(min=0, help="The loss that must be ruled out, e.g. 0.02 for two points.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Also write FILE.html, .md, .xml (JUnit) or .json.")] = None,
    contamination: Annotated[
        bool, typer.Option("--contamination", help="Look for test items in training data, for the page.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Compare two versions item by item. Exit 0: no regression, 1: regression, 3: cannot tell.

    A regression: the interval of the difference lies below zero, or a task or slice fell (Holm-corrected). With
    --margin also: not worse by that much is proven (0), refuted (1) or open (3).
    """
    from meristem.evaluation.exports.finding import finding
    from meristem.evaluation.exports.formats import COMPARISON, format_of

    chosen = format_of(None, to, COMPARISON)
    with opened() as ws:
        found = ws.compare(new, old, suite=suite)
        after, before = (ws.version(reference).label for reference in (new, old))
        told = finding(found, after, before, margin)
        if to is not None:
            from meristem.web.exports import write_comparison

            checked = ws.contamination(new, suite) if contamination else None
            write_comparison(ws, new, old, suite, to, chosen, found, told, margin, checked)
        document = {**found.to_document(), "outcome": told.outcome, "places": list(told.places)}
        if told.verdict:
            document["verdict"] = told.verdict.to_document()
        if to is not None:
            document["file"] = str(to)
        lines = [f"{after} against {before} on {suite}: {found.n} items", *_compared(found, told)]
        show(as_json, document, "\n".join([*lines, *([str(to)] if to else [])]))
        raise typer.Exit(told.exit_code)


@app.command("matrix")
def matrix(reference: REF, as_json: JSON = False) -> None:
    """The task matrix of the line behind a version, with ACC, BWT, FWT, forgetting, GAD, IFD and SD."""
    with opened() as ws:
        found = ws.task_matrix(reference)
        rows = [
            (label, *("-" if score is None else f"{score:.3f}" for score in scores))
            for label, scores in zip(found.versions, found.matrix.scores, strict=True)
        ]
        m = found.matrix
        metrics = {"ACC": m.acc, "BWT": m.bwt, "FWT": m.fwt, "forgetting": m.forgetting}
        readings = {"FWT after training (SAPT)": m.fwt_trained, "FWT as some print it": m.fwt_printed}
        metrics |= {name: value for name, value in readings.items() if value is not None}
        deltas = {"GAD": found.gad, "IFD": found.ifd, "SD": found.sd}
        text = f"{table('tasks', ('version', *found.tasks), rows)}\n{_numbers(metrics)}"
        if any(value is not None for value in deltas.values()):
            text += f"\n{_numbers(deltas)}"
        show(as_json, found.to_document(), text)


@app.command("export")
def export(
    reference: REF,
    suite: SUITE,
    format: Annotated[
        str | None,
        typer.Option(
            help="json, junit, markdown, html, hf (.eval_results) or model-card (model-index).",
            show_default="by the file's ending, else json",
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The file.", show_default="stdout")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="hf, model-card: the Hub's id of the data set, ORG/NAME.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Every item's result of one evaluation, with what was measured by digest, for other tools."""
    from meristem.evaluation.exports.formats import EVALUATION, format_of
    from meristem.web.exports import evaluation_export
    from meristem.web.pages import write_text

    chosen = format_of(format, to, EVALUATION)
    with opened() as ws:
        text = evaluation_export(ws, reference, suite, chosen, dataset)
        if to is not None:
            write_text(text, to)
            show(as_json, {"format": chosen, "file": str(to)}, str(to))
        elif chosen == "json":
            show(False, None, text.rstrip("\n"))
        else:
            show(as_json, {"format": chosen, "text": text}, text.rstrip("\n"))


@app.command("contamination")
def contamination(
    reference: REF,
    suite: SUITE,
    ngram: Annotated[int, typer.Option(help="Words in a row that count as a match.")] = 13,
    as_json: JSON = False,
) -> None:
    """Test items that stand in the training data of a version and its ancestors.

    Exit 0: none, 1: some, 3: not everything could be read.
    """
    from meristem.web.wording import plural

    with opened() as ws:
        report = ws.contamination(reference, suite, ngram=ngram)
        lines = [
            f"{report.version} on {report.suite}: {len(report.found)} of {report.items} items stand in training "
            f"data ({plural(report.rows, 'row')} read for {report.ngram} words in a row, or whole)"
        ]
        lines += [f"  {_contaminated(match)}" for match in report.found[:MOST_ITEMS]]
        if len(report.found) > MOST_ITEMS:
            lines.append(f"  and {len(report.found) - MOST_ITEMS:,} more")
        lines += [f"  not read: {data.label}, {data.why}" for data in report.unchecked]
        lines += [f"  {version} came ready made; its data is not known" for version in report.unrecorded]
        show(as_json, report.to_document(), "\n".join(lines))
        raise typer.Exit(1 if report.found else 0 if report.complete else 3)


def _scores(title: str, entry: EvaluationEntry) -> list[str]:
    from meristem.evaluation.exports.scales import scale
    from meristem.web.wording import plural, small_duration

    summary: dict[str, Any] = entry.record.summary
    shown = scale(summary.get("unit"))
    lines = [f"{title}: {shown.plain(summary['score'])} over {summary['items']} items"]
    lines += [f"  {name}: {shown.plain(value)}" for name, value in summary["tasks"].items()]
    lines += [f"  slice {name}: {shown.plain(value)}" for name, value in summary["slices"].items()]
    whole = summary.get("bits_per_byte", {})
    lines += [f"  {name}, all bytes as one text: {value:.4f} bits per byte" for name, value in whole.items()]
    if cut := summary.get("truncated"):
        told = (
            "prompt did not fit the model's window and was"
            if cut == 1
            else "prompts did not fit the model's window and were"
        )
        lines.append(f"  {cut} {told} cut")
    if unread := summary.get("unreadable"):
        lines.append(f"  {plural(unread, 'judgement')} could not be read and counted as 0")
    took = f"{entry.seconds:.1f} s, {small_duration(entry.seconds / summary['items'])} per item"
    return [*lines, f"  ({took}{'; stored before' if entry.cached else ''})"]


def _contaminated(match: ItemMatch) -> str:
    """``routing/r-1: whole, in tickets@v1 t-17 and 2 more rows`` or ``...: 67% of its words, in ...``"""
    what = "whole" if match.kind == "exact" else f"{match.share:.0%} of its passages"
    row = match.first[0]
    more = f" and {match.rows - 1:,} more" if match.rows > 1 else ""
    return f"{match.item}: {what}, in {row.data} {row.row}{more}"


def _compared(found: Comparison, told: Finding) -> list[str]:
    from meristem.evaluation.exports.scales import scale

    shown = scale(found.unit)
    low, high = (shown.sign * end for end in found.interval)
    interval = (
        found.unproven or f"{found.confidence:.0%} interval {min(low, high):+.3f} to {max(low, high):+.3f}"
    )
    lines = [
        f"  score {shown.plain(found.old_score)} -> {shown.plain(found.new_score)} "
        f"({shown.sign * found.difference:+.3f}, {interval})"
        + ("; lower is better" if shown.sign < 0 else "")
    ]
    if found.unit is None:
        lines.append(
            f"  {len(found.flipped)} right -> wrong (rate {found.nfr:.3f}), {len(found.gained)} wrong -> right; "
            f"p = {found.p_value:.2g} ({found.test})"
        )
    if found.clusters:
        lines.append(f"  {found.clusters} sources; design effect {found.design_effect:.2f}")
    for kind, groups in (("task", found.tasks), ("slice", found.slices)):
        lines += [
            f"  {kind} {group.name} got worse: {shown.plain(group.old_score)} -> {shown.plain(group.new_score)}, "
            f"p = {group.p_adjusted:.2g} after Holm"
            for group in groups
            if f"{kind} {group.name}" in told.places
        ]
    return [*lines, f"  {told.sentence} {told.settle}".rstrip()]


def _numbers(found: dict[str, float | None]) -> str:
    return "  ".join(
        f"{name} {value:+.3f}" if value is not None else f"{name} -" for name, value in found.items()
    )
