"""Several LoRA experts over one base in one model, weighed row by row.

For a row with prompt tokens p, expert vectors v_e (width) and a layer with input x (length, d_in),

    f = mean of the input embeddings of p            s_e = cos(f, v_e)
    w = softmax(s / temperature)                     or w = one-hot of argmax s, zero where max s < unknown
    y = W x + sum_e w_e (alpha_e / r_e) B_e A_e x    A_e (r_e, d_in), B_e (d_out, r_e)

With a shared expert (A_0, B_0) beside them each expert has a gate [g_s, g_t] in every layer (``gates``), and

    y = W x + g_0 (alpha / r) B_0 A_0 x + sum_e w_e g_t(e) (alpha / r) B_e A_e x
    g_0 = sum_e w_e g_s(e) + (1 - sum_e w_e) mean_e g_s(e)

so that a row of no known task is answered by the shared expert alone, with the weight that tasks give it on average.

The sum is one low-rank product: the A_e of a layer stand one below the other, the blocks of A x are scaled, and
only experts that some row of the batch gives weight to are in it. So a batch may mix tasks, and under ``top-1`` the
cost does not depend on how many experts there are. f looks at no token that is to be predicted and at each row by
itself: neither the batch nor its padding nor the answer decides the weights.

:class:`Experts` hangs on a model by hooks. In training the newest expert is PEFT's adapter, which the optimizer, the
checkpoints and gradient clipping know; its own forward adds it, and the hooks scale it and add the frozen ones. A
shared expert in training is the first rows of the same adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from meristem.errors import BadInput, Clash
from meristem.experts_format import ExpertEntry, RouterEntry
from meristem.methods.architecture._layers import FrozenLayer, NewestLayer
from meristem.methods.architecture.gates import Gates
from meristem.methods.architecture.misfits import refuse_misfits
from meristem.methods.architecture.prototypes import SHRINKAGE, Pooled, Prototype, hidden_features, pool
from meristem.methods.architecture.routing import (
    Routing,
    features,
    or_all,
    prompt_mask,
    real_tokens,
    weigh,
)

_PLACE = "_meristem_experts"
VECTOR = "expert_vector"  # the parameters' names in the causal model, where they are trained
GATES = "expert_gates"


@dataclass(frozen=True)
class Expert:
    """A frozen LoRA. ``factors``: layer name -> A (rank, d_in), B (d_out, rank); ``vector`` (width).

    ``gates``: layer name -> what the weights of the shared expert and of this one come from (``gates``); None in a
    set without a shared expert, and of the shared one itself, whose ``vector`` is empty.
    """

    about: ExpertEntry
    factors: Mapping[str, tuple[Tensor, Tensor]]
    vector: Tensor
    gates: Mapping[str, Tensor] | None = None
    residuals: Tensor | None = None

    @property
    def prototype(self) -> Prototype:
        """Where the router measures by prototypes: ``vector`` is its mean, ``residuals`` (m, width) its prompts'."""
        if self.residuals is None or self.about.prompts is None:
            raise BadInput(
                f"the expert of task {self.about.task!r} has no prototype, so no prompt can be told to be its task's: "
                "train the task again, or take the method state that its update left"
            )
        return Prototype(self.vector, self.residuals, self.about.prompts)

    @property
    def scale(self) -> float:
        return self.about.scale

    @property
    def tasks(self) -> list[str]:
        """The tasks that it was trained on: several where an update had several data sets."""
        return self.about.task.split("+")


@dataclass
class Newest:
    """The expert in training: PEFT's ``adapter`` on ``layers`` (by name), and its vector (width), maybe a parameter.

    ``shared``: how many of the adapter's first rows are the shared expert, whose ``gates`` are then in training too.
    ``observe`` is given each layer's place and codes A x (batch, length, rank).
    """

    adapter: str
    layers: Mapping[str, Any]
    vector: Tensor
    shared: int = 0
    gates: Gates | None = None
    prototype: Prototype | None = None
    observe: Callable[[int, Tensor], None] | None = None


class Experts:
    """Experts attached to a causal ``model`` (plain, or in PEFT): every forward routes its rows and composes.

    Rows are routed by the prompt of the labelled batch named by :meth:`batch`, by what :meth:`fixed` gives, else by
    all tokens of a forward that starts without a cache; the weights stay while the cache grows. With the adapter
    off, the model answers as before the present task: with the frozen experts, routed among themselves, and the
    ``shared`` expert as it was then. ``newest_alone``: in training mode every row goes to the expert in training,
    but with a shared expert those that :meth:`batch` says are of an earlier task go to that one's. ``pin``: the place of
    the expert that answers every row, whatever the router says (:meth:`place_of`).

    Gradient checkpointing runs layers again in the backward pass, by the routing that holds then: a teacher's forward
    in eval mode and one on a batch inside another (``batch``) leave that of the forward in training mode alone.
    """

    def __init__(
        self,
        model: Any,
        router: RouterEntry,
        frozen: Sequence[Expert],
        newest: Newest | None = None,
        newest_alone: bool = False,
        shared: Expert | None = None,
    ) -> None:
        detach(model)
        self.model, self.router, self.newest, self.newest_alone = _causal(model), router, newest, newest_alone
        self.frozen, self.shared = list(frozen), shared
        self.pin: int | None = None
        self.features: Tensor | None = None  # (batch, width) of the latest forward
        self.mask: Tensor | None = (
            None  # (batch, length) of the latest forward, True where there is no padding
        )
        self._routings: dict[bool, Routing] = {}  # of the latest forward in training mode, and in eval mode
        self._reference: Routing | None = None
        self._prompt: Tensor | None = None
        self._tasks: Sequence[str] = ()
        self._fixed, self._batches, self._quiet = False, 0, False
        self._pooled: dict[bool, Pooled] = {}  # with the newest expert, and without
        self._backbone = getattr(self.model, "base_model", self.model)
        self._hooks = [self._backbone.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        modules = dict(self.model.named_modules())
        everyone = [*self.frozen, *([shared] if shared is not None else [])]
        refuse_misfits(self.model, modules, everyone)
        self._attach_frozen(modules, dict.fromkeys(name for expert in everyone for name in expert.factors))
        if newest is not None:
            self._attach_newest(newest)
        setattr(self.model, _PLACE, self)

    def _attach_frozen(self, modules: Mapping[str, Any], names: Iterable[str]) -> None:
        for name in names:
            own = {at: e for at, e in enumerate(self.frozen) if name in e.factors}
            layer = FrozenLayer(name, own, self.shared, self)
            self._hooks.append(modules[name].register_forward_hook(layer.add))

    def _attach_newest(self, newest: Newest) -> None:
        for at, (name, module) in enumerate(newest.layers.items()):
            scaled = NewestLayer(at, name, newest, self.frozen, self)
            self._hooks.append(module.lora_A[newest.adapter].register_forward_hook(scaled.scale))
        if isinstance(newest.vector, nn.Parameter):
            self.model.register_parameter(VECTOR, newest.vector)
        if newest.gates is not None:
            self.model.register_module(GATES, newest.gates)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, _PLACE)
        for name in (VECTOR, GATES):
            if hasattr(self.model, name):
                delattr(self.model, name)

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Forwards inside are on this labelled batch; ``Clash`` for one that a backward pass would route wrongly."""
        before = (self._prompt, self._tasks, self.features, dict(self._routings))
        inner = self._batches > 0
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if inner and torch.is_grad_enabled() and checkpointing:
            raise Clash(
                "a method's loss on a batch of its own, with experts and under gradient checkpointing, would be "
                "computed again as if it were the trainer's batch: gradient_checkpointing=False"
            )
        self._prompt, self._tasks = prompt_mask(inputs), inputs.get("tasks") or ()
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            self._prompt, self._tasks = before[:2]
            if inner:
                self.features, self._routings = before[2:]

    @contextmanager
    def fixed(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Forwards inside have one row for each prompt (token ids), which alone decides its weights."""
        self._take([torch.tensor(list(prompt)) for prompt in prompts], training=False)
        self._fixed = True
        try:
            yield
        finally:
            self._fixed = False

    @property
    def in_trainers_forward(self) -> bool:
        """Whether the forward under way is the trainer's own, in training: no method's inside it, no evaluation."""
        return self._batches == 1 and bool(self._backbone.training)

    def place_of(self, task: str) -> int:
        """Of the frozen expert of ``task``; ``BadInput`` where there is none."""
        for at, expert in enumerate(self.frozen):
            if task in (expert.about.task, *expert.tasks):
                return at
        raise BadInput(
            f"no expert of task {task!r}: there are {', '.join(e.about.task for e in self.frozen)}"
        )

    @property
    def routing(self) -> Routing | None:
        """Of the latest forward in the mode, training or not, that the model is in."""
        return self._routings.get(self._backbone.training)

    def present(self) -> Routing | None:
        """The routing of the forward under way; None where no expert has a part in it."""
        if self._quiet:
            return None
        if self._off():
            return self._reference
        if self.routing is None:
            raise Clash("an expert's layer ran outside its model: call the model, not a part of it")
        return self.routing

    def shared_is_frozen(self) -> bool:
        """Whether the shared expert is ``shared``, not the adapter in training."""
        return self.newest is None or self._off()

    # ---- routing -------------------------------------------------------------------------------------------

    def _on_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if (
            self._quiet
            or self._fixed
            or (cache is not None and cache.get_seq_length() > 0 and self.routing is not None)
        ):
            return
        if ids is None:
            raise Clash("experts are routed by token ids, and this forward has none: pass input_ids")
        mask, self.mask = self._prompt, real_tokens(ids, kwargs.get("attention_mask"))
        if mask is None or mask.shape != ids.shape:
            mask = or_all(self.mask, self.mask)
        self._take([row[keep] for row, keep in zip(ids, mask, strict=True)], module.training)

    def _take(self, rows: Sequence[Tensor], training: bool) -> None:
        off = self._off()
        found = self._told(len(rows), training and not off) or self._measured(rows, off)
        if off:
            self._reference = found if self.frozen else None
        else:
            self._routings[self._backbone.training] = found

    def _told(self, rows: int, training: bool) -> Routing | None:
        """Where no router decides: a pinned expert, or in training the tasks that rows are told to be of."""
        count, newest = len(self.frozen) + (self.newest is not None), len(self.frozen)
        if self.pin is not None:
            which = [self.pin] * rows
        elif training and self.newest_alone:
            which = [newest] * rows
            if self.shared is not None and len(self._tasks) == rows:
                of_task = {task: at for at, expert in enumerate(self.frozen) for task in expert.tasks}
                which = [of_task.get(task, newest) for task in self._tasks]
        else:
            return None
        device = self.model.get_input_embeddings().weight.device
        active = tuple(sorted(set(which) - {newest}))
        return Routing(one_hot(torch.tensor(which), count).float().to(device), active, set(which) == {newest})

    def _measured(self, rows: Sequence[Tensor], off: bool) -> Routing:
        self.features = self._features(rows)
        newest, count = (None if off else self.newest), len(self.frozen)
        if not count and newest is None:
            weights = self.features[:, :0]
        elif self.router.metric == "mahalanobis":
            weights = self._near_prototypes(self.features, newest)
        else:
            vectors = [expert.vector.to(self.features) for expert in self.frozen]
            if newest is not None:
                vectors.append(newest.vector.to(self.features))
            weights = weigh(self.router, self.features, torch.stack(vectors))
        active = tuple(range(count))
        if self.router.mode == "top-1":
            active = tuple(weights[:, :count].detach().any(0).nonzero()[:, 0].tolist())
        return Routing(weights, active)

    def _features(self, rows: Sequence[Tensor]) -> Tensor:
        """:meth:`base_features`, of equal rows (samples of a prompt, options behind one) once."""
        place: dict[tuple[int, ...], int] = {}
        which = [place.setdefault(tuple(row.tolist()), len(place)) for row in rows]
        if len(place) == len(rows):
            return self.base_features(rows)
        return self.base_features([torch.tensor(row) for row in place])[which]

    def base_features(self, rows: Sequence[Tensor]) -> Tensor:
        """(rows, width): what the router measures rows of token ids by, without any expert."""
        if not self.router.depth:
            return features(self.model, rows)
        before, self._quiet = self._quiet, True
        try:
            return hidden_features(self.model, rows, self.router.depth)
        finally:
            self._quiet = before

    def _near_prototypes(self, found: Tensor, newest: Newest | None) -> Tensor:
        router = self.router
        pooled = self._pooled.get(newest is not None)
        if pooled is None:
            known = [expert.prototype for expert in self.frozen]
            if newest is not None and newest.prototype is not None:
                known.append(newest.prototype)
            pooled = pool(known, router.shrinkage or SHRINKAGE, router.quantile or 1.0).like(found)
            self._pooled[newest is not None] = pooled
        return pooled.weigh(found, router.mode, router.temperature, unknown=router.quantile is not None)

    def _off(self) -> bool:
        return self.newest is not None and bool(next(iter(self.newest.layers.values())).disable_adapters)


def of(model: Any) -> Experts | None:
    """What is attached to ``model``, if anything is."""
    return getattr(_causal(model), _PLACE, None)


def detach(model: Any) -> None:
    if (attached := of(model)) is not None:
        attached.remove()


def routed(model: Any, prompts: Callable[[], Sequence[Sequence[int]]]) -> AbstractContextManager[None]:
    """Inside, each row of a forward is routed by its prompt; nothing for a model without experts."""
    attached = of(model)
    return nullcontext() if attached is None else attached.fixed(prompts())


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
