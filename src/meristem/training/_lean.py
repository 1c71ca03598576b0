"""The trainer's own losses for less work: what the option ``lean`` leaves out because it cannot change them.

**The head.** TRL's fused head projects every position to the vocabulary where Triton is missing, to keep shapes
constant for compilers; the loss needs the labelled ones. They are given to the same kernel, and at most ``CHUNK``
of them at a time, so that a chunk of logits is in memory and not all.

**The inputs of LoRA.** Under bf16 autocast PEFT copies the input of every layer to the fp32 of its factors, and
autocast copies it back for the product; the second copy is kept for the backward pass. The layer's own input, from
which both were made, is the same bits.

Like ``_upstream``, this file touches private names of TRL and PEFT; where one is missing, the trainer's path stands.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from meristem.training import _upstream

CHUNK = 256  # labelled positions whose logits are in memory at once: 250 MB at TRL's 32768 columns
EAGER = ("cpu", "cuda", "mps", "xpu")  # devices that do not compile anew for each shape
_logger = logging.getLogger("meristem.training")


def report(trainer: Any) -> list[str]:
    """What ``lean`` leaves to the trainer's path in this run and why, one line each; logged at INFO."""
    reasons = {
        "the vocabulary layer": _full_head(trainer),
        "the copies of LoRA inputs": _copied_inputs(trainer),
    }
    lines = [f"lean: {part} as the trainer does it: {why}" for part, why in reasons.items() if why]
    for line in lines:
        _logger.info(line)
    return lines


@contextmanager
def labelled_positions(device: torch.device) -> Iterator[None]:
    """Inside, TRL's fused head projects labelled positions only, also on devices without Triton."""
    fused: Any = sys.modules.get("trl.trainer.utils")  # not imported: the trainer is not TRL's
    if not _replaceable(fused) or device.type not in EAGER or fused._use_triton(device):
        yield
        return
    original, function = fused._use_triton, fused._ChunkedLogProbFunction
    fused._use_triton, fused._ChunkedLogProbFunction = lambda _: True, _InChunks(function)
    try:
        yield
    finally:
        fused._use_triton, fused._ChunkedLogProbFunction = original, function


@contextmanager
def uncopied_inputs(model: nn.Module) -> Iterator[None]:
    """Inside, LoRA layers of ``model`` take their inputs as they are wherever autocast rounds them alike."""
    layers = [layer for layer in model.modules() if _may_skip(layer)]
    for layer in layers:
        layer._cast_input_dtype = _Uncopied(layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("_cast_input_dtype", None)


class _InChunks:
    """TRL's autograd function over at most ``CHUNK`` positions at a time."""

    def __init__(self, function: Any):
        self.function = function

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
        """hidden (N, width), targets (N,); per-token results (N,) or None."""
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains or len(hidden) <= CHUNK:  # each chunk would make a gradient as large as the head
            return self.function.apply(hidden, weight, bias, targets, *rest)
        pairs = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        parts = [self.function.apply(some, weight, bias, wanted, *rest) for some, wanted in pairs]
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))


class _Uncopied:
    """PEFT's ``_cast_input_dtype`` of one layer, less the cast that autocast undoes."""

    def __init__(self, layer: Any):
        self.cast = type(layer)._cast_input_dtype.__get__(layer)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        kind = x.device.type
        undone = dtype == torch.float32 and torch.is_autocast_enabled(kind)
        if undone and x.dtype == torch.get_autocast_dtype(kind):
            return x
        cast: Tensor = self.cast(x, dtype)
        return cast


def _may_skip(layer: nn.Module) -> bool:
    """A plain LoRA on a linear layer whose first operation on its input is the product."""
    return (
        type(layer) is LoraLinear
        and hasattr(layer, "_cast_input_dtype")
        and not layer.lora_variant
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    )


def _replaceable(fused: Any) -> bool:
    return hasattr(fused, "_use_triton") and hasattr(fused, "_ChunkedLogProbFunction")


def _full_head(trainer: Any) -> str | None:
    """Why logits of unlabelled positions are computed, or None."""
    if not _upstream.has_fused_head(trainer.model):
        return f"{type(trainer).__name__} runs the model without TRL's fused head"
    if not _replaceable(sys.modules.get("trl.trainer.utils")):
        return "this TRL's fused head is not the one that Meristem knows"
    if trainer.args.device.type not in EAGER:
        return f"{trainer.args.device.type} compiles anew for each shape"
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func reads every logit"
    if getattr(trainer, "label_smoother", None) is not None:
        return "label smoothing reads every logit"
    return None


def _copied_inputs(trainer: Any) -> str | None:
    """Why copies are made in a run under autocast, or None."""
    layers = [layer for layer in trainer.model.modules() if hasattr(layer, "lora_A")]
    if trainer.accelerator.mixed_precision in ("bf16", "fp16") and not all(map(_may_skip, layers)):
        return "dropout, a variant of LoRA or another kind of layer works on them in fp32"
    return None
