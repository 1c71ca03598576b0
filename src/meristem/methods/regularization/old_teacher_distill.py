"""Distillation from the model as it was before the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.utils.checkpoint import checkpoint

from meristem.errors import BadInput, Clash
from meristem.methods._weights import check_fits, named, snapshot, swapped, taken
from meristem.methods.base import Context, Method, MethodState, Params, Step, trainable

FORWARD = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
CHUNK = 1024  # positions whose log-probabilities over the vocabulary are in memory at once


class OldTeacherDistill(Method):
    """Keeps the model's answers on the new data near those that it gave before the update.

    Over the N positions of a micro-batch whose next token is labelled (the completion), with z (N, vocabulary)
    the logits and h (N, width) the last hidden states of the model (new) and of the teacher (old),

        loss = strength T^2 / N sum_n KL(softmax(z_old_n / T) || softmax(z_new_n / T))
             + hidden / (N width) sum_n |h_new_n - h_old_n|^2

    with T = ``temperature``; T^2 keeps the gradient's size when T changes (Hinton et al. 2015). In LwF the first
    term is the cross-entropy to the teacher: the same gradient, less a constant and without T^2. It is added
    to the trainer's own loss, once for each micro-batch.

    The teacher is the model as it was before this update, in eval mode, on the same base weights. Where the
    update trains a fresh LoRA (all B = 0) it is the same model with the adapter off, or the run's
    ``reference_model``. Otherwise a frozen copy of the *trained* parameters is exchanged with them for the
    teacher's forward: one more adapter in memory where an adapter is continued, one more model only where all
    weights are trained. Logits are computed at labelled positions only, in chunks of 1024 for the gradient.

    Needs a causal language model and batches with ``labels`` or ``completion_mask`` (SFT, DPO); not with
    sharded weights.

    Source: Li & Hoiem 2016, "Learning without Forgetting" (arXiv 1606.09282); Hinton et al. 2015 (arXiv
    1503.02531). Claims: less forgetting. Stages: cpt, cit, ca. State: none between updates, whatever the
    number of tasks; inside a checkpoint ``teacher.*``, the copy of the trained parameters, if there is one.
    """

    name = "old-teacher-distill"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit", "ca"})
    weight_copies = 1
    sharded = False
    needs = frozenset({"next-token"})

    def __init__(self, strength: float = 1.0, temperature: float = 2.0, hidden: float = 0.0) -> None:
        for word, value in (("strength", strength), ("hidden", hidden)):
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise BadInput(f"old-teacher-distill: {word}={value!r} must be a finite number, 0 or more")
        if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
            raise BadInput(
                f"old-teacher-distill: temperature={temperature!r} must be a finite number above 0"
            )
        self.strength, self.temperature, self.hidden = float(strength), float(temperature), float(hidden)
        self.teacher: dict[str, Tensor] = {}  # trained parameters from before the update; empty: adapter off
        self._ended = False  # the update is over: its teacher is not the next one's

    def prepare_model(self, model: nn.Module, ctx: Context) -> None:
        params = trainable(model)
        if _head(model) is None:
            raise Clash(
                f"method {self.name} compares next-token distributions, and this model has no language-model head"
            )
        self.teacher = {} if _adds_nothing(params) else snapshot(params)

    def loss(self, step: Step) -> Tensor | None:
        self._ended = False
        predicts = _predicts(step)
        if step.hidden is None or not predicts.any():
            return None
        new = _real(step.hidden, predicts)[predicts]
        with torch.no_grad(), self._old(step) as teacher, _evaluating(teacher):
            inputs = {key: step.inputs[key] for key in FORWARD if key in step.inputs}
            output = _backbone(teacher)(**inputs, use_cache=False)
            old = _real(output.last_hidden_state, predicts)[predicts]
            logits = _logits(teacher, old) if self.strength else None
        total = new.new_zeros((), dtype=torch.float32)
        if logits is not None:
            total = total + self.strength * self._divergence(step.model, new, logits)
        if self.hidden:
            if new.shape != old.shape:
                raise Clash(f"method {self.name}: hidden={self.hidden} needs a teacher of the same width")
            total = total + self.hidden * mse_loss(new.float(), old.float())
        return total

    def finish(self, ctx: Context) -> None:
        self._ended = True

    def state_dict(self) -> MethodState:
        return {"tensors": {} if self._ended else named("teacher", self.teacher), "json": {}}

    def load_state_dict(self, state: MethodState) -> None:
        teacher = taken("teacher", state["tensors"])
        if self.teacher:
            check_fits(self.name, teacher, self.teacher)
        self.teacher = teacher

    @contextmanager
    def _old(self, step: Step) -> Iterator[Any]:
        """The teacher: adapter off, or the old values in place of the trained ones."""
        if not self.teacher:
            with step.reference() as model:
                yield model
            return
        params = trainable(step.model)
        for name, value in self.teacher.items():
            self.teacher[name] = value.to(params[name].device)
        with swapped(params, self.teacher):
            yield step.model

    def _divergence(self, model: Any, new: Tensor, logits: Tensor) -> Tensor:
        """T^2 times the mean of KL(old || new) over the positions."""

        def part(hidden: Tensor, old: Tensor) -> Tensor:
            mine = log_softmax(_logits(model, hidden).float() / self.temperature, -1)
            theirs = log_softmax(old.float() / self.temperature, -1)
            return kl_div(mine, theirs, reduction="sum", log_target=True)

        if len(new) <= CHUNK:
            total = part(new, logits)
        else:  # the backward pass computes each chunk again
            pairs = zip(new.split(CHUNK), logits.split(CHUNK), strict=True)
            total = sum((checkpoint(part, *pair, use_reentrant=False) for pair in pairs), new.new_zeros(()))
        return total * self.temperature**2 / len(new)


def _adds_nothing(params: Params) -> bool:
    """Whether the trained parameters are LoRA factors with all B = 0, so that the adapter changes nothing yet."""
    kinds = {
        name: next(
            (k for k in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") if f".{k}." in name), ""
        )
        for name in params
    }
    return all(kinds.values()) and not any(
        kind.endswith("B") and params[name].any() for name, kind in kinds.items()
    )


def _predicts(step: Step) -> Tensor:
    """(batch, length), True where the token that follows is labelled."""
    inputs: Mapping[str, Tensor] = step.inputs
    if "labels" in inputs:
        labelled = inputs["labels"] != -100
    elif "completion_mask" in inputs:
        labelled = inputs["completion_mask"].bool()
    else:
        raise Clash(
            f"method {OldTeacherDistill.name} needs labels or completion_mask, this trainer's batches have {sorted(inputs)}"
        )
    return torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)


def _real(hidden: Tensor, predicts: Tensor) -> Tensor:
    """``hidden`` without the virtual tokens that prompt tuning puts in front."""
    return hidden[:, -predicts.shape[1] :]


def _causal(model: Any) -> Any:
    """The Hugging Face model under DDP, ``torch.compile`` and PEFT."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _backbone(model: Any) -> Any:
    return _causal(model).base_model


def _head(model: Any) -> Any:
    return _causal(model).get_output_embeddings()


def _logits(model: Any, hidden: Tensor) -> Tensor:
    """What the model's own forward makes of last hidden states: head, scale (Cohere, Granite), soft cap (Gemma)."""
    config = _causal(model).config.get_text_config()
    logits = _head(model)(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing inside the block; each module's mode comes back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
