"""``meristem method``"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from meristem.cli.options import JSON, show, table

if TYPE_CHECKING:
    from meristem.methods.settings import MethodSettings

app = typer.Typer(name="method", help="The continual-learning methods.", no_args_is_help=True)


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Methods by name, with what helps to choose one."""
    from meristem.methods.facts import listed
    from meristem.methods.table import HEADINGS, cells

    found, broken = listed()
    rows = [list(cells(name, facts).values()) for name, facts in found.items()]
    rows += [[name, why, *["-"] * (len(HEADINGS) - 2)] for name, why in broken.items()]
    documents = {name: facts.to_document() for name, facts in found.items()}
    documents |= {name: {"error": why} for name, why in broken.items()}
    show(as_json, documents, table("methods", list(HEADINGS.values()), rows))


@app.command("show")
def show_(name: str, as_json: JSON = False) -> None:
    """One method: formula, source, arguments, state, best-known settings."""
    import inspect

    from meristem.methods.facts import facts
    from meristem.methods.registry import load
    from meristem.methods.settings import best_known
    from meristem.methods.table import HEADINGS, cells

    found, known, declared = load(name), best_known(name), facts(name)
    text = inspect.getdoc(found) or ""
    arguments = str(inspect.signature(found))
    document = {
        **declared.to_document(),
        "name": name,
        "arguments": arguments,
        "doc": text,
        "settings": known and known.to_document(),
    }
    said = [f"{HEADINGS[key]}: {cell}" for key, cell in cells(name, declared).items() if key not in _ABOVE]
    parts = [f"{name}{arguments}", text, "\n".join(said), _settings(known)]
    show(as_json, document, "\n\n".join(parts))


_ABOVE = ("name", "about")


def _settings(known: MethodSettings | None) -> str:
    if known is None:
        return "best-known settings: none yet"
    found = known.found
    best = ", ".join(f"{key}={value}" for key, value in known.arguments.items())
    tried = [f"  {trial.method}: ACC {trial.acc:.3f}, BWT {trial.bwt:+.3f}" for trial in found.tried]
    if found.sequential:
        tried.append(f"  plain fine-tuning: ACC {found.sequential.acc:.3f}, BWT {found.sequential.bwt:+.3f}")
        if found.best.acc <= found.sequential.acc:
            tried.append(
                "  the best is no better than plain fine-tuning on that stream, which forgets little"
            )
    seeds = "one seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    head = (
        f"best-known settings (--method {known.method}:best): {best}\n"
        f"found by: {found.command}\n"
        f"on {found.items} development items per task, {found.train_rows} training rows, {seeds}; {found.rule}"
    )
    return "\n".join([head, *tried])
