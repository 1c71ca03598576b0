"""``meristem``: assembles the nouns and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from meristem.cli.startup import collector_at_rest

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
READER_GONE = 141  # 128 + SIGPIPE, as a shell reports it: the work may not be done

# What stands after `meristem`, in the order of its help. Each has a module of its name.
NOUNS = (
    "init",
    "demo",
    "doctor",
    "report",
    "catalogue",
    "model",
    "alias",
    "data",
    "suite",
    "signal",
    "plan",
    "update",
    "eval",
    "bench",
    "release",
    "loop",
    "log",
    "key",
    "method",
    "store",
)


def build() -> typer.Typer:
    """The whole command line. Imports happen here, so that Ctrl-C during them is caught by ``main``.

    A noun is imported when it is asked for: by its name, or by the help that lists all.
    """
    import typer

    from meristem.cli.options import globals_

    class Nouns(typer.core.TyperGroup):
        def __init__(self, **settings: Any):
            super().__init__(**settings)
            on_demand: Any = None
            self.commands = dict.fromkeys(NOUNS, on_demand)  # what lists and suggestions name

        def make_context(self, *args: Any, **settings: Any) -> Any:
            with collector_at_rest():  # Typer imports pydantic to read the first option
                return super().make_context(*args, **settings)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name in NOUNS and self.commands[cmd_name] is None:
                self.commands[cmd_name] = _noun(cmd_name)
            return super().get_command(ctx, cmd_name)

    app = typer.Typer(
        name="meristem",
        cls=Nouns,
        help="Continual learning for LLMs as a governed release process.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: Rich would be most of the time that `meristem --help` takes
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(globals_)
    return app


def _noun(name: str) -> Any:
    """Click's form of a noun with its verbs, or of a command that stands alone."""
    import typer

    module = import_module(f"meristem.cli.{'eval_' if name == 'eval' else name}")
    around = typer.Typer(add_completion=False, rich_markup_mode=None)
    if hasattr(module, "app"):
        around.add_typer(module.app)
    else:
        around.command(name)(getattr(module, name))
    return typer.main.get_group(around).commands[name]


def main() -> None:
    """Entry point. Exit codes: see ``meristem.errors``."""
    try:
        with collector_at_rest():
            app = build()
        code = app(standalone_mode=False)
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
    if isinstance(error, UnicodeEncodeError):
        _complain("an argument is not UTF-8 text; type it in the terminal's encoding")
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
