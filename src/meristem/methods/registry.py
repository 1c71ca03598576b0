"""Methods by name: ``build("ewc", {"strength": 50})``; a recipe names no import path.

A method is registered through the entry-point group ``meristem.methods``. Listing names reads the sources of
their modules and imports nothing; torch is loaded when a method is built.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from meristem.errors import BadInput
from meristem.methods.base import Method

GROUP = "meristem.methods"


def available() -> dict[str, str]:
    """Every registered method with the first line of its docstring, by name."""
    return {name: _description(entry) for name, entry in sorted(_entries().items())}


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
    """Builds the method of a command-line ``NAME[:key=value,...]``, e.g. ``ewc:strength=50,gamma=0.9``."""
    name, _, rest = text.strip().partition(":")
    arguments: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise BadInput(f"method {text!r}: {part!r} is not key=value")
        if key in arguments:
            raise BadInput(f"method {text!r}: {key!r} is given twice")
        arguments[key] = _value(value.strip())
    return build(name.strip(), arguments)


def load(name: str) -> type[Method]:
    """The class registered as ``name``."""
    entries = _entries()
    if name not in entries:
        raise BadInput(f"there is no method {name!r}: {_nearest(name, sorted(entries))}")
    try:
        found = entries[name].load()
    except (ImportError, AttributeError) as error:
        raise BadInput(
            f"method {name!r} cannot be loaded: {_one_line(error)}; install meristem[train]"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise BadInput(f"method {name!r} ({entries[name].value}) is not a meristem Method")
    return found


def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in found and found[entry.name].value != entry.value:
            raise BadInput(
                f"two packages register the method {entry.name!r} "
                f"({found[entry.name].value} and {entry.value}): uninstall one"
            )
        found[entry.name] = entry
    return found


@cache
def _description(entry: EntryPoint) -> str:
    """The first docstring line of the class, read from its source so that nothing is imported."""
    try:
        source = _source_of(entry.module)
        tree = ast.parse(source.read_text(encoding="utf-8")) if source else None
    except (OSError, SyntaxError, UnicodeDecodeError):
        tree = None
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def _source_of(module: str) -> Path | None:
    """The file of ``module``; only its top package is imported, and the rest is found by path."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec and rest else ():
        for candidate in (Path(place, *rest).with_suffix(".py"), Path(place, *rest, "__init__.py")):
            if candidate.is_file():
                return candidate
    return Path(spec.origin) if spec and spec.origin and not rest else None


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
