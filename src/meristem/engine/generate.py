"""Greedy generation, batched by a fixed plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from meristem.engine.batching import plan
from meristem.engine.load import Engine
from meristem.engine.score import Progress, left_pad
from meristem.errors import BadInput


@torch.inference_mode()
def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy continuation of every prompt as text, in the order given.

    ``prompts``: N lists of token ids. A text ends before the first stop token (end of sequence or end
    of turn) or after ``max_new_tokens``; special tokens are left out.
    """
    _check(engine, prompts, max_new_tokens)
    batches = plan([len(prompt) + max_new_tokens for prompt in prompts], engine.settings.batch_tokens)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(engine.stop_ids) or None,
        pad_token_id=engine.pad_id,
    )
    texts: list[str] = []
    for batch in batches.batches:
        texts += _generate_batch(engine, [prompts[i] for i in batch], config)
        if progress:
            progress(len(texts), batches.count)
    return batches.restore(texts)


def _check(engine: Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    for at, prompt in enumerate(prompts):
        if not prompt:
            raise BadInput(f"prompt {at} is empty")
        if engine.max_length and len(prompt) + max_new_tokens > engine.max_length:
            raise BadInput(
                f"prompt {at}: {len(prompt)} tokens and {max_new_tokens} new ones, but the model was built "
                f"for {engine.max_length}; shorten it or lower max_new_tokens"
            )


def _generate_batch(engine: Engine, prompts: list[Sequence[int]], config: GenerationConfig) -> list[str]:
    ids, mask = left_pad(prompts, engine.pad_id, engine.settings.device)
    output = engine.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_text(engine, row) for row in output[:, ids.shape[1] :].tolist()]


def _text(engine: Engine, tokens: list[int]) -> str:
    stop = next((at for at, token in enumerate(tokens) if token in engine.stop_ids), len(tokens))
    return str(engine.tokenizer.decode(tokens[:stop], skip_special_tokens=True))
