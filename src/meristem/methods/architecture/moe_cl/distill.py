"""A plain LoRA that answers as nearly as it can like a model that no LoRA is equal to, and how nearly that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from meristem.errors import BadInput, NonFiniteLoss
from meristem.experts_format import ExpertEntry, adapter_config
from meristem.methods.architecture._lora import fresh_rows
from meristem.methods.architecture.moe_cl.ffn_experts import Lora, Pair

Batch = dict[str, Tensor]
Teacher = Callable[[Batch], Tensor]

_ADAPTER = "distilled"
_CHUNK = 1024  # positions whose log-probabilities over the vocabulary are in memory at once


@dataclass(frozen=True)
class Fit:
    """Over ``positions`` whose next token was asked for: mean KL(teacher || student) in nats, and how often their
    likeliest tokens are the same one (0 to 1)."""

    kl: float
    agreement: float
    positions: int


@dataclass(frozen=True)
class Distilled:
    """One plain LoRA: full name of a linear layer -> A (rank, d_in), B (d_out, rank), each fp32 on the CPU.

    ``start`` and ``fit``: before and after training, on the held-out rows.
    """

    factors: Mapping[str, Pair]
    rank: int
    alpha: float
    start: Fit
    fit: Fit

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def save(self, folder: Path, task: str) -> None:
        """As a folder that plain PEFT loads."""
        folder.mkdir(parents=True, exist_ok=True)
        entry = ExpertEntry(task=task, rank=self.rank, alpha=self.alpha, targets=list(self.factors))
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config(entry), indent=1) + "\n")
        tensors = {
            f"base_model.model.{name}.lora_{letter}.weight": factor.contiguous()
            for name, pair in self.factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }
        save_file(tensors, folder / "adapter_model.safetensors")


def distill(
    model: Any,
    teacher: Teacher,
    rows: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    start: Lora,
    *,
    rank: int | None = None,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Distilled:
    """The LoRA on ``model`` whose next-token distributions come nearest to the teacher's on ``rows``.

    Minimises the mean over positions of KL(teacher || student), by AdamW (no weight decay, rate falling to 0 linearly,
    gradients clipped at 1), from ``start``: factors and scale, which the result keeps. ``rank`` above that of ``start``
    adds rows of A drawn as PEFT draws them and columns of B that are zero.

    ``model`` is a causal language model without PEFT, and is left as it was. ``teacher``: a batch of ``input_ids`` and
    ``attention_mask`` (batch, length) -> logits (batch, length, vocabulary); it may run on ``model`` itself, whose
    student is switched off meanwhile. Rows: ``input_ids`` (list of ints), and maybe ``labels``, of which -100 leaves the
    token out. ``held_out``: rows of the same kind, none of them in ``rows``, that ``Distilled.fit`` is measured on.

    Raises ``BadInput`` before any compute, ``NonFiniteLoss`` where training diverges.
    """
    _check(rows, held_out, {"steps": steps, "batch_size": batch_size}, learning_rate)
    found = len(next(iter(start.factors.values()))[0])
    rank = found if rank is None else rank
    if rank < found:
        raise BadInput(f"distillation: rank={rank} is below that of its start, {found}; leave it out")
    draw = torch.Generator().manual_seed(seed)
    with _student(model, start, rank, draw) as student:
        device = next(model.parameters()).device
        size = min(batch_size, len(rows))
        before = _measured(student, teacher, held_out, batch_size, device)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        chosen = _shuffled(len(rows), size, draw)
        for step in range(steps):
            batch, predicts = _collated([rows[at] for at in next(chosen)], device)
            loss = _divergence(student, teacher, batch, predicts) / predicts.sum()
            if not torch.isfinite(loss):
                raise NonFiniteLoss(loss.item(), step, [])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            falling.step()
            progress(1)
        after = _measured(student, teacher, held_out, batch_size, device)
        factors = {
            name: (_kept(layer.lora_A), _kept(layer.lora_B))
            for name, layer in _layers(student, start).items()
        }
    return Distilled(factors, rank, start.scale * rank, before, after)


@contextmanager
def _student(model: Any, start: Lora, rank: int, draw: torch.Generator) -> Iterator[Any]:
    """``model`` in eval mode with a LoRA in training; without it again afterwards, everything else as it was."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    training = [module for module in model.modules() if module.training]
    config = LoraConfig(
        r=rank, lora_alpha=start.scale * rank, target_modules=list(start.factors), task_type="CAUSAL_LM"
    )
    student = get_peft_model(model, config, adapter_name=_ADAPTER).eval()
    try:
        with torch.no_grad():
            for name, layer in _layers(student, start).items():
                down, up = start.factors[name]
                if more := rank - len(down):
                    down = torch.cat([down.cpu(), fresh_rows(more, down.shape[1], draw).to(down.dtype)])
                layer.lora_A[_ADAPTER].weight.copy_(down)
                layer.lora_B[_ADAPTER].weight.zero_()[:, : up.shape[1]].copy_(up)
        yield student
    finally:
        student.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learning)
        for module in training:
            module.training = True


def _layers(student: Any, start: Lora) -> dict[str, Any]:
    return {name: student.get_base_model().get_submodule(name) for name in start.factors}


def _kept(factor: Any) -> Tensor:
    return factor[_ADAPTER].weight.detach().float().cpu().clone()


def _collated(rows: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[Batch, Tensor]:
    """A batch padded on the right, and (batch, length), True where the next token is asked for."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    asked = [torch.tensor(_asked(row)) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    batch = {"input_ids": pad_sequence(ids, True), "attention_mask": pad_sequence(ones, True)}
    return {key: value.to(device) for key, value in batch.items()}, pad_sequence(asked, True).to(device)


def _asked(row: Mapping[str, Any]) -> list[bool]:
    labels = row.get("labels", row["input_ids"])
    return [*(label != -100 for label in labels[1:]), False]


def _logits(student: Any, teacher: Teacher, batch: Batch, predicts: Tensor) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's (positions, vocabulary)."""
    with torch.no_grad(), student.disable_adapter():
        theirs = teacher(batch)
    ours = student(**batch, use_cache=False).logits
    if theirs.shape != ours.shape:
        raise BadInput(
            f"distillation: the teacher's logits are {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        )
    return ours[predicts], theirs[predicts].to(ours.device)


def _divergence(student: Any, teacher: Teacher, batch: Batch, predicts: Tensor) -> Tensor:
    """Sum over the positions of KL(teacher || student), in fp32 or finer."""
    pairs = zip(*(part.split(_CHUNK) for part in _logits(student, teacher, batch, predicts)), strict=True)
    return torch.stack([checkpoint(_kl, *pair, use_reentrant=False) for pair in pairs]).sum()


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    kind = torch.promote_types(ours.dtype, torch.float32)
    mine, other = (log_softmax(logits.to(kind), -1) for logits in (ours, theirs))
    return kl_div(mine, other, reduction="sum", log_target=True)


@torch.no_grad()
def _measured(
    student: Any, teacher: Teacher, rows: Sequence[Mapping[str, Any]], batch_size: int, device: torch.device
) -> Fit:
    kl, same, count = 0.0, 0, 0
    for at in range(0, len(rows), batch_size):
        batch, predicts = _collated(rows[at : at + batch_size], device)
        ours, theirs = _logits(student, teacher, batch, predicts)
        kl += sum(float(_kl(*pair)) for pair in zip(ours.split(_CHUNK), theirs.split(_CHUNK), strict=True))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(ours)
    return Fit(kl / count, same / count, count)


def _shuffled(count: int, size: int, draw: torch.Generator) -> Iterator[list[int]]:
    """``size`` of ``count`` numbers at a time, each once before any comes again."""
    left: list[int] = []
    while True:
        while len(left) < size:
            left += torch.randperm(count, generator=draw).tolist()
        yield left[:size]
        left = left[size:]


def _check(
    rows: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Any],
    learning_rate: Any,
) -> None:
    for word, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInput(f"distillation: {word}={value!r} must be a whole number, 1 or more")
    if not isinstance(learning_rate, int | float) or not 0 < learning_rate < float("inf"):
        raise BadInput(f"distillation: learning_rate={learning_rate!r} must be a finite number above 0")
    for word, given in (("rows", rows), ("held_out", held_out)):
        if not len(given):
            raise BadInput(f"distillation: {word} is empty; give rows with input_ids")
        if (bad := next((at for at, row in enumerate(given) if not any(_asked(row))), None)) is not None:
            raise BadInput(f"distillation: row {bad} of {word} has no token to predict; leave it out")
    seen = {tuple(row["input_ids"]) for row in rows}
    if twice := sum(tuple(row["input_ids"]) in seen for row in held_out):
        raise BadInput(
            f"distillation: {twice} of {len(held_out)} held-out rows are trained on too; leave them out of one"
        )
