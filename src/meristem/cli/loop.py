"""``meristem loop``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.options import JSON, opened, show, wants_json

if TYPE_CHECKING:
    from meristem.loop import Turn

app = typer.Typer(
    name="loop", help="Signals -> plan -> update -> evaluation -> decision -> release.", no_args_is_help=True
)


@app.command("run")
def run(
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One turn for each model, then stop.")] = False,
    as_json: JSON = False,
) -> None:
    """Answer pending signals until none are left. Exit 1 or 3 when a model's last turn did not pass its gates."""
    with opened() as ws:
        done: list[dict[str, Any]] = []
        codes = {0}
        for name in [model] if model else [m.name for m in ws.models()]:
            turn = None
            while (following := ws.turn(name)) is not None:
                turn = following
                done.append(_document(turn))
                if not wants_json(as_json):
                    typer.echo(_text(turn))
                if once or turn.unfinished:
                    break
            codes |= {_exit_code(turn)} if turn else set()
        show(as_json, done, "" if done else "no signal is pending")
        raise typer.Exit(1 if 1 in codes else max(codes))


def _exit_code(turn: Turn) -> int:
    if turn.outcome != "stopped" or turn.decision is None:
        return 0
    return 1 if turn.decision.status == "fail" else 3


def _document(turn: Turn) -> dict[str, Any]:
    return {
        "plan": turn.plan.id,
        "outcome": turn.outcome,
        "reason": turn.reason,
        "version": turn.version.label if turn.version else None,
        "decision": turn.decision.id if turn.decision else None,
        "next_signal": turn.next_signal.id if turn.next_signal else None,
    }


def _text(turn: Turn) -> str:
    what = f"{turn.plan.id}: {turn.outcome}" + (f" {turn.version.label}" if turn.version else "")
    then = f"\n  {turn.next_signal.id} asks for another attempt" if turn.next_signal else ""
    return f"{what}\n  {turn.reason}{then}"
