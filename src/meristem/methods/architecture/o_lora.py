"""O-LoRA: one LoRA per task, the new one orthogonal to the frozen old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meristem.errors import BadInput
from meristem.methods.architecture._lora import draw_of, grow, plain_lora
from meristem.methods.base import Context, Method, MethodState, Params, trainable


class OLoRA(Method):
    """Learns each task in a LoRA of its own, held orthogonal to those of earlier tasks, which are frozen.

    penalty = strength * sum over layers, over i < t, of sum_jk |(A_i A_t^T)_jk|,    A_i (r_i, d_in)

    once per optimizer step. The released code has these absolute values where the paper prints squares, and adds
    the term once per micro-batch; its second term (an L2 norm of the new LoRA) is left to weight decay.

    The LoRAs of all tasks are one plain PEFT adapter: A = [A_1; ...; A_t] and B = [B_1, ..., B_t], so that
    B A = sum_i B_i A_i, and alpha grows with the rank, so that alpha / r stays. ``prepare_model`` appends the new
    rows of A, drawn as PEFT draws them, and columns of B, zero. The gradient of the old ones is zeroed before
    clipping and their values are put back after every step, whatever momentum and weight decay did. A second
    adapter, folded in at the end, would not survive a kill: Hugging Face resumes only the first active adapter of
    a checkpoint, and the version would be two until the end.

    Without saved state, an adapter that already changes the model (some B is not zero) counts as one old LoRA.
    ``rank``: of each LoRA after the first (default: as the first).

    Source: Wang et al. 2023, arXiv 2310.14152. Claims: less forgetting. Stages: cpt, cit. State: the rank of
    each LoRA; the adapter itself grows by one LoRA per task, and the cost of a step with it.
    """

    name = "o-lora"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit"})
    replaces_architecture = True
    weight_state = True
    weight_copies = 1
    grows = "one LoRA"
    sharded = False

    def __init__(self, strength: float = 0.5, rank: int | None = None) -> None:
        if not isinstance(strength, int | float) or not 0 <= strength < float("inf"):
            raise BadInput(f"o-lora: strength={strength!r} must be a finite number, 0 or more")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise BadInput(f"o-lora: rank={rank!r} must be a whole number, 1 or more")
        self.strength, self.rank = float(strength), rank
        self.ranks: list[int] = []  # of the LoRAs that are learned
        self.frozen, self.new = 0, 0  # in the present training: rank of all old LoRAs, rank of the new one
        self.old: dict[str, Tensor] = {}  # the frozen part of each parameter

    def prepare_model(self, model: Any, ctx: Context) -> None:
        adapter, layers = plain_lora(self.name, model)
        found = int(layers[0].r[adapter])
        if not self.ranks and any(bool(layer.lora_B[adapter].weight.any()) for layer in layers):
            self.ranks = [found]
        if self.ranks and sum(self.ranks) != found:
            raise BadInput(
                f"o-lora: the saved state is for an adapter of rank {sum(self.ranks)}, this one has {found}: "
                "start from the version that the state came with"
            )
        self.frozen, self.new = sum(self.ranks), (self.rank or self.ranks[0]) if self.ranks else found
        if not self.frozen:
            return
        config = model.peft_config[adapter]
        alpha, rest = divmod(config.lora_alpha * (found + self.new), found)
        if rest:
            raise BadInput(
                f"o-lora: rank={self.new} would need a broken alpha to keep alpha / r = "
                f"{config.lora_alpha}/{found}: choose another rank"
            )
        self.old = {n: _old(n, p.detach(), found).clone() for n, p in trainable(model).items()}
        config.r, config.lora_alpha = found + self.new, int(alpha)
        draw = draw_of(ctx)
        for layer in layers:
            layer.r[adapter], layer.lora_alpha[adapter] = config.r, config.lora_alpha
            grow(layer.lora_A[adapter], layer.lora_B[adapter], self.new, draw)

    def penalty(self, params: Params) -> Tensor:
        terms = [_overlap(p, self.frozen) for name, p in params.items() if ".lora_A." in name]
        return self.strength * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def gradients(self, params: Params) -> None:
        for name in self.old:
            if (grad := params[name].grad) is not None:
                _old(name, grad, self.frozen).zero_()

    def weights(self, params: Params, before: Mapping[str, Tensor] | None) -> None:
        for name, old in self.old.items():
            _old(name, params[name], self.frozen).copy_(old)

    def finish(self, ctx: Context) -> None:
        if sum(self.ranks) == self.frozen:  # else trained on after it was finished
            self.ranks.append(self.new)

    def state_dict(self) -> MethodState:
        return {"tensors": {}, "json": {"ranks": list(self.ranks)}}

    def load_state_dict(self, state: MethodState) -> None:
        self.ranks = list(state["json"]["ranks"])


def _old(name: str, value: Tensor, rank: int) -> Tensor:
    """The part of a LoRA tensor that belongs to old tasks: first rows of A (r, d_in), columns of B (d_out, r)."""
    return value[:rank] if ".lora_A." in name else value[:, :rank]


def _overlap(rows: Tensor, frozen: int) -> Tensor:
    """sum |A_old A_new^T| of one layer; the old rows get no gradient."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (rows[:frozen].detach() @ rows[frozen:].T).abs().sum()
