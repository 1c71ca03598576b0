"""Learning, accumulation, ensemble: a fast adapter learns, a slow one averages it, both answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meristem.errors import BadInput
from meristem.methods._weights import check_fits, named, snapshot, taken
from meristem.methods.base import Context, Method, MethodState, Params, trainable

SERVED = ("mean", "offline")


class LAE(Method):
    """A fast (online) set of weights learns the task; a slow (offline) one is its moving average and remembers.

    After each optimizer step, for each trainable parameter of any shape,

        offline <- decay offline + (1 - decay) online

    from the second task on: the first one ends with offline = online, as in the authors' code. (A lineage with
    earlier tasks in its history but no state of this method starts with offline = the weights it has.) The next
    update goes on from *online*, which is in the state, not from what the version serves. Where the version does not
    hold what this method served, an update without it came in between, which neither online nor offline know: both
    start anew from the version's weights, so that nothing that it learned is taken back.

    What differs from the paper. (1) *Ensemble*: the paper runs both experts on each input and takes the larger
    of their probabilities. A version is one plain adapter here, so it gets a stand-in in weight space:
    ``serve="mean"``, (online + offline) / 2, or ``"offline"`` alone. For LoRA the factors A and B are averaged,
    as the paper's moving average does too, which is not the average of the products BA. (2) *Learning*: the
    paper freezes the adapter for the first epochs of a task while a new classifier settles, and calibrates
    kinds of adapters to one speed. A language model has no new head and a recipe its own learning rate: both
    are left out. (3) The paper's decay of 0.9999 is for many thousands of steps a task; an update of S steps
    moves offline by 1 - decay^S of the way to online, so that short updates need a smaller one.

    While training the model holds online; ``finish`` puts the served weights into it, after other methods: those see
    online throughout, a teacher or a Fisher from history included. Not with sharded weights.

    Source: Gao et al. 2023 (arXiv 2303.10070, ICCV). Claims: less forgetting. Stages: cpt, cit, ca. State:
    ``online.*`` and ``offline.*`` (fp32), twice the trainable parameters, whatever the number of tasks.
    """

    name = "lae"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit", "ca"})
    weight_copies = 1
    weight_state = True
    serves_other_weights = True
    sharded = False

    def __init__(self, decay: float = 0.99, serve: str = "mean") -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise BadInput(f"lae: decay={decay!r} must be in [0, 1)")
        if serve not in SERVED:
            raise BadInput(f"lae: serve={serve!r} must be one of {', '.join(SERVED)}")
        self.decay, self.serve = float(decay), serve
        self.served = self.serve  # of the last update, which may have been told otherwise
        self.online: dict[str, Tensor] = {}  # empty during training: the model holds them
        self.offline: dict[str, Tensor] = {}  # empty before and during the first task

    @torch.no_grad()
    def prepare_model(self, model: nn.Module, ctx: Context) -> None:
        params = trainable(model)
        check_fits(self.name, self.online, params)
        check_fits(self.name, self.offline, params)
        others_since = any(not _holds(params[name], value) for name, value in self._served().items())
        for name, value in {} if others_since else self.online.items():
            params[name].copy_(value)
        if others_since or (not self.offline and any(len(rows) for rows in ctx.history.values())):
            self.offline = _exact(params)
        self.online = {}

    def weights(self, params: Params, before: Mapping[str, Tensor] | None) -> None:
        for name, value in self.offline.items():
            online = params[name]
            self.offline[name] = value.to(online.device).lerp_(online.to(value.dtype), 1 - self.decay)

    @torch.no_grad()
    def finish(self, ctx: Context) -> None:
        params = trainable(ctx.model)
        self.online = snapshot(params)
        self.offline = self.offline or _exact(params)
        self.served = self.serve
        for name, value in self._served().items():
            params[name].copy_(value)

    def _served(self) -> dict[str, Tensor]:
        """What the version of the last update serves; empty while one is under way."""
        if self.served == "offline":
            return {name: self.offline[name] for name in self.online}
        return {
            name: torch.lerp(self.offline[name].to(p.device), p.to(self.offline[name].dtype), 0.5)
            for name, p in self.online.items()
        }

    def state_dict(self) -> MethodState:
        tensors = named("online", self.online) | named("offline", self.offline)
        return {"tensors": tensors, "json": {"served": self.served}}

    def load_state_dict(self, state: MethodState) -> None:
        self.online = taken("online", state["tensors"])
        self.offline = taken("offline", state["tensors"])
        self.served = state["json"].get("served", self.serve)


def _exact(params: Params) -> dict[str, Tensor]:
    """A copy in at least fp32: the steps of a slow average are below what bf16 can hold."""
    return {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in params.items()
    }


def _holds(p: Tensor, value: Tensor) -> bool:
    """Whether ``p`` is ``value``, bit for bit, as it is or as a version in half precision keeps it."""
    value = value.to(p.device)
    kinds = (value.dtype, p.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(p, value.to(kind).to(p.dtype)) for kind in kinds)
