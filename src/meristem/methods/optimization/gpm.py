"""Gradient projection memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from meristem.errors import BadInput, Clash
from meristem.methods.base import Context, Method, MethodState, Params, Row, trainable


class GPM(Method):
    """Learns only in directions that earlier tasks' inputs to a layer do not take.

    g <- g - (g M) M^T,    weight and gradient (d_out, d_in), basis M (d_in, k) orthonormal

    so that W x stays for every old layer input x in span(M). After a task, R (d_in, n) holds layer inputs of its
    rows (n token positions: at most ``positions`` of each of ``samples`` rows, drawn at random) and
    R' = R - M M^T R; M grows by the first j left singular vectors of R', with the smallest j such that
    |M M^T R|^2 + sum_{i<=j} s_i^2 >= threshold * |R|^2     (Frobenius; eqs. 5 and 9)

    The threshold rises by ``increase`` per task (0.003 on the paper's CIFAR-100). AdamW's step leaves the
    subspace in which its gradient lies (it scales each entry, and decays weights), so the step is projected as
    well. Trainable weights that are no linear layer's (norms, biases, embeddings, a head tied to them) are still
    from the second task on, as batch norm is in the paper.

    LoRA, h = W x + s B (A x): A is projected by the layer's inputs x and B by the r-dimensional activations A x,
    for only both together keep B A x for old x. B has r directions in all, soon used up; later tasks then learn
    in A alone, so give the adapter a generous rank. Inputs inside a transformer share a few large directions,
    which the paper's 0.97 keeps and little else (three tiny tasks, rank 12, three seeds: 3.3 nats forgotten by
    fine-tuning, 2.6 at threshold 0.97, 1.1 at 0.999).

    Of a preference pair the inputs are those of prompt and chosen answer.

    Source: Saha et al. 2021, arXiv 2103.09762. Claims: less forgetting. Stages: cpt, cit, ca. State: ``basis.*``,
    d_in * k numbers in fp32 per layer, where k grows with every task until it is d_in (or r) and the layer is
    full. Without saved state and with history, bases are made from the earlier rows at the start weights.
    """

    name = "gpm"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit", "ca"})
    needs_before = True
    weight_state = True
    old_data = "first"
    weight_copies = 1
    grows = "bases, up to the square of each layer's input width"
    sharded = False
    needs = frozenset({"likelihood"})

    def __init__(
        self, threshold: float = 0.97, increase: float = 0.0, samples: int = 64, positions: int = 8
    ) -> None:
        if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise BadInput(f"gpm: threshold={threshold!r} must be in (0, 1]: the share of the inputs to keep")
        if not isinstance(increase, int | float) or not 0 <= increase <= 1:
            raise BadInput(f"gpm: increase={increase!r} must be in [0, 1]")
        for key, value in (("samples", samples), ("positions", positions)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"gpm: {key}={value!r} must be a whole number, 1 or more")
        self.threshold, self.increase = float(threshold), float(increase)
        self.samples, self.positions = samples, positions
        self.basis: dict[str, Tensor] = {}
        self.tasks: list[str] = []  # whose inputs the bases span

    def prepare_model(self, model: nn.Module, ctx: Context) -> None:
        self._check_fits(_linear(model))
        for task, rows in ctx.history.items():
            if len(rows) and task not in self.tasks:
                self._remember(ctx, rows, f"inputs of {task}")

    def gradients(self, params: Params) -> None:
        for name, parameter in params.items() if self.basis else ():
            if parameter.grad is not None:
                parameter.grad.sub_(self._old(name, parameter.grad))

    def weights(self, params: Params, before: Mapping[str, Tensor] | None) -> None:
        assert before is not None
        for name, parameter in params.items() if self.basis else ():
            parameter.sub_(self._old(name, parameter - before[name]))

    def finish(self, ctx: Context) -> None:
        if len(ctx.rows):
            self._remember(ctx, ctx.rows, f"inputs of {ctx.task}")

    def state_dict(self) -> MethodState:
        tensors = {f"basis.{name}": value.detach().cpu().clone() for name, value in self.basis.items()}
        return {"tensors": tensors, "json": {"tasks": list(self.tasks)}}

    def load_state_dict(self, state: MethodState) -> None:
        self.basis = {name.removeprefix("basis."): value for name, value in state["tensors"].items()}
        self.tasks = list(state["json"]["tasks"])

    def _old(self, name: str, value: Tensor) -> Tensor:
        """The part of a gradient or step that old inputs would feel: (v M) M^T; all of it without a basis."""
        if name not in self.basis:
            return value.clone()
        if self.basis[name].device != value.device:  # moved once
            self.basis[name] = self.basis[name].to(value.device)
        basis = self.basis[name]
        return ((value.to(basis.dtype) @ basis) @ basis.T).to(value.dtype)

    def _remember(self, ctx: Context, rows: Sequence[Row], label: str) -> None:
        """Every layer's basis grows by what it does not span of the inputs that ``rows`` give."""
        threshold = min(1.0, self.threshold + self.increase * len(self.tasks))
        for name, columns in self._inputs(ctx, rows, label).items():
            basis = self.basis.get(name, columns[:, :0]).to(columns.device)
            self.basis[name] = extended(basis, columns, threshold)
        self.tasks += sorted({row["task"] for row in rows} - set(self.tasks))

    def _inputs(self, ctx: Context, rows: Sequence[Row], label: str) -> dict[str, Tensor]:
        """R (d_in, n) of each linear layer in training, by the name of its weight."""
        found: dict[str, list[Tensor]] = {}
        picked = torch.zeros(0, dtype=torch.long)

        def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                flat = inputs[0].detach().flatten(0, -2)
                kept = flat[picked[picked < len(flat)].to(flat.device)]
                found[name].append(kept.to(torch.promote_types(kept.dtype, torch.float32)))

            return hook

        model, hooks = ctx.model, []
        draw = torch.Generator().manual_seed(ctx.seed)
        advance = ctx.progress(label, min(self.samples, len(rows)))
        was_training = model.training
        model.eval()
        for name, layer in _linear(model).items():
            found[name] = [torch.zeros(0, layer.in_features, device=layer.weight.device)]
            hooks.append(layer.register_forward_pre_hook(catch(name)))
        try:
            with torch.no_grad():
                for batch in ctx.batches(rows, batch_size=1, limit=self.samples):
                    picked = torch.randperm(batch["input_ids"].shape[-1], generator=draw)[: self.positions]
                    ctx.loss(batch)
                    advance(1)
        finally:
            for handle in hooks:
                handle.remove()
            model.train(was_training)
        if not len(picked):
            raise BadInput("gpm: no row has completion tokens to take layer inputs from; raise max_length")
        return {name: torch.cat(parts).T for name, parts in found.items()}

    def _check_fits(self, layers: Mapping[str, nn.Linear]) -> None:
        for name in sorted(self.basis.keys() ^ layers.keys()) if self.basis else ():
            where = "the saved state" if name in self.basis else "the model"
            raise BadInput(
                f"gpm: the saved state is for another set of trainable layers ({name} is in {where} only): keep "
                "the adapter's shape and name"
            )
        for name, basis in self.basis.items():
            if len(basis) != layers[name].in_features:
                raise BadInput(
                    f"gpm: the saved state is for inputs of width {len(basis)} to {name}, which has "
                    f"{layers[name].in_features} here: keep the adapter's shape"
                )


def extended(basis: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """``basis`` (d, k) with the fewest further directions that hold ``threshold`` of ``columns`` (d, n)."""
    if not columns.numel():
        return basis
    rest = columns - basis @ (basis.T @ columns)
    new, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    total, left = columns.square().sum(), rest.square().sum()
    held = total - left + torch.cat([sizes.new_zeros(1), sizes.square().cumsum(0)])  # with 0, 1, ... more
    count = min(int((held < threshold * total).sum()), new.shape[1], len(basis) - basis.shape[1])
    new = new[:, :count]
    new, _ = torch.linalg.qr(new - basis @ (basis.T @ new))  # against rounding
    return torch.cat([basis, new], 1)


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose weight is in training and theirs alone (no tied head), by the weight's name."""
    params = trainable(model)
    names = {id(parameter): name for name, parameter in params.items()}
    owners = [(m, id(p)) for m in model.modules() for p in m._parameters.values() if id(p) in names]
    shared = {key for key, count in Counter(key for _, key in owners).items() if count > 1}
    found = {
        names[key]: module
        for module, key in owners
        if isinstance(module, nn.Linear) and key == id(module.weight) and key not in shared
    }
    if not found:
        raise Clash("gpm projects the weights of linear layers, and none is in training")
    return found
