"""What ``MoECL`` can be built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meristem.errors import BadInput

_WORDS = {
    "preset": ("default", "published"),
    "gate": ("static", "token", "shared-only", "task-only"),
    "start": ("fresh", "previous", "nearest"),
    "routing": ("top-1", "softmax"),
}
_LEAST = {
    "temperature": 1e-9,
    "adversary": 0.0,
    "protect": 0.0,
    "discriminator_rate": 1e-9,
    "gate_rate": 1e-9,
    "gate_sum": 1e-9,
}
_FEWEST = {"discriminator_steps": 1, "statistics": 1, "depth": 0, "tasks": 1}
_SWITCHES = ("freeze_shared_input", "softmax_twice")
_OF_ONE_PRESET = {
    "default": [
        *("gate", "protect", "freeze_shared_input", "start", "discriminator_rate", "discriminator_steps"),
        *("gate_rate", "gate_sum", "statistics", "routing", "temperature"),
    ],
    "published": ["softmax_twice", "tasks"],
}


def check(given: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """``BadInput`` for a value out of its range, and for one that differs from ``usual`` where the preset has no use for it."""
    for name, words in _WORDS.items():
        if given[name] not in words:
            raise BadInput(f"moe-cl: {name}={given[name]!r} must be {', '.join(words[:-1])} or {words[-1]}")
    unknown = given["unknown"]
    if unknown is not None and (not _is_number(unknown) or not 0 < unknown <= 1):
        raise BadInput(f"moe-cl: unknown={unknown!r} must be a share of a task's prompts, above 0, or none")
    for name, least in _LEAST.items():
        value = given[name]
        if not _is_number(value) or not least <= value < float("inf"):
            raise BadInput(f"moe-cl: {name}={value!r} must be a finite number, {least:g} or more")
    for name in _SWITCHES:
        if not isinstance(given[name], bool):
            raise BadInput(f"moe-cl: {name}={given[name]!r} must be true or false")
    for name, fewest in _FEWEST.items():
        count = given[name]
        if not isinstance(count, int) or isinstance(count, bool) or count < fewest:
            raise BadInput(f"moe-cl: {name}={count!r} must be a whole number, {fewest} or more")
    for preset, names in _OF_ONE_PRESET.items():
        if preset != given["preset"] and (idle := [name for name in names if given[name] != usual[name]]):
            raise BadInput(
                f"moe-cl: {idle[0]}={given[idle[0]]!r} has no part in preset={given['preset']}: leave it out"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
