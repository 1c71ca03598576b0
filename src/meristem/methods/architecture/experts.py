"""Several LoRA experts over one base in one model, weighed row by row.

For a row with prompt tokens p, expert vectors v_e (width) and a layer with input x (length, d_in),

    f = mean of the input embeddings of p            s_e = cos(f, v_e)
    w = softmax(s / temperature)                     or w = one-hot of argmax s, zero where max s < unknown
    y = W x + sum_e w_e (alpha_e / r_e) B_e A_e x    A_e (r_e, d_in), B_e (d_out, r_e)

The sum is one low-rank product: the A_e of a layer stand one below the other, the blocks of A x are scaled by w, and
only experts that some row of the batch gives weight to are in it. So a batch may mix tasks, and under ``top-1`` the
cost does not depend on how many experts there are. f looks at no token that is to be predicted and at each row by
itself: neither the batch nor its padding nor the answer decides the weights.

:class:`Experts` hangs on a model by hooks. In training the newest expert is PEFT's adapter, which the optimizer, the
checkpoints and gradient clipping know; its own forward adds it, and the hooks scale it and add the frozen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, normalize, one_hot
from transformers.pytorch_utils import Conv1D

from meristem.errors import BadInput, Clash
from meristem.experts_format import ExpertEntry, RouterEntry

_PLACE = "_meristem_experts"
VECTOR = "expert_vector"  # the parameter's name in the causal model, where the vector is trained


@dataclass(frozen=True)
class Expert:
    """A frozen LoRA. ``factors``: layer name -> A (rank, d_in), B (d_out, rank); ``vector`` (width)."""

    about: ExpertEntry
    factors: Mapping[str, tuple[Tensor, Tensor]]
    vector: Tensor

    @property
    def scale(self) -> float:
        return self.about.alpha / self.about.rank


@dataclass
class Newest:
    """The expert in training: PEFT's ``adapter`` on ``layers``, and its vector (width), maybe a parameter."""

    adapter: str
    layers: list[Any]
    vector: Tensor


@dataclass(frozen=True)
class Routing:
    """Weights (batch, experts) of one batch. ``active``: frozen experts that any row gives weight to.

    ``newest`` (batch): weight of the expert in training; None where it is 1 for every row.
    """

    weights: Tensor
    active: tuple[int, ...]
    newest: Tensor | None = None


def weigh(router: RouterEntry, features: Tensor, vectors: Tensor) -> Tensor:
    """(batch, experts) from features (batch, width) and vectors (experts, width)."""
    alike = normalize(features, dim=-1) @ normalize(vectors, dim=-1).T
    if router.mode == "softmax":
        return (alike / router.temperature).softmax(-1)
    best, which = alike.max(-1)
    weights = one_hot(which, len(vectors)).to(alike)
    return weights if router.unknown is None else weights * (best >= router.unknown)[:, None]


def features(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """(rows, width): the mean input embedding of each row's token ids, each row by itself."""
    table = model.get_input_embeddings().weight
    kind = torch.promote_types(table.dtype, torch.float32)
    with torch.no_grad():
        return torch.stack([embedding(ids.to(table.device), table).to(kind).mean(0) for ids in rows])


def prompt_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """(batch, length), True on prompt tokens: labelled -100 and no padding; on all of a row where it has none."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or labels.shape != ids.shape:
        return None
    real = _real(ids, batch.get("attention_mask"))
    return _or_all(real & (labels == -100), real)


class Experts:
    """Experts attached to a causal ``model`` (plain, or in PEFT): every forward routes its rows and composes.

    Rows are routed by the prompt of the labelled batch named by :meth:`batch`, by what :meth:`fixed` gives, else by
    all tokens of a forward that starts without a cache; the weights stay while the cache grows. With the adapter
    off, the model answers as before the present task: with the frozen experts, routed among themselves.
    ``newest_alone``: in training mode every row goes to the expert in training.

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
    ) -> None:
        detach(model)
        self.model, self.router, self.newest, self.newest_alone = _causal(model), router, newest, newest_alone
        self.frozen = list(frozen)
        self.features: Tensor | None = None  # (batch, width) of the latest forward
        self._routings: dict[bool, Routing] = {}  # of the latest forward in training mode, and in eval mode
        self._reference: Routing | None = None
        self._prompt: Tensor | None = None
        self._fixed = False
        self._backbone = getattr(self.model, "base_model", self.model)
        self._hooks = [self._backbone.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        modules = dict(self.model.named_modules())
        _refuse_misfits(self.model, modules, self.frozen)
        for name in dict.fromkeys(name for expert in frozen for name in expert.factors):
            layer = _Layer(name, {at: e for at, e in enumerate(frozen) if name in e.factors}, self)
            self._hooks.append(modules[name].register_forward_hook(layer.add))
        if newest is not None:
            for part in newest.layers:
                self._hooks.append(part.lora_A[newest.adapter].register_forward_hook(self._scale_newest))
            if isinstance(newest.vector, nn.Parameter):
                self.model.register_parameter(VECTOR, newest.vector)
        setattr(self.model, _PLACE, self)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, _PLACE)
        if hasattr(self.model, VECTOR):
            delattr(self.model, VECTOR)

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Forwards inside are on this labelled batch; ``Clash`` for one that a backward pass would route wrongly."""
        before, inner = (self._prompt, self.features, dict(self._routings)), self._prompt is not None
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if inner and torch.is_grad_enabled() and checkpointing:
            raise Clash(
                "a method's loss on a batch of its own, with experts and under gradient checkpointing, would be "
                "computed again as if it were the trainer's batch: gradient_checkpointing=False"
            )
        self._prompt = prompt_mask(inputs)
        try:
            yield
        finally:
            self._prompt = before[0]
            if inner:
                _, self.features, self._routings = before

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
    def routing(self) -> Routing | None:
        """Of the latest forward in the mode, training or not, that the model is in."""
        return self._routings.get(self._backbone.training)

    def present(self) -> Routing:
        """The routing of the forward under way."""
        found = self._reference if self._off() else self.routing
        if found is None:
            raise Clash("an expert's layer ran outside its model: call the model, not a part of it")
        return found

    # ---- routing -------------------------------------------------------------------------------------------

    def _on_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if self._fixed or (cache is not None and cache.get_seq_length() > 0 and self.routing is not None):
            return
        if ids is None:
            raise Clash("experts are routed by token ids, and this forward has none: pass input_ids")
        mask = self._prompt
        if mask is None or mask.shape != ids.shape:
            real = _real(ids, kwargs.get("attention_mask"))
            mask = _or_all(real, real)
        self._take([row[keep] for row, keep in zip(ids, mask, strict=True)], module.training)

    def _take(self, rows: Sequence[Tensor], training: bool) -> None:
        self.features = features(self.model, rows)
        vectors = [expert.vector.to(self.features) for expert in self.frozen]
        if self._off():
            self._reference = self._routed(vectors) if vectors else None
            return
        if self.newest is not None:
            vectors.append(self.newest.vector.to(self.features))
            if self.newest_alone and training:
                weights = torch.zeros(len(rows), len(vectors)).to(self.features)
                weights[:, -1] = 1
                self._routings[self._backbone.training] = Routing(weights, ())
                return
        self._routings[self._backbone.training] = self._routed(vectors)

    def _routed(self, vectors: list[Tensor]) -> Routing:
        assert self.features is not None
        weights = weigh(self.router, self.features, torch.stack(vectors))
        count = len(self.frozen)
        active = tuple(range(count))
        if self.router.mode == "top-1":
            active = tuple(weights[:, :count].detach().any(0).nonzero()[:, 0].tolist())
        return Routing(weights, active, weights[:, count] if len(vectors) > count else None)

    def _off(self) -> bool:
        return self.newest is not None and bool(self.newest.layers[0].disable_adapters)

    def _scale_newest(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        weight = self.present().newest
        if weight is None:
            return output
        return (output * _by_row(weight, output, "the adapter")).to(output.dtype)


class _Layer:
    """The frozen experts of one layer: A (R, d_in), B^T (R, d_out), and of each of the R rows its expert and scale."""

    def __init__(self, name: str, experts: Mapping[int, Expert], whole: Experts) -> None:
        self.name, self.whole = name, whole
        self.at = tuple(experts)
        factors = [(*expert.factors[name], expert.scale) for expert in experts.values()]
        self.down = torch.cat([down for down, _, _ in factors])
        self.up = torch.cat([up.T for _, up, _ in factors])
        ranks = torch.tensor([len(down) for down, _, _ in factors])
        self.owner = torch.tensor(self.at).repeat_interleave(ranks)
        exact = torch.promote_types(self.down.dtype, torch.float32)
        self.scale = torch.tensor([scale for *_, scale in factors], dtype=exact).repeat_interleave(ranks)
        self._chosen: tuple[tuple[int, ...], tuple[Tensor, ...]] | None = None

    def add(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        routing = self.whole.present()
        active = tuple(at for at in self.at if at in routing.active)
        if not active:
            return output
        down, up, owner, scale = self._of(active, output.device)
        weights = routing.weights[:, owner] * scale.to(routing.weights)
        hidden = linear(inputs[0].to(down.dtype), down)
        hidden = (hidden * _by_row(weights, hidden, self.name)).to(up.dtype)
        return (output + hidden @ up).to(output.dtype)

    def _of(self, active: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        """The rows of these experts; kept for the next batch, which often has the same."""
        if self.down.device != device:
            self.down, self.up, self.owner, self.scale = (
                part.to(device) for part in (self.down, self.up, self.owner, self.scale)
            )
            self._chosen = None
        parts = (self.down, self.up, self.owner, self.scale)
        if active == self.at:
            return parts
        if self._chosen is None or self._chosen[0] != active:
            rows = torch.isin(self.owner, torch.tensor(active, device=device)).nonzero()[:, 0]
            if len(active) == 1:  # its rows stand together: nothing is copied
                chosen = tuple(part[int(rows[0]) : int(rows[-1]) + 1] for part in parts)
            else:
                chosen = tuple(part[rows] for part in parts)
            self._chosen = (active, chosen)
        return self._chosen[1]


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


def _refuse_misfits(model: Any, modules: Mapping[str, Any], experts: Sequence[Expert]) -> None:
    """``BadInput`` where an expert is not of this base, or not of the shape that it says."""
    width = model.get_input_embeddings().weight.shape[1]
    for expert in experts:
        about, odd = expert.about, ""
        if expert.vector.shape != (width,):
            odd = f"its vector is {tuple(expert.vector.shape)}, the input embeddings are {width} wide"
        for name, (down, up) in expert.factors.items():
            layer = modules.get(name)
            if layer is None:
                odd = f"it changes layer {name}, which this model lacks"
                continue
            if (widths := _widths(layer)) is None:
                odd = f"it changes {name or 'the whole model'}, which is no linear layer ({type(layer).__name__})"
                continue
            found, (d_in, d_out) = (tuple(down.shape), tuple(up.shape)), widths
            if found != (wanted := ((about.rank, d_in), (d_out, about.rank))):
                odd = f"A and B of {name} are {found[0]} and {found[1]}, not {wanted[0]} and {wanted[1]}"
        if odd:
            raise BadInput(f"the expert of task {about.task!r}: {odd}; use the base that it was made on")


def _widths(layer: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, under PEFT or not; None of any other layer."""
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if isinstance(layer, Conv1D):  # GPT-2's, whose weight is (d_in, d_out)
        return layer.weight.shape[0], layer.weight.shape[1]
    known = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return (layer.in_features, layer.out_features) if known else None


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _real(ids: Tensor, mask: Any) -> Tensor:
    """(batch, length), True where there is no padding, as far as the mask says."""
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool)


def _or_all(mask: Tensor, real: Tensor) -> Tensor:
    """``mask``, but of a row where it is empty all real tokens, or all there are."""
    real = real | ~real.any(1, keepdim=True)
    return mask | (real & ~mask.any(1, keepdim=True))


def _by_row(weights: Tensor, value: Tensor, where: str) -> Tensor:
    """(batch) or (batch, R) weights beside a value (batch, length, R)."""
    if value.dim() != 3 or len(value) != len(weights):
        raise Clash(
            f"{where} sees {tuple(value.shape)} where rows of {len(weights)} prompts are routed: "
            "train experts on layers that keep rows apart (not inside a mixture of experts)"
        )
    return weights[:, None, None] if weights.dim() == 1 else weights[:, None, :]
