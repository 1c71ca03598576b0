"""Stored mixtures of experts with a shared one, made up in float64, and what a layer adds, computed token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model
from torch import Tensor

from meristem.experts_format import ExpertEntry
from meristem.methods.architecture.experts import Expert
from meristem.methods.architecture.moe_cl.codes import CodeStatistics
from meristem.methods.architecture.prototypes import hidden_features, summarise
from meristem.methods.architecture.task_experts import state_of
from meristem.methods.base import Method

RANK, ALPHA, GATE_SUM = 2, 6, 2.0
SCALE = GATE_SUM * ALPHA / RANK
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TARGETS = [f"model.layers.{n}.self_attn.{name}_proj" for n in range(2) for name in "qv"]
DOWN = "model.layers.0.mlp.down_proj"  # of another input width than the others


def double() -> Any:
    return new_model().double()


def adapted(base: Any = double, **options: Any) -> Any:
    """The tiny model with the LoRA that the stored experts go with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(base(), LoraConfig(**{**LORA, **options}))


def prompts(task: str, count: int = 12) -> list[list[int]]:
    """Of other lengths, from letters that no other task has."""
    draw = torch.Generator().manual_seed(ord(task))
    first = 3 + 8 * (ord(task) - ord("A"))
    return [torch.randint(first, first + 8, (3 + n % 4,), generator=draw).tolist() for n in range(count)]


def expert(
    task: str, layers: Sequence[str] = TARGETS, gate: str | None = "static", kind: torch.dtype = torch.float64
) -> Expert:
    """Random factors and gates; the prototype is that of ``prompts(task)``. ``gate`` None: a shared one."""
    draw, modules = torch.Generator().manual_seed(sum(task.encode())), dict(new_model().named_modules())

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(kind)

    factors, gates = {}, {}
    for name in layers:
        d_out, d_in = modules[name].weight.shape
        factors[name] = 0.5 * normal(RANK, d_in), 0.5 * normal(d_out, RANK)
        gates[name] = normal(2) if gate == "static" else 20 * normal(2, d_in)
    about = ExpertEntry(task=task, rank=RANK, alpha=ALPHA, targets=list(layers), gate_sum=GATE_SUM)
    if gate is None:
        return Expert(about, factors, torch.empty(0))
    made = summarise(hidden_features(double(), [torch.tensor(p) for p in prompts(task)], 2))
    about = about.model_copy(update={"prompts": made.n})
    return Expert(about, factors, made.mean, gates, made.residuals)


def statistics(layers: int, seed: int) -> CodeStatistics:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(layers, 9, RANK, generator=draw, dtype=torch.float64)
    mean = rows.mean(1)
    covariance = torch.einsum("lni,lnj->lij", rows, rows) / 9 - torch.einsum("li,lj->lij", mean, mean)
    return CodeStatistics(mean, covariance, torch.einsum("lni,lnj->lij", rows, rows) / 3)


def stored(tasks: str = "AB", **options: Any) -> dict[str, Any]:
    """The method state after the ``tasks``."""
    experts = [expert(task, **options) for task in tasks]
    state = state_of(experts, expert("shared", **{**options, "gate": None}))
    for at in range(len(tasks)):
        state["tensors"] |= statistics(len(experts[0].factors), at).tensors(at)
    return {"moe-cl": state}


@contextmanager
def added(model: Any, shared: Expert, experts: Sequence[Expert], weights: Sequence[float]) -> Any:
    """Inside, the layers of a plain ``model`` add what the equations say to one row, in loops over its tokens.

    y = W x + (sum_e w_e g_s(e) + (1 - sum_e w_e) mean_e g_s(e)) s B_0 A_0 x + sum_e w_e g_t(e) s B_e A_e x
    """
    scale, unknown = SCALE, 1 - sum(weights)

    def of(name: str) -> Any:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            assert len(output) == 1
            rows = []
            for x, y in zip(inputs[0][0], output[0], strict=True):
                gates = [gate if gate.dim() == 1 else gate @ x for gate in (e.gates[name] for e in experts)]
                divided = [g.exp() / g.exp().sum() for g in gates]
                usual = (
                    sum(g[0] for g in divided) / len(divided) if experts[0].gates[name].dim() == 1 else 0.5
                )
                common = sum(w * g[0] for w, g in zip(weights, divided, strict=True)) + unknown * usual
                first, second = shared.factors[name]
                y = y + common * scale * (second @ (first @ x))
                for w, g, e in zip(weights, divided, experts, strict=True):
                    first, second = e.factors[name]
                    y = y + w * g[1] * scale * (second @ (first @ x))
                rows.append(y)
            return torch.stack(rows)[None]

        return add

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(of(name)) for name in shared.factors]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def factors(model: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
    """A (2 r, d_in) and B (d_out, 2 r) in training, by layer."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }


class Gradients(Method):
    """Keeps those of the first step."""

    name = "gradients"

    def __init__(self):
        self.found = None

    def gradients(self, params):
        self.found = self.found or {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
