"""``meristem method``"""

from __future__ import annotations

import typer

from meristem.cli.options import JSON, show, table

app = typer.Typer(name="method", help="The continual-learning methods.", no_args_is_help=True)


@app.command("list")
def list_(as_json: JSON = False) -> None:
    """Methods by name."""
    from meristem.methods.registry import available

    found = available()
    show(as_json, found, table("methods", ("method", "what it does"), list(found.items())))


@app.command("show")
def show_(name: str, as_json: JSON = False) -> None:
    """One method: formula, source, arguments, state."""
    import inspect

    from meristem.methods.registry import load

    found = load(name)
    text = inspect.getdoc(found) or ""
    arguments = str(inspect.signature(found))
    document = {
        "name": name,
        "claims": found.claims,
        "stages": sorted(found.stages),
        "arguments": arguments,
        "doc": text,
    }
    show(as_json, document, f"{name}{arguments}\n\n{text}")
