"""Gates: one release criterion each, judged on a paired comparison of champion and candidate.

A gate is registered by name through the entry-point group ``meristem.gates``; its fields are its arguments.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meristem.ecosystem.records import GateResult
from meristem.errors import BadInput

if TYPE_CHECKING:
    from meristem.evaluation.comparison import Comparison
    from meristem.evaluation.verdicts import Verdict

GROUP = "meristem.gates"


class Gate(BaseModel):
    """A criterion with its numbers. ``judge`` answers pass, fail or inconclusive, with the reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    def judge(self, comparison: Comparison) -> Verdict:
        raise NotImplementedError


class NonInferiority(Gate):
    """No worse than the champion by ``margin`` or more (score units, 0.05 = 5 points)."""

    margin: float = Field(ge=0, le=1)

    def judge(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import non_inferiority

        return non_inferiority(comparison, margin=self.margin, confidence=self.confidence)


class Improvement(Gate):
    """Better than the champion by more than ``min_gain`` (score units)."""

    min_gain: float = Field(default=0.0, ge=0, le=1)

    def judge(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import improvement

        return improvement(comparison, min_gain=self.min_gain, confidence=self.confidence)


class NegativeFlips(Gate):
    """At most ``max_rate`` of the items that the champion answers right and the candidate wrong."""

    max_rate: float = Field(ge=0, le=1)

    def judge(self, comparison: Comparison) -> Verdict:
        from meristem.evaluation.verdicts import negative_flips

        return negative_flips(comparison, max_rate=self.max_rate, confidence=self.confidence)


def build(name: str, arguments: dict[str, Any]) -> Gate:
    """The gate called ``name``. Raises ``BadInput`` for an unknown gate or argument."""
    known = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in known:
        raise BadInput(f"unknown gate '{name}'; gates here: {', '.join(sorted(known))}")
    try:
        gate = known[name].load()(**arguments)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise BadInput(f"gate {name}: {where}: {detail['msg'].lower()}") from error
    assert isinstance(gate, Gate)
    return gate


def judge(name: str, arguments: dict[str, Any], suite: str, comparison: Comparison) -> GateResult:
    verdict = build(name, arguments).judge(comparison)
    return GateResult(
        gate=name,
        suite=suite,
        outcome=verdict.outcome,
        reason=verdict.reason,
        numbers={**arguments, **verdict.numbers},
        needed=verdict.needed,
    )
