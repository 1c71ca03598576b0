"""MoE-CL as its paper has it: experts of whole FFNs, one gate for all tasks, a reversed gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from meristem.errors import BadInput, Clash
from meristem.experts_format import Document, ExpertEntry, ffn_gate_names
from meristem.methods.architecture.experts import Expert, Newest, detach
from meristem.methods.architecture.moe_cl.ffn_modules import PROJECTIONS, ffn_modules
from meristem.methods.architecture.moe_cl.ffn_runtime import FfnExperts
from meristem.methods.architecture.moe_cl.method import MoECL
from meristem.methods.architecture.moe_cl.published_adversary import Discriminators
from meristem.methods.architecture.prototypes import Prototype
from meristem.methods.architecture.task_experts import TaskExperts, Training, kept
from meristem.methods.base import Context, MethodState, Step

SPREAD = 0.02  # standard deviation that gates and discriminators are drawn with


class PublishedMoECL(MoECL):
    """``MoECL(preset="published")``: the paper's equations in every MLP (``ffn_math``, ``published_adversary``).

        y = g_0 E_0(x) + g_t E_t(x),  [g_0, g_t] = softmax(W_g x)          L = L_task - ``adversary`` * L_aux

    W_g (2, width) of each MLP and its discriminator (K, width) serve all tasks and go on learning with each, as the
    shared expert does: none of them is protected. K is ``tasks``, fixed beforehand in the paper; here a task beyond it
    adds a row, drawn as the first ones. ``softmax_twice``: as the authors' program has it (``Discriminators``).

    Not as published: trained to generate answers, not to classify by heads; and a router in place of the task's id,
    unless rows are pinned to a task. An expert is no plain LoRA, so a version is served by Meristem alone;
    ``distill`` makes LoRAs that come near.
    """

    _gates_before: Mapping[str, Tensor] = MappingProxyType({})  # as earlier updates left them
    _heads_before: Mapping[str, Tensor] = MappingProxyType({})
    _gates_now: Mapping[str, nn.Parameter] = MappingProxyType({})
    _heads: Mapping[str, nn.Parameter] = MappingProxyType({})
    _game: Discriminators | None = None

    # ---- hooks ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_model(self, model: Any, ctx: Context) -> None:
        detach(model)  # its gates and discriminators are no part of the base, which is to be recognised
        super().prepare_model(model, ctx)

    def loss(self, step: Step) -> Tensor | None:
        """-``adversary`` * L_aux on the batch."""
        self.new = None  # trained on after it was finished
        if self._game is None:
            return None
        rows, newest = len(step.inputs["input_ids"]), len(self.old)
        number = {task: at for at, expert in enumerate(self.old) for task in expert.tasks}
        tasks = [number.get(task, newest) for task in step.tasks] or [newest] * rows
        return self._game.loss(torch.tensor(tasks, device=step.inputs["input_ids"].device))

    def finish(self, ctx: Context) -> None:
        self._keep_experts()

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> MethodState:
        found = self._served(self.learned_experts)
        tensors = found["tensors"]
        now = self._heads if self.new is not None else {}  # none either in an update without adversary
        tensors |= _named("discriminators", now or self._heads_before)
        if self.new is None and self._training is not None:
            assert self.vector is not None
            tensors["vector"] = kept(self.vector)
            tensors |= _named("training.gates", self._gates_now) | _named(
                "training.discriminators", self._heads
            )
        return found

    @torch.no_grad()
    def load_state_dict(self, state: MethodState) -> None:
        TaskExperts.load_state_dict(self, state)
        tensors = state["tensors"]
        if self._training is not None:  # of a checkpoint
            for prefix, parameters in (("gates", self._gates_now), ("discriminators", self._heads)):
                for name, parameter in parameters.items():
                    training = tensors.get(f"training.{prefix}.{name}")
                    parameter.copy_(tensors[f"{prefix}.{name}"] if training is None else training)
            return
        self._take_common(state)
        if self.before is None:
            return
        names = ffn_gate_names(self.before.about)
        if lacking := next((name for name in names.values() if name not in tensors), None):
            raise BadInput(
                f"moe-cl: {lacking} did not come with the experts, which are those of another preset: go on with that"
            )
        self._gates_before = {ffn: tensors[name] for ffn, name in names.items()}
        self._heads_before = {
            ffn: tensors[f"discriminators.{ffn}"] for ffn in names if f"discriminators.{ffn}" in tensors
        }
        if self.weight and not self._heads_before:
            raise BadInput(
                "moe-cl: no discriminators came with the experts: give the method_state of the update that made them"
            )

    def _document(self, found: list[Expert]) -> Document:
        assert self.after is not None
        experts = [expert.about for expert in found]
        return Document(
            method=self.name, router=self.router(), experts=experts, shared=self.after.about, gates="ffn"
        )

    def _served(self, found: list[Expert]) -> MethodState:
        state = super()._served(found)
        state["tensors"] |= _named("gates", self._gates_now if self.new is not None else self._gates_before)
        return state

    # ---- parts ---------------------------------------------------------------------------------------------

    def _start(self, model: Any, about: ExpertEntry, newest: Newest, draw: torch.Generator) -> Training:
        ffns = ffn_modules(model.get_base_model())
        wanted = {f"{name}.{part}" for name in ffns for part in PROJECTIONS}
        if odd := sorted(wanted ^ set(about.targets)):
            raise Clash(
                f"moe-cl: experts of whole FFNs are a LoRA on {', '.join(PROJECTIONS)} of every block and on nothing "
                f"else, unlike {odd[0]} here: target_modules={[*PROJECTIONS]}"
            )
        model, about, newest = super()._start(model, about, newest, draw)
        some = newest.layers[about.targets[0]].lora_A[newest.adapter].weight
        exact = torch.promote_types(some.dtype, torch.float32)
        count = max(self.tasks, len(self.old) + 1)
        gates, heads = {}, {}
        for name in ffns:
            width = newest.layers[f"{name}.gate_proj"].in_features
            gate, head = self._gates_before.get(name), self._heads_before.get(name)
            gate = _drawn(2, width, draw) if gate is None else gate
            head = _drawn(0, width, draw) if head is None else head
            more = _drawn(max(count - len(head), 0), width, draw)
            gates[name] = nn.Parameter(gate.to(some.device, exact, copy=True))
            heads[name] = nn.Parameter(torch.cat([head, more.to(head)]).to(some.device, exact))
        self._gates_now, self._heads = gates, heads if self.weight else {}
        return model, about, replace(newest, gates=None, observe=None)

    def _attach(self) -> None:
        assert self._training is not None
        model, _, newest = self._training
        self.experts = FfnExperts(
            model,
            self.router(),
            self.old,
            newest,
            self.newest_alone,
            self.before,
            gates=self._gates_now,
            gates_before=self._gates_before,
        )
        if self.weight:
            self._game = Discriminators(self.experts.mixtures, self._heads, self.weight, self.softmax_twice)

    def _oppose(self, ctx: Context) -> None:
        pass  # the adversary is there from the first task on

    def _begin(self, prototype: Prototype, known: Sequence[Prototype]) -> None:
        pass  # a fresh expert for every task

    def _held(self) -> list[Tensor]:
        return []


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": kept(value) for name, value in tensors.items()}


def _drawn(rows: int, width: int, draw: torch.Generator) -> Tensor:
    return SPREAD * torch.randn(rows, width, generator=draw)
