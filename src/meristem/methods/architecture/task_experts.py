"""What methods share that keep one frozen LoRA per task (``param-isolation``, ``mocl``)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from meristem.errors import BadInput
from meristem.experts_format import (
    CONFIG,
    WEIGHTS,
    Document,
    ExpertEntry,
    GateKind,
    RouterEntry,
    factor_name,
    gate_names,
    residuals_name,
    vector_name,
)
from meristem.methods.architecture._lora import draw_of, fresh_rows, plain_lora
from meristem.methods.architecture.experts import Expert, Experts, Newest, detach
from meristem.methods.architecture.routing import features, prompt_mask
from meristem.methods.base import Batch, Context, Method, MethodState

Training = tuple[Any, ExpertEntry, Newest]  # the model, and of the expert in training what is known of it


class TaskExperts(Method):
    """Each update trains a fresh LoRA, its task's expert; those of earlier tasks are frozen, and stay to the bit.

    A subclass says how rows are weighed (:meth:`router`) and may learn the vector. ``samples``: rows of the task
    that its vector is taken from. The version is of kind ``experts``, and the model routes by itself after training.
    """

    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit"})
    columns = frozenset({"task"})  # rows are routed one by one: packing, which drops this, is refused
    replaces_architecture = True
    fresh_adapter = True
    task_id = "training"  # one name per update
    grows = "one LoRA and one vector"
    sharded = False
    needs = frozenset({"likelihood"})
    content = "experts"
    newest_alone = False
    learned = False
    before: Expert | None = None  # the shared expert of earlier updates, where there is one

    def __init__(self, samples: int) -> None:
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise BadInput(f"{self.name}: samples={samples!r} must be a whole number of rows, 1 or more")
        self.samples = samples
        self.old: list[Expert] = []
        self.new: Expert | None = None  # once it is learned
        self.vector: Tensor | None = None  # of the expert in training
        self.experts: Experts | None = None
        self._training: Training | None = None

    @abstractmethod
    def router(self) -> RouterEntry: ...

    # ---- hooks ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_model(self, model: Any, ctx: Context) -> None:
        known = {task for expert in self.old for task in expert.tasks}
        if again := sorted(known & set(ctx.task.split("+"))):
            raise BadInput(
                f"{self.name}: there is an expert of task {again[0]!r} already (of {', '.join(sorted(known))}), and it "
                "stays as it is: give the new rows another task name (task= of the trainer)"
            )
        detach(model)  # what the update before this one left on a model that is trained on
        adapter, layers = plain_lora(self.name, model)
        named = {n: m for n, m in model.get_base_model().named_modules() if any(m is each for each in layers)}
        rank, alpha = int(layers[0].r[adapter]), layers[0].lora_alpha[adapter]
        about = ExpertEntry(task=ctx.task, rank=rank, alpha=alpha, targets=list(named))
        self.vector = self._vector_of(ctx)
        if self.learned:
            self.vector = nn.Parameter(self.vector)
        self._training = self._start(model, about, Newest(adapter, named, self.vector), draw_of(ctx))
        self._attach()

    def batch(self, inputs: Batch) -> AbstractContextManager[Any]:
        return self.experts.batch(inputs) if self.experts is not None else nullcontext()

    @torch.no_grad()
    def finish(self, ctx: Context) -> None:
        assert self._training is not None and self.vector is not None
        _, about, newest = self._training
        factors = {
            name: (kept(layer.lora_A[newest.adapter].weight), kept(layer.lora_B[newest.adapter].weight))
            for name, layer in newest.layers.items()
        }
        self.new = Expert(about, factors, kept(self.vector))

    # ---- state ---------------------------------------------------------------------------------------------

    @property
    def learned_experts(self) -> list[Expert]:
        return [*self.old, *([self.new] if self.new is not None else [])]

    def state_dict(self) -> MethodState:
        state = state_of(self.learned_experts)
        if self.new is None and self.vector is not None:
            state["tensors"]["vector"] = kept(self.vector)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: MethodState) -> None:
        found, self.new = {expert.about.task: expert for expert in experts_in(state)}, None
        if self._training is None:
            self.old = list(found.values())
            return
        # Of a checkpoint, into the model that is there already. It holds the expert in training too where it was
        # written by a trainer that was trained on after it had finished.
        assert self.vector is not None
        unfinished = found.pop(self._training[1].task, None)
        self.vector.copy_(unfinished.vector if unfinished else state["tensors"]["vector"])
        self.old = list(found.values())
        self._attach()

    def save(self, folder: Path) -> None:
        found = self.learned_experts
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_bytes(self._document(found).body())
        save_file(self._served(found)["tensors"], folder / WEIGHTS)

    def _document(self, found: list[Expert]) -> Document:
        return Document(method=self.name, router=self.router(), experts=[e.about for e in found])

    def _served(self, found: list[Expert]) -> MethodState:
        return state_of(found)

    # ---- parts ---------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        assert self._training is not None
        model, _, newest = self._training
        self.experts = Experts(model, self.router(), self.old, newest, self.newest_alone, self.before)

    def _start(self, model: Any, about: ExpertEntry, newest: Newest, draw: torch.Generator) -> Training:
        """After the first task a LoRA drawn anew, the same whether the model comes fresh or from the last update."""
        adapter = newest.adapter
        for name, layer in newest.layers.items():
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            last = self.old[-1].factors.get(name) if self.old else None
            if up.any() and (last is None or not torch.equal(up.cpu(), last[1])):
                raise BadInput(
                    f"{self.name}: the adapter changes the model already, and no expert is that adapter: start from a "
                    "version without one, or give method_state of the update that made it"
                )
            if self.old:
                down.copy_(fresh_rows(len(down), down.shape[1], draw))
                up.zero_()
        return model, about, newest

    def _vector_of(self, ctx: Context) -> Tensor:
        """(width): the direction of the mean of the rows' unit features, whose mean cosine to them is the largest."""
        return normalize(
            normalize(features(ctx.model.get_base_model(), self._prompts(ctx)), dim=-1).mean(0), dim=0
        )

    def _prompts(self, ctx: Context) -> list[Tensor]:
        """Token ids of the prompts of ``samples`` rows of the task."""
        found: list[Tensor] = []
        for batch in ctx.batches(batch_size=8, limit=self.samples):
            mask = prompt_mask(batch)
            assert mask is not None
            found += [ids[keep] for ids, keep in zip(batch["input_ids"], mask, strict=True)]
        if not found:
            raise BadInput(f"{self.name}: no row has completion tokens to learn from; raise max_length")
        return found


def kept(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def state_of(experts: Sequence[Expert], shared: Expert | None = None) -> MethodState:
    """What a version of experts holds: ``experts_format`` says the names."""
    tensors: dict[str, Tensor] = {}
    owners: list[tuple[int | None, Expert]] = list(enumerate(experts))
    for at, expert in [*owners, *([(None, shared)] if shared is not None else [])]:
        for name, pair in expert.factors.items():
            tensors |= {factor_name(at, name, f): value.clone() for f, value in zip("AB", pair, strict=True)}
    for at, expert in enumerate(experts):
        tensors[vector_name(at)] = expert.vector.clone()
        if expert.residuals is not None:
            tensors[residuals_name(at)] = expert.residuals.clone()
        if expert.gates is not None:
            gates = [expert.gates[name] for name in expert.about.targets]
            names = gate_names(at, expert.about, kind_of(expert))
            tensors |= zip(names, [torch.stack(gates)] if len(names) < len(gates) else gates, strict=True)
    json: dict[str, Any] = {"experts": [expert.about.model_dump() for expert in experts]}
    if shared is not None:
        json |= {"shared": shared.about.model_dump()}
    return {"tensors": tensors, "json": json}


def kind_of(expert: Expert) -> GateKind | None:
    if expert.gates is None:
        return None
    return "static" if next(iter(expert.gates.values())).dim() == 1 else "token"


def experts_in(state: MethodState) -> list[Expert]:
    """The experts that ``state_of`` gave."""
    tensors, found = state["tensors"], []
    for at, fields in enumerate(state["json"]["experts"]):
        about = ExpertEntry.model_validate(fields)
        gates = None
        if (stacked := tensors.get(*gate_names(at, about, "static"))) is not None:
            if stacked.dim() != 2 or len(stacked) != len(about.targets):
                raise BadInput(
                    f"the gates of task {about.task!r} are {tuple(stacked.shape)} for {len(about.targets)} layers: give "
                    "the method_state, or the version, as it was saved"
                )
            gates = dict(zip(about.targets, stacked, strict=True))
        elif f"gates.{at}.{about.targets[0]}" in tensors:
            gates = {n: tensors[f"gates.{at}.{n}"] for n in about.targets}
        if (vector := tensors.get(vector_name(at))) is None:
            raise BadInput(
                f"no prototype of task {about.task!r} came with its expert: give the method_state as it was saved"
            )
        residuals = tensors.get(residuals_name(at))
        found.append(Expert(about, _factors(state, at, about), vector, gates, residuals))
    return found


def shared_in(state: MethodState) -> Expert | None:
    """The shared expert that ``state_of`` was given, if it was."""
    if "shared" not in state["json"]:
        return None
    about = ExpertEntry.model_validate(state["json"]["shared"])
    return Expert(about, _factors(state, None, about), torch.empty(0))


def _factors(state: MethodState, at: int | None, about: ExpertEntry) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = state["tensors"]
    return {n: (tensors[factor_name(at, n, "A")], tensors[factor_name(at, n, "B")]) for n in about.targets}
