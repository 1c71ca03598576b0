"""What helps to choose a method, as its class declares it (see ``Method``); read without importing torch."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from typing import Any

from meristem.errors import BadInput
from meristem.methods import _static
from meristem.methods.base import HOOKS
from meristem.methods.registry import available, entry, load
from meristem.methods.trainers import KNOWN, Kind

DECLARED = (
    "claims",
    "stages",
    "old_data",
    "task_id",
    "weight_copies",
    "grows",
    "sharded",
    "needs",
    "alone",
    "fresh_adapter",
)
TRAINERS = ("Trainer", "SFTTrainer", "DPOTrainer", "RewardTrainer", "GRPOTrainer", "DistillationTrainer")
"""Those of ``trainers.KNOWN`` that every method is tested on."""


@dataclass(frozen=True)
class Facts:
    """``about`` is the first line of the docstring, ``hooks`` those that the class has of its own; the others: ``Method``."""

    about: str
    hooks: tuple[str, ...]
    claims: tuple[str, ...]
    stages: frozenset[str]
    old_data: str
    task_id: str
    weight_copies: int
    grows: str
    sharded: bool
    needs: frozenset[str]
    alone: bool
    fresh_adapter: bool

    @property
    def trainers(self) -> list[str]:
        """Names out of ``TRAINERS`` that it attaches to."""
        return [name for name in TRAINERS if self._fits(KNOWN[name])]

    def _fits(self, kind: Kind) -> bool:
        return (
            (kind.stages is None or bool(self.stages & kind.stages))
            and self.needs <= kind.offers
            and not ("around" in self.hooks and kind.generates)
        )

    def to_document(self) -> dict[str, Any]:
        fields = {key: sorted(v) if isinstance(v, frozenset) else v for key, v in asdict(self).items()}
        return {**fields, "trainers": self.trainers}


def facts(name: str) -> Facts:
    """Of the method registered as ``name``. Raises ``BadInput`` for an unknown one."""
    registered = entry(name)
    return _read(registered) or _loaded(name)


def all_facts() -> dict[str, Facts]:
    """By name, of every registered method that can be read or loaded."""
    return listed()[0]


def listed() -> tuple[dict[str, Facts], dict[str, str]]:
    """``all_facts``, and of the methods that cannot be loaded the reason, by name."""
    found: dict[str, Facts] = {}
    broken: dict[str, str] = {}
    for name in available():
        try:
            found[name] = facts(name)
        except BadInput as error:
            broken[name] = str(error)
    return found, broken


def _read(registered: EntryPoint) -> Facts | None:
    """From the sources; None when they cannot be read down to ``Method``, or say something that must be run."""
    classes = _static.chain(registered.module, registered.attr)
    if not classes or classes[-1].name != "Method":
        return None
    values: dict[str, Any] = {}
    try:
        for one in classes:
            own = _static.assigned(one)
            values |= {key: _static.literal(own[key]) for key in DECLARED if key in own and key not in values}
    except ValueError:
        return None
    written = {f.name for one in classes[:-1] for f in one.body if isinstance(f, ast.FunctionDef)}
    about = (ast.get_docstring(classes[0]) or "").partition("\n")[0]
    return Facts(about=about, hooks=tuple(hook for hook in HOOKS if hook in written), **values)


def _loaded(name: str) -> Facts:
    found = load(name)
    about = (found.__doc__ or "").strip().partition("\n")[0]
    hooks = tuple(hook for hook in HOOKS if found.overrides(hook))
    return Facts(about=about, hooks=hooks, **{key: getattr(found, key) for key in DECLARED})
