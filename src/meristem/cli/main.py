"""``meristem``: assembles the nouns and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
READER_GONE = 141  # 128 + SIGPIPE, as a shell reports it: the work may not be done


def build() -> typer.Typer:
    """The whole command line. Imports happen here, so that Ctrl-C during them is caught by ``main``."""
    import typer

    from meristem.cli import (
        alias,
        catalogue,
        data,
        demo,
        doctor,
        eval_,
        init,
        key,
        log,
        loop,
        method,
        model,
        plan,
        release,
        report,
        signal,
        store,
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
        rich_markup_mode=None,  # plain help: Rich would be most of the time that `meristem --help` takes
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(globals_)
    app.command("init")(init.init)
    app.command("demo")(demo.demo)
    app.command("doctor")(doctor.doctor)
    for noun in (
        model,
        alias,
        data,
        suite,
        signal,
        plan,
        update,
        eval_,
        release,
        loop,
        log,
        key,
        method,
        store,
    ):
        noun.app.rich_markup_mode = None
        app.add_typer(noun.app)
    app.command("report")(report.report)
    app.command("catalogue")(catalogue.catalogue)
    return app


def main() -> None:
    """Entry point. Exit codes: see ``meristem.errors``."""
    try:
        code = build()(standalone_mode=False)
    except SystemExit as end:
        # Typer hides a reader that went away in a SystemExit(1); no other one may pass for it.
        sys.exit(READER_GONE if isinstance(end.__context__, BrokenPipeError) else end.code)
    except BaseException as error:
        sys.exit(_code(error))
    if code == INTERRUPTED:  # Typer turns Ctrl-C into this number
        _complain("interrupted; the same command finishes the work")
    sys.exit(code if isinstance(code, int) else 0)


def _code(error: BaseException) -> int:
    """Print ``error`` as one line and return its exit code; ``--debug`` shows the traceback."""
    from meristem.errors import BadInput, EnvironmentFailure, MeristemError

    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        _complain("interrupted; the same command finishes the work")
        return INTERRUPTED
    if isinstance(error, MeristemError):
        _complain(str(error))
        return error.exit_code
    if hasattr(error, "format_message"):  # click's usage errors, without importing click here
        _complain_of_usage(error)
        return BadInput.exit_code
    if isinstance(error, OSError):
        _complain(f"{error}; check disk and permissions, then repeat the command")
        return EnvironmentFailure.exit_code
    _complain(f"internal error: {type(error).__name__}: {error} (--debug shows where)")
    return MeristemError.exit_code


def _complain_of_usage(error: Any) -> None:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # a noun without a verb: the message is its help
        print(message, file=sys.stderr)
    else:
        _complain(f"{message.rstrip('.')} (see --help)")


def _complain(message: str) -> None:
    print("meristem: " + " ".join(message.split()), file=sys.stderr)
