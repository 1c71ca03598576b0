"""The experts of whole FFNs, routed like all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from meristem.errors import Clash
from meristem.experts_format import ExpertEntry, RouterEntry, ffn_gate_names
from meristem.methods.architecture.experts import Expert, Experts, Newest
from meristem.methods.architecture.moe_cl.ffn import FfnMixtures
from meristem.methods.architecture.moe_cl.ffn_experts import Before
from meristem.methods.base import MethodState


class FfnExperts(Experts):
    """``Experts`` whose rows are computed by ``FfnMixtures``; a row of no known task has the shared expert alone.

    ``gates``: full name of an MLP -> W_g (2, width) as it is, one for all tasks; ``gates_before``: as it was before the
    present training, where ``shared`` is from then too.
    """

    def __init__(
        self,
        model: Any,
        router: RouterEntry,
        frozen: Sequence[Expert],
        newest: Newest | None = None,
        newest_alone: bool = False,
        shared: Expert | None = None,
        *,
        gates: Mapping[str, Tensor],
        gates_before: Mapping[str, Tensor] | None = None,
    ) -> None:
        if router.mode != "top-1":
            raise Clash("experts of whole FFNs cannot be blended, an activation stands between: route top-1")
        super().__init__(model, router, frozen, newest, newest_alone, shared)
        before = None
        if newest is not None and shared is not None and gates_before is not None:
            before = Before(shared, gates_before)
        try:
            self.mixtures = FfnMixtures(
                model,
                gates,
                adapter=newest.adapter if newest is not None else None,
                shared=shared if newest is None else None,
                experts=frozen,
                before=before,
                router=self.present,
            )
        except BaseException:
            super().remove()
            raise

    def _attach_frozen(self, modules: Mapping[str, Any], names: Iterable[str]) -> None:
        pass  # in the mixtures

    def _attach_newest(self, newest: Newest) -> None:
        pass

    def remove(self) -> None:
        self.mixtures.remove()
        super().remove()

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        with super().batch(inputs), self.mixtures.batch():
            yield


def ffn_gates_in(state: MethodState) -> dict[str, Tensor]:
    """Full name of an MLP -> W_g, from what a version with gates of kind ``ffn`` holds."""
    entry = ExpertEntry.model_validate(state["json"]["shared"])
    return {ffn: state["tensors"][name] for ffn, name in ffn_gate_names(entry).items()}
