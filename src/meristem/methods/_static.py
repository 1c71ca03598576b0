"""Classes read from their sources, so that methods can be listed where torch is not installed."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any


def chain(module: str, name: str) -> list[ast.ClassDef]:
    """The class and its bases, nearest first, as far as they can be read; [] when ``module`` has no such class."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            return [node, *(one for base in bases for one in chain(module, base))]
    for line in ast.walk(_tree(module)):  # an import under TYPE_CHECKING too: a package's public names
        if isinstance(line, ast.ImportFrom) and line.module and not line.level:
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return chain(line.module, alias.name)
    return []


def assigned(node: ast.ClassDef) -> dict[str, ast.expr]:
    """The class's own attributes, unevaluated."""
    found: dict[str, ast.expr] = {}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            found[line.target.id] = line.value
        elif isinstance(line, ast.Assign):
            found |= {target.id: line.value for target in line.targets if isinstance(target, ast.Name)}
    return found


def literal(value: ast.expr) -> Any:
    """A literal, or a ``frozenset`` of one. Raises ``ValueError`` for what would have to be run."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "frozenset":
        return frozenset(ast.literal_eval(value.args[0]) if value.args else ())
    return ast.literal_eval(value)


def source_of(module: str) -> Path | None:
    """The file of ``module``; only its top package is imported, and the rest is found by path."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec and rest else ():
        for candidate in (Path(place, *rest).with_suffix(".py"), Path(place, *rest, "__init__.py")):
            if candidate.is_file():
                return candidate
    return Path(spec.origin) if spec and spec.origin and not rest else None


@cache
def _tree(module: str) -> ast.Module:
    try:
        source = source_of(module)
        return ast.parse(source.read_text(encoding="utf-8") if source else "")
    except (OSError, SyntaxError, UnicodeDecodeError, ImportError):
        return ast.Module([], [])
