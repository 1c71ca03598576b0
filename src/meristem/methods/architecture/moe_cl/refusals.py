"""What an update must have in common with the experts that are there already, or be refused before it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from meristem.errors import BadInput
from meristem.experts_format import ExpertEntry
from meristem.methods.architecture.experts import Expert
from meristem.methods.architecture.gates import Kind
from meristem.methods.architecture.moe_cl.codes import CodeStatistics
from meristem.methods.architecture.task_experts import kind_of


def another_base(old: Sequence[Expert], known: str | None, found: str | None) -> None:
    """Digests of the base; None where it is not known."""
    if known is not None and found is not None and found != known:
        raise BadInput(
            f"moe-cl: the experts of {_named(old)} were trained on another base ({known[:19]}, this one is {found[:19]}): "
            "use that base, or begin anew"
        )


def another_depth(old: Sequence[Expert], known: int | None, depth: int) -> None:
    """Prototypes that cannot be compared with that of the new task."""
    if old and known is not None and known != depth:
        raise BadInput(
            f"moe-cl: depth={depth}, and the prototypes of {_named(old)} were made at depth {known}: give depth={known}"
        )


def other_gates(old: Sequence[Expert], gate: Kind) -> None:
    wanted = "token" if gate == "token" else "static"
    for expert in old:
        if (kind := kind_of(expert)) != wanted:
            known = "those of preset=published" if kind is None else f"{kind} gates"
            remedy = "preset=published" if kind is None else f"gate={kind}"
            raise BadInput(
                f"moe-cl: gate={gate!r} does not go with what the expert of task {expert.about.task!r} has, {known}: "
                f"give {remedy}"
            )


def statistics_of(old: Sequence[Expert], tensors: Mapping[str, Tensor]) -> list[CodeStatistics]:
    """Those of the tasks of ``old``, one of each."""
    found: list[CodeStatistics] = []
    for at, expert in enumerate(old):
        if (one := CodeStatistics.of(tensors, at)) is None:
            raise BadInput(
                f"moe-cl: no statistics of task {expert.about.task!r} came with its expert, so the shared expert cannot "
                "be kept from forgetting it: give the method_state of the update that made the version"
            )
        found.append(one)
    return found


def another_shape(about: ExpertEntry, wanted: ExpertEntry, gate_sum: float) -> None:
    if (about.rank, about.alpha) != (wanted.rank, wanted.alpha):
        raise BadInput(
            f"moe-cl: rank {about.rank}, alpha {about.alpha} do not go with the stored experts, which share one of "
            f"rank {wanted.rank}, alpha {wanted.alpha}: give the LoRA theirs"
        )
    if gate_sum != (wanted.gate_sum or 1):
        raise BadInput(
            f"moe-cl: gate_sum={gate_sum:g} does not go with the stored experts, whose gates sum to "
            f"{wanted.gate_sum or 1:g}: give gate_sum={wanted.gate_sum or 1:g}"
        )
    if odd := sorted(set(about.targets) ^ set(wanted.targets)):
        raise BadInput(
            f"moe-cl: {odd[0]} has an expert only here or only in the stored set: adapt the same layers"
        )


def _named(old: Sequence[Expert]) -> str:
    return ", ".join(expert.about.task for expert in old)
