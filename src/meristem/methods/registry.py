"""Methods by name: ``build("ewc", {"strength": 50})``; a recipe names no import path.

A method is registered through the entry-point group ``meristem.methods``. Listing names reads the sources of
their modules and imports nothing; torch is loaded when a method is built.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from meristem.errors import BadInput
from meristem.methods import _static
from meristem.methods.base import Method

GROUP = "meristem.methods"
BEST = "best"


def available() -> dict[str, str]:
    """Every registered method with the first line of its docstring, by name."""
    return {name: _description(found) for name, found in sorted(_entries().items())}


def build(name: str, arguments: Mapping[str, Any] | None = None) -> Method:
    """The method ``name`` built from keyword ``arguments``; a wrong name, argument or value is ``BadInput``."""
    method_class = load(name)
    arguments = dict(arguments or {})
    accepted = _accepted(method_class)
    for key in arguments:
        if accepted is not None and key not in accepted:
            raise BadInput(f"method {name!r} has no argument {key!r}: {_nearest(key, accepted)}")
    try:
        return method_class(**arguments)
    except BadInput:
        raise
    except (TypeError, ValueError) as error:
        raise BadInput(f"method {name!r} cannot be built: {_one_line(error)}") from error


def parse(text: str) -> Method:
    """Builds the method of a command-line ``NAME[:key=value,...]``, e.g. ``ewc:strength=50,gamma=0.9``.

    ``NAME:best`` takes its best-known settings, and ``NAME:best,key=value`` all of them but one.
    """
    name, _, rest = text.strip().partition(":")
    pieces = [piece for part in rest.split(",") if (piece := part.strip())]
    known = _best(name.strip()) if BEST in pieces else {}
    arguments: dict[str, Any] = {}
    for part in (piece for piece in pieces if piece != BEST):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise BadInput(f"method {text!r}: {part!r} is not key=value")
        if key in arguments:
            raise BadInput(f"method {text!r}: {key!r} is given twice")
        arguments[key] = _value(value.strip())
    return build(name.strip(), {**known, **arguments})


def load(name: str) -> type[Method]:
    """The class registered as ``name``."""
    registered = entry(name)
    try:
        found = registered.load()
    except Exception as error:  # the module is somebody's own, and may raise anything
        remedy = "install meristem[train]" if isinstance(error, ImportError) else "correct or uninstall it"
        raise BadInput(
            f"method {name!r} ({registered.value}) cannot be loaded: {_one_line(error)}; {remedy}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise BadInput(f"method {name!r} ({registered.value}) is not a meristem Method")
    return found


def entry(name: str) -> EntryPoint:
    """The entry point of ``name``; a name that nobody registered is ``BadInput``."""
    entries = _entries()
    if name not in entries:
        raise BadInput(f"there is no method {name!r}: {_nearest(name, sorted(entries))}")
    return entries[name]


def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for one in entry_points(group=GROUP):
        if one.name in found and found[one.name].value != one.value:
            raise BadInput(
                f"two packages register the method {one.name!r} "
                f"({found[one.name].value} and {one.value}): uninstall one"
            )
        found[one.name] = one
    return found


def _description(registered: EntryPoint) -> str:
    """The first docstring line of the class, read from its source so that nothing is imported."""
    classes = _static.chain(registered.module, registered.attr)
    return (ast.get_docstring(classes[0]) or "").partition("\n")[0] if classes else ""


def _best(name: str) -> dict[str, Any]:
    from meristem.methods.settings import best_known  # pydantic, for those who ask

    found = best_known(name)
    if found is None:
        raise BadInput(
            f"method {name!r} has no best-known settings yet: give its arguments, or leave {BEST!r} out"
        )
    return found.arguments


def _accepted(method_class: type[Method]) -> list[str] | None:
    """Argument names of the constructor; None when it takes any keyword."""
    if method_class.__init__ is object.__init__:
        return []
    parameters = list(inspect.signature(method_class.__init__).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known are " + ", ".join(known) if known else "it takes none"


def _value(text: str) -> Any:
    """``0.5``, ``7``, ``true``, ``none`` as Python values; anything else stays a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
