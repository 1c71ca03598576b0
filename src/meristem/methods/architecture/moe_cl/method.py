"""MoE-CL: a LoRA expert per task, a shared one that an adversary keeps free of task noise, and gates between them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from meristem.errors import BadInput
from meristem.experts_format import Document, ExpertEntry, RouterEntry
from meristem.methods.architecture._base import base_digest
from meristem.methods.architecture._lora import fresh_rows, grow
from meristem.methods.architecture.experts import Expert, Newest
from meristem.methods.architecture.gates import Gates, Kind
from meristem.methods.architecture.moe_cl import refusals
from meristem.methods.architecture.moe_cl.adversary import Adversary
from meristem.methods.architecture.moe_cl.arguments import check
from meristem.methods.architecture.moe_cl.codes import Anchor, CodeStatistics, Gatherer, row_means
from meristem.methods.architecture.prototypes import SHRINKAGE, Prototype, blocks_of, pool, summarise
from meristem.methods.architecture.task_experts import (
    TaskExperts,
    Training,
    experts_in,
    kept,
    kind_of,
    shared_in,
    state_of,
)
from meristem.methods.base import Context, MethodState, Params, Step

SHARED = "shared"  # what the shared expert's entry is called; no task


class MoECL(TaskExperts):
    """A LoRA expert per task that no later task touches, beside one shared expert that all tasks train.

    In each adapted layer, for a row of task t, r = rank, s = alpha / r:

        y = W x + g_s s B_0 A_0 x + g_t s B_t A_t x        [g_s, g_t] = gate_sum * softmax(theta_t), theta_t (2) of the layer
        loss = L_task + adversary * CE(uniform | D(h)),    h = B_0 z / rms, z (r) = mean over tokens of A_0 x
        penalty = protect * drift                          how far the shared expert's outputs on old tasks moved

    D, a linear discriminator per layer, learns in steps of its own to tell the tasks seen so far by the shared expert's
    output (``moe_cl.adversary``); old tasks are there by statistics of their codes A_0 x (``moe_cl.codes``), which
    also give the drift. A_0 is learned in the first task and stays (``freeze_shared_input``), so that they stay true.
    Expert, gates, statistics and prototype of a task never change again. Both experts are one PEFT adapter of rank
    2 r in training, A = [A_0; A_t], B = [B_0, B_t]; a task's version is exactly such a LoRA, its gates folded into B.

    Without a task id a router picks the expert by the prompt; a prompt of no known task is answered by the shared
    expert alone. Replayed rows of an old task train the shared expert through that task's own, frozen, expert.

    Differs from the paper, each by an argument: experts of every adapted projection, not of whole FFN outputs; gates per
    task and layer (``gate``), not per token from one matrix that all tasks train; old tasks are in the discriminator's
    game, which is played in alternating steps with plain cross-entropies (``adversary``, ``discriminator_rate``,
    ``discriminator_steps``) and reaches nothing but the shared expert of the same layer; the shared expert is protected
    (``protect``); answers are generated, not classified by heads.

    ``start``: of a new expert, the one whose task is nearest by the router's measure (or ``previous``), gates too, so that
    training goes on from what that task's rows are answered by, while its own expert stays; ``fresh`` as in the paper.
    ``gate``: ``static``; ``token`` (softmax(V x), V (2, d_in) per task and layer: no exact LoRA); for ablations
    ``shared-only`` and ``task-only``. ``gate_rate``: how far an optimizer's step moves static gates (``gates.Gates``).
    ``gate_sum``: what g_s and g_t sum to, a factor of the scale: 1 in the paper; with 2 each expert counts as a LoRA alone does.
    ``routing``, ``temperature``, ``depth``, ``unknown``: of the router (``prototypes``): one expert or a blend, by hidden
    states after ``depth`` blocks (all of a smaller model); outside that quantile of a task's own prompts a prompt is
    of no known task (None: never).
    ``preset``: ``published`` is the paper's own computation (``published.PublishedMoECL``), with ``softmax_twice`` and ``tasks``.
    ``statistics``: rows that a task's code statistics are taken from; ``samples``: that its prototype is.

    Source: Kang et al. 2025 (arXiv 2509.18133), from the equations. Claims: less forgetting. Stages: cpt, cit. State: for
    each task one expert, one gate per layer, one prototype, and code statistics of r (2 r + 1) numbers per layer.
    """

    name = "moe-cl"
    grows = "one LoRA, its gates and statistics"
    newest_alone = True
    weight_copies = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls is MoECL and kwargs.get("preset") == "published":
            from meristem.methods.architecture.moe_cl.published import PublishedMoECL

            cls = PublishedMoECL  # type: ignore[assignment]
        return super().__new__(cls, *args, **kwargs)

    def __init__(
        self,
        gate: Kind = "static",
        adversary: float = 0.1,
        protect: float = 1.0,
        freeze_shared_input: bool = True,
        start: Literal["fresh", "previous", "nearest"] = "nearest",
        discriminator_rate: float = 0.01,
        discriminator_steps: int = 1,
        gate_rate: float = 100.0,
        gate_sum: float = 2.0,
        statistics: int = 64,
        routing: Literal["top-1", "softmax"] = "top-1",
        temperature: float = 1.0,
        depth: int = 8,
        unknown: float | None = 0.98,
        samples: int = 512,
        *,
        preset: Literal["default", "published"] = "default",
        softmax_twice: bool = False,
        tasks: int = 4,
    ) -> None:
        parameters = inspect.signature(MoECL.__init__).parameters
        check(self._arguments, {name: each.default for name, each in parameters.items()})
        super().__init__(samples)
        self.gate, self.weight, self.protect = gate, float(adversary), float(protect)
        self.freeze_shared_input, self.start = bool(freeze_shared_input), start
        self.routing, self.temperature, self.depth, self.unknown = routing, float(temperature), depth, unknown
        self.rate, self.steps = float(discriminator_rate), discriminator_steps
        self.gate_rate, self.gate_sum = float(gate_rate), gate_sum if preset == "default" else 1.0
        self.rows_for_statistics = statistics
        self.softmax_twice, self.tasks = bool(softmax_twice), tasks
        self.base: str | None = None  # digest
        self.depth_before: int | None = None  # that the prototypes of ``old`` were made at
        self.before: Expert | None = None  # the shared expert as earlier updates left it
        self.after: Expert | None = None  # and as this one does
        self.statistics: list[CodeStatistics] = []  # of the tasks of ``old``, then of ``new``
        self.adversary: Adversary | None = None
        self.anchor: Anchor | None = None
        self._gatherer: Gatherer | None = None
        self._first: list[Tensor] = []  # A_0 of each layer, where it stays as it was
        self._codes: dict[int, Tensor] = {}  # layer's place -> (rows, r) of the batch under way

    def router(self) -> RouterEntry:
        return RouterEntry(
            mode=self.routing,
            temperature=self.temperature,
            metric="mahalanobis",
            depth=self.depth,
            shrinkage=SHRINKAGE,
            quantile=self.unknown,
        )

    # ---- hooks ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_model(self, model: Any, ctx: Context) -> None:
        digest = base_digest(model.get_base_model()) if hasattr(model, "get_base_model") else None
        refusals.another_base(self.old, self.base, digest)
        self.depth = min(self.depth, blocks_of(model))
        refusals.another_depth(self.old, self.depth_before, self.depth)
        known = [expert.prototype for expert in self.old]  # refuses one that is missing
        super().prepare_model(model, ctx)
        assert self._training is not None and self.experts is not None
        self.base = digest
        prototype = summarise(self.experts.base_features(self._prompts(ctx)))
        self._training[2].prototype, self.vector = prototype, prototype.mean
        self._begin(prototype, known)
        if self.before is not None:
            self._oppose(ctx)

    def loss(self, step: Step) -> Tensor | None:
        """``adversary`` * the confusion of the discriminators on the batch's rows of the new task."""
        self.new = None  # trained on after it was finished
        if self.adversary is None or not self._codes:
            return None
        earlier = {task for expert in self.old for task in expert.tasks}
        own = [at for at, task in enumerate(step.tasks) if task not in earlier] if step.tasks else slice(None)
        if own == []:
            return None
        codes = torch.stack([self._codes[at] for at in sorted(self._codes)])[:, own]
        self.adversary.learn(codes)
        return self.weight * self.adversary.confusion(codes)

    def penalty(self, params: Params) -> Tensor | None:
        """``protect`` * drift of the shared expert (``codes.Anchor``), once old tasks are there."""
        return None if self.anchor is None else self.protect * self.anchor.drift(self._ups())

    def gradients(self, params: Params) -> None:
        for down in self._held():
            if down.grad is not None:
                down.grad[: self._rank].zero_()

    def weights(self, params: Params, before: Mapping[str, Tensor] | None) -> None:
        """Puts A_0 back, whatever weight decay did."""
        held = self._held()
        if held and not self._first:
            assert self.before is not None
            firsts = (first for first, _ in self.before.factors.values())
            self._first = [first.to(down) for down, first in zip(held, firsts, strict=True)]
        for down, first in zip(held, self._first, strict=True):
            down[: self._rank].copy_(first)

    @torch.no_grad()
    def finish(self, ctx: Context) -> None:
        self._keep_experts()
        self.statistics = [*self.statistics[: len(self.old)], self._measured(ctx)]

    @torch.no_grad()
    def _keep_experts(self) -> None:
        assert self._training is not None
        _, about, newest = self._training
        pairs = {
            name: (layer.lora_A[newest.adapter].weight, layer.lora_B[newest.adapter].weight)
            for name, layer in newest.layers.items()
        }
        rank = about.rank
        own = {name: (kept(down[rank:]), kept(up[:, rank:])) for name, (down, up) in pairs.items()}
        common = {name: (kept(down[:rank]), kept(up[:, :rank])) for name, (down, up) in pairs.items()}
        prototype = newest.prototype
        assert prototype is not None
        self.after = Expert(about.model_copy(update={"task": SHARED}), common, torch.empty(0))
        about = about.model_copy(update={"prompts": prototype.n})
        gates = newest.gates.kept() if newest.gates is not None else None
        self.new = Expert(about, own, prototype.mean, gates, prototype.residuals)

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> MethodState:
        found = self._served(self.learned_experts)
        for task, one in enumerate(self.statistics[: len(self.learned_experts)]):
            found["tensors"] |= one.tensors(task)
        if self.new is None and self._training is not None:
            assert self.vector is not None and self._gates is not None
            found["tensors"]["vector"] = kept(self.vector)
            found["tensors"] |= {f"training.gates.{n}": kept(p) for n, p in self._gates.named_parameters()}
            if self.adversary is not None:
                found["tensors"] |= {f"training.{n}": v.cpu() for n, v in self.adversary.state().items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state: MethodState) -> None:
        if self._training is None:
            self._take_common(state)
            super().load_state_dict(state)
            refusals.other_gates(self.old, self.gate)
            self.statistics = refusals.statistics_of(self.old, state["tensors"])
            return
        super().load_state_dict(state)  # of a checkpoint: what came from earlier updates is here already
        tensors = {n.removeprefix("training."): v for n, v in state["tensors"].items()}
        assert self._gates is not None
        learned = {e.about.task: e for e in experts_in(state)}.get(self._training[1].task)
        if learned is not None and learned.gates is not None:
            self._gates.restore(learned.gates)
        else:
            self._gates.load_state_dict({n: tensors[f"gates.{n}"] for n, _ in self._gates.named_parameters()})
        if self.adversary is not None and "discriminator.done" in tensors:
            self.adversary.restore(tensors)

    def _take_common(self, state: MethodState) -> None:
        """What the tasks before this update have in common."""
        json = state["json"]
        self.before, self.base, self.depth_before = shared_in(state), json.get("base"), json.get("depth")

    def _document(self, found: list[Expert]) -> Document:
        assert self.after is not None
        return Document(
            method=self.name,
            router=self.router(),
            experts=[e.about for e in found],
            shared=self.after.about,
            gates=kind_of(found[0]),
        )

    def _served(self, found: list[Expert]) -> MethodState:
        state = state_of(found, self.after if self.new is not None else self.before)
        state["json"] |= {"base": self.base, "depth": self.depth}
        return state

    # ---- parts ---------------------------------------------------------------------------------------------

    def _start(self, model: Any, about: ExpertEntry, newest: Newest, draw: torch.Generator) -> Training:
        """The adapter at rank 2 r: the shared expert's rows first, then those of the new one, drawn, with B zero."""
        adapter, layers = newest.adapter, newest.layers
        about = self._shape(about, newest)
        self._refuse_trained(newest)
        alpha = 2 * about.rank * about.scale  # PEFT divides it by 2 r
        for name, layer in layers.items():
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            if layer.r[adapter] == about.rank:
                grow(down, up, about.rank, draw)
            else:
                down.weight[about.rank :].copy_(fresh_rows(about.rank, down.in_features, draw))
                up.weight.zero_()
            layer.r[adapter], layer.lora_alpha[adapter] = 2 * about.rank, alpha
            layer.scaling[adapter] = about.scale
            if self.before is not None:
                first, second = self.before.factors[name]
                down.weight[: about.rank].copy_(first)
                up.weight[:, : about.rank].copy_(second)
        config = model.peft_config[adapter]
        config.r, config.lora_alpha = 2 * about.rank, alpha
        some = next(iter(layers.values())).lora_A[adapter].weight
        exact = torch.promote_types(some.dtype, torch.float32)
        widths = {name: layer.lora_A[adapter].in_features for name, layer in layers.items()}
        gates = Gates(self.gate, widths, self.gate_rate, exact).to(some.device)
        return model, about, replace(newest, shared=about.rank, gates=gates, observe=self._observe)

    def _vector_of(self, ctx: Context) -> Tensor:
        return torch.empty(
            0
        )  # a prototype of hidden states takes its place, once those can be had without experts

    def _shape(self, about: ExpertEntry, newest: Newest) -> ExpertEntry:
        """That of one expert: the adapter's, or half of one that the update before this left on the model."""
        if self.before is None:
            return about.model_copy(update={"gate_sum": None if self.gate_sum == 1 else self.gate_sum})
        wanted = self.before.about
        if about.rank == 2 * wanted.rank and self._is_last(newest):
            about = about.model_copy(update={"rank": wanted.rank, "alpha": wanted.alpha})
        refusals.another_shape(about, wanted, self.gate_sum)
        return about.model_copy(update={"targets": wanted.targets, "gate_sum": wanted.gate_sum})

    def _is_last(self, newest: Newest) -> bool:
        """Whether the adapter is what the update before this one trained."""
        assert self.before is not None
        pairs = self.before.factors.items()
        return all(
            torch.equal(newest.layers[n].lora_B[newest.adapter].weight[:, : up.shape[1]].cpu(), up)
            for n, (_, up) in pairs
            if n in newest.layers
        )

    def _refuse_trained(self, newest: Newest) -> None:
        trained = any(bool(m.lora_B[newest.adapter].weight.any()) for m in newest.layers.values())
        if trained and (self.before is None or not self._is_last(newest)):
            raise BadInput(
                "moe-cl: the adapter changes the model already, and no expert is that adapter: start from a "
                "version without one, or give method_state of the update that made it"
            )

    def _oppose(self, ctx: Context) -> None:
        """Discriminators and anchor, from what is remembered of the old tasks."""
        assert self._training is not None
        device = self._ups()[0].device
        targets = self._training[1].targets
        kept_shares = torch.ones(len(self.old), len(targets))
        for at, expert in enumerate(self.old):
            assert expert.gates is not None
            for place, name in enumerate(targets):
                gate = expert.gates[name]
                kept_shares[at, place] = gate.softmax(-1)[0] if gate.dim() == 1 else 0.5
        old = [
            CodeStatistics(*(getattr(one, f).to(device) for f in ("mean", "covariance", "moment")))
            for one in self.statistics
        ]
        if self.protect:
            self.anchor = Anchor(self._ups(), old, kept_shares.to(device))
        if self.weight:
            seed = f"{ctx.seed}/{ctx.task}"

            def draw(number: int) -> torch.Generator:
                bits = random.Random(f"{seed}/{number}").getrandbits(62)
                return torch.Generator().manual_seed(bits)

            self.adversary = Adversary(self._ups, old, self.rate, self.steps, draw)

    def _begin(self, prototype: Prototype, known: Sequence[Prototype]) -> None:
        """The new expert as a copy of an earlier one, so that training starts from what that task's rows are answered by."""
        if not self.old or self.start == "fresh":
            return
        assert self._training is not None
        start, newest = self.old[-1], self._training[2]
        if self.start == "nearest":
            start = self.old[int(pool(known).distances(prototype.mean[None])[0].argmin())]
        for name, (first, second) in start.factors.items():
            layer = newest.layers[name]
            layer.lora_A[newest.adapter].weight[self._rank :].copy_(first)
            layer.lora_B[newest.adapter].weight[:, self._rank :].copy_(second)
        assert self._gates is not None and start.gates is not None
        self._gates.restore(start.gates)

    def _observe(self, layer: int, codes: Tensor) -> None:
        """Of the trainer's own forward, or of one that statistics are taken from."""
        assert self.experts is not None and self.experts.mask is not None
        if self._gatherer is not None:
            self._gatherer.add(layer, codes[..., : self._rank], self.experts.mask)
        elif self.adversary is not None and self.experts.in_trainers_forward:
            self._codes[layer] = row_means(codes[..., : self._rank].detach(), self.experts.mask)

    def _measured(self, ctx: Context) -> CodeStatistics:
        """The statistics of the task just learned, by its own expert and the shared one as they are now."""
        assert self._training is not None and self.experts is not None
        model, training = self._training[0], self._training[0].training
        self._gatherer, self.experts.pin = Gatherer(), len(self.old)
        model.eval()
        try:
            for batch in ctx.batches(batch_size=8, limit=self.rows_for_statistics):
                ctx.loss(batch)
            return self._gatherer.statistics()
        finally:
            self._gatherer, self.experts.pin = None, None
            model.train(training)

    @property
    def _rank(self) -> int:
        assert self._training is not None
        return self._training[1].rank

    @property
    def _gates(self) -> Gates | None:
        return self._training[2].gates if self._training is not None else None

    def _ups(self) -> list[Tensor]:
        """B_0 (d_out, r) of each layer, in training."""
        assert self._training is not None
        newest = self._training[2]
        return [m.lora_B[newest.adapter].weight[:, : self._rank] for m in newest.layers.values()]

    def _held(self) -> list[Tensor]:
        """The A whose first rows stay as they were."""
        if self._training is None or self.before is None or not self.freeze_shared_input:
            return []
        newest = self._training[2]
        return [newest.layers[name].lora_A[newest.adapter].weight for name in self.before.factors]
