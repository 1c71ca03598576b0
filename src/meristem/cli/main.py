"""``meristem``: assembles the nouns and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from meristem.cli import (
    catalogue,
    data,
    demo,
    eval_,
    init,
    log,
    loop,
    method,
    model,
    plan,
    release,
    report,
    signal,
    suite,
    update,
)
from meristem.cli.options import globals_

app = typer.Typer(
    name="meristem",
    help="Continual learning for LLMs as a governed release process.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(globals_)
app.command("init")(init.init)
app.command("demo")(demo.demo)
for noun in (model, data, suite, signal, plan, update, eval_, release, loop, log, method):
    app.add_typer(noun.app)
app.command("report")(report.report)
app.command("catalogue")(catalogue.catalogue)


def main() -> None:
    """Entry point. Exit codes: see ``meristem.errors``."""
    try:
        app(standalone_mode=False)
    except SystemExit:
        raise
    except BaseException as error:
        sys.exit(_code(error))


def _code(error: BaseException) -> int:
    """Print ``error`` as one line and return its exit code; ``--debug`` shows the traceback."""
    from meristem.errors import BadInput, EnvironmentFailure, MeristemError

    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command finishes the work", file=sys.stderr)
        return 130
    if isinstance(error, MeristemError):
        _complain(str(error))
        return error.exit_code
    if hasattr(error, "format_message"):  # click's usage errors, without importing click here
        _complain(f"{error.format_message()} (see --help)")
        return BadInput.exit_code
    if type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", 0))
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError):
        _complain(f"{error}; check disk and permissions, then repeat the command")
        return EnvironmentFailure.exit_code
    _complain(f"internal error: {type(error).__name__}: {error} (--debug shows where)")
    return MeristemError.exit_code


def _complain(message: str) -> None:
    print("meristem: " + " ".join(message.split()), file=sys.stderr)
