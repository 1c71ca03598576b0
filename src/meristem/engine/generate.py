"""Generation, greedy or sampled, batched by a fixed plan; a prompt is encoded once for all of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from meristem.engine import attention
from meristem.engine.batching import Journal, Progress, plan, run_batches
from meristem.engine.load import Engine
from meristem.errors import BadInput
from meristem.methods.architecture.experts import routed


class Generated(NamedTuple):
    """``tokens``: tokens produced, the stop token included. ``finished``: by a stop token or string, not by length."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class _Way:
    """How to generate: the arguments of ``generate``."""

    max_new_tokens: int
    samples: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]

    def config(self, engine: Engine) -> GenerationConfig:
        sampling = (
            {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        )
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=bool(self.temperature),
            num_beams=1,
            eos_token_id=list(engine.stop_ids) or None,
            pad_token_id=engine.pad_id,
            **sampling,
        )


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    names: Sequence[str] | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[list[Generated]]:
    """``samples`` continuations of every prompt, in the order given.

    ``prompts``: N lists of token ids. ``temperature`` 0 is greedy; above, tokens are drawn from the softmax at that
    temperature, cut to the smallest set with probability ``top_p``. A text ends before the first stop token (end of
    sequence or of turn) or stop string, or after ``max_new_tokens``; special tokens are left out. The draws follow
    from (``seed``, number of the batch) and leave the global random state alone. ``BadInput`` names the prompt that
    is empty or too long, or whose logits are not finite (``names``: what to call the prompts).
    """
    way = _Way(max_new_tokens, samples, temperature, top_p, seed, tuple(stop))
    names = names or [f"prompt {at}" for at in range(len(prompts))]
    _check_way(way)
    _check_prompts(engine, prompts, names, max_new_tokens)
    lengths = [(len(prompt) + max_new_tokens) * samples for prompt in prompts]
    batches = plan(lengths, engine.settings.batch_tokens)
    numbers = {batch: number for number, batch in enumerate(batches.batches)}

    def compute(batch: tuple[int, ...]) -> list[list[list[Any]]]:
        finite = _Finite([names[at] for at in batch], samples)
        return _generate_batch(engine, [prompts[at] for at in batch], way, finite, numbers[batch])

    found = run_batches(batches, compute, journal, progress)
    return [[Generated(*sample) for sample in item] for item in found]


def _check_way(way: _Way) -> None:
    if way.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens must be at least 1, not {way.max_new_tokens}")
    if way.samples < 1:
        raise BadInput(f"samples must be at least 1, not {way.samples}")
    if not 0 <= way.temperature < float("inf"):
        raise BadInput(f"temperature must be 0 (greedy) or a positive number, not {way.temperature}")
    if not 0 < way.top_p <= 1:
        raise BadInput(f"top_p must be above 0 and at most 1, not {way.top_p}")
    if way.samples > 1 and not way.temperature:
        raise BadInput(f"{way.samples} greedy samples would all be equal; set a temperature or samples to 1")
    if not all(way.stop):
        raise BadInput("an empty stop string would end every text at once; leave it out")


def _check_prompts(
    engine: Engine, prompts: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int
) -> None:
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise BadInput(f"{name} is empty")
        if engine.max_length and len(prompt) + max_new_tokens > engine.max_length:
            raise BadInput(
                f"{name}: {len(prompt)} tokens and {max_new_tokens} new ones, but the model was built "
                f"for {engine.max_length}; shorten it or lower max_new_tokens"
            )


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, W) padded on the left, and the mask (B, W) of real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@torch.inference_mode()
def _generate_batch(
    engine: Engine, prompts: list[Sequence[int]], way: _Way, finite: _Finite, number: int
) -> list[list[list[Any]]]:
    """Per prompt and sample: [text, tokens, finished]."""
    ids, mask = left_pad(prompts, engine.pad_id, engine.settings.device)
    with routed(engine.model, lambda: prompts) if way.samples > 1 else nullcontext():
        inputs = _expanded(engine, ids, mask, way.samples)
    stops = _Stops(engine.tokenizer, way.stop, ids.shape[1])
    repeated = routed(engine.model, lambda: [prompt for prompt in prompts for _ in range(way.samples)])
    with repeated, torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(_batch_seed(way.seed, number))
        output = engine.model.generate(
            **inputs,
            generation_config=way.config(engine),
            logits_processor=LogitsProcessorList([finite]),
            stopping_criteria=StoppingCriteriaList([stops] if way.stop else []),
        )
    rows = output[:, ids.shape[1] :].tolist()
    texts = [_text(engine, row, stops.ends.get(at), way.stop) for at, row in enumerate(rows)]
    return [texts[at : at + way.samples] for at in range(0, len(texts), way.samples)]


def _expanded(engine: Engine, ids: torch.Tensor, mask: torch.Tensor, samples: int) -> dict[str, Any]:
    """Inputs with each row repeated ``samples`` times, the keys and values of all tokens but the last computed once.

    Models without a plain key-value cache encode the repeated prompts.
    """
    inputs: dict[str, Any] = {
        "input_ids": ids.repeat_interleave(samples, dim=0),
        "attention_mask": mask.repeat_interleave(samples, dim=0),
    }
    if samples > 1 and ids.shape[1] > 1 and attention.keeps_plain_cache(engine.model):
        given: dict[str, Any] = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
        if attention.accepts(engine.model, "position_ids"):
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if attention.accepts(engine.model, "logits_to_keep"):
            given["logits_to_keep"] = 1
        cache = engine.model(**given, use_cache=True).past_key_values
        cache.batch_repeat_interleave(samples)
        inputs["past_key_values"] = cache
    return inputs


def _batch_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7])


def _text(engine: Engine, tokens: list[int], stopped: int | None, stop: Sequence[str]) -> list[Any]:
    """``stopped``: tokens after which a stop string was there; what follows is padding."""
    tokens = tokens[:stopped]
    end = next((at for at, token in enumerate(tokens) if token in engine.stop_ids), None)
    text = str(engine.tokenizer.decode(tokens[:end], skip_special_tokens=True))
    cut = min((at for at in map(text.find, stop) if at >= 0), default=None)
    count = len(tokens) if end is None else end + 1
    return [text[:cut], count, end is not None or cut is not None]


class _Finite(LogitsProcessor):
    """Refuses logits that are not finite, naming the prompt; greedy search would take them for a token."""

    def __init__(self, names: list[str], samples: int) -> None:
        self.names, self.samples = names, samples

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = ~scores.amax(-1).isfinite()  # amax passes NaN on; -inf alone may mean "never this token"
        if bad.any():
            name = self.names[int(bad.nonzero()[0]) // self.samples]
            raise BadInput(f"{name}: the model's logits are not finite; the model is damaged")
        return scores


@dataclass
class _Stops(StoppingCriteria):
    """Ends a row once one of ``stop`` stands in its text; ``ends`` notes after how many tokens.

    A stop string of m bytes spans at most m tokens, so only the last ones are decoded.
    """

    tokenizer: Any
    stop: tuple[str, ...]
    prompt: int
    ends: dict[int, int] = field(default_factory=dict)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        made = input_ids[:, self.prompt :]
        span = max(len(text.encode()) for text in self.stop) + 4
        for at, row in enumerate(made[:, -span:].tolist()):
            if at not in self.ends:
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                if any(stop in text for stop in self.stop):
                    self.ends[at] = made.shape[1]
        done = [at in self.ends for at in range(len(made))]
        return torch.tensor(done, device=input_ids.device)
