"""``meristem eval``"""

from __future__ import annotations

from typing import Annotated

import typer

from meristem.cli.options import JSON, opened, show, table

app = typer.Typer(name="eval", help="Evaluations and paired comparisons.", no_args_is_help=True)


@app.command("run")
def run(
    reference: Annotated[str, typer.Argument(metavar="REF")],
    suite: Annotated[str, typer.Option()],
    as_json: JSON = False,
) -> None:
    """Score a version on a suite (from the store when it was measured before)."""
    with opened() as ws:
        entry = ws.evaluate(reference, suite)
        summary = entry.record.summary
        lines = [
            f"{ws.version(reference).label} on {suite}: {summary['score']:.3f} over {summary['items']} items"
        ]
        lines += [
            f"  {name}: {score:.3f}" for name, score in {**summary["tasks"], **summary["slices"]}.items()
        ]
        lines.append("  (stored before)" if entry.cached else f"  ({entry.seconds:.1f} s)")
        show(as_json, {"cached": entry.cached, **entry.record.document()}, "\n".join(lines))


@app.command("compare")
def compare(
    new: Annotated[str, typer.Argument(metavar="NEW")],
    old: Annotated[str, typer.Argument(metavar="OLD")],
    suite: Annotated[str, typer.Option()],
    as_json: JSON = False,
) -> None:
    """Compare two versions item by item: difference, interval, exact McNemar, negative flips. Exit 1: worse."""
    with opened() as ws:
        found = ws.compare(new, old, suite=suite)
        low, high = found.interval
        lines = [
            f"{ws.version(new).label} against {ws.version(old).label} on {suite}: {found.n} items",
            f"  score {found.old_score:.3f} -> {found.new_score:.3f} "
            f"({found.difference:+.3f}, {found.confidence:.0%} interval {low:+.3f} to {high:+.3f})",
            f"  {len(found.flipped)} right -> wrong (rate {found.nfr:.3f}), {len(found.gained)} wrong -> right; "
            f"exact McNemar p = {found.mcnemar_p:.2g}",
        ]
        show(as_json, found.to_document(), "\n".join(lines))
        if high < 0:
            raise typer.Exit(1)


@app.command("matrix")
def matrix(reference: Annotated[str, typer.Argument(metavar="REF")], as_json: JSON = False) -> None:
    """The task matrix of the line behind a version, with ACC, BWT, FWT and forgetting."""
    with opened() as ws:
        found = ws.task_matrix(reference)
        rows = [
            (label, *(f"{score:.3f}" for score in scores))
            for label, scores in zip(found.versions, found.matrix.scores, strict=True)
        ]
        names = {"ACC": found.matrix.acc, "BWT": found.matrix.bwt, "FWT": found.matrix.fwt}
        names["forgetting"] = found.matrix.forgetting
        metrics = "  ".join(f"{k} {v:+.3f}" if v is not None else f"{k} -" for k, v in names.items())
        text = table("tasks", ("version", *found.tasks), rows)
        show(as_json, found.to_document(), f"{text}\n{metrics}")
