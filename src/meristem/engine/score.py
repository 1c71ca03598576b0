"""Log-likelihoods of answer options, with every context encoded once.

For a context c and an option o = (o_1 ... o_L)::

    score(c, o) = sum_j log p(o_j | c, o_<j)

One pass over the contexts gives log p(o_1 | c) for *all* options of an item from one row of logits, and
the keys and values of c. Options of one token are done. The others run as rows of L-1 tokens over the
cached context, which is repeated per option: rows x (L-1) tokens instead of rows x (C+L).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from meristem.engine.batching import plan
from meristem.engine.load import Engine
from meristem.errors import BadInput

Progress = Callable[[int, int], None]
LOGIT_ELEMENTS = 1 << 26  # fp32 logits held at once: 256 MiB


@torch.inference_mode()
def option_logprobs(
    engine: Engine,
    contexts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    progress: Progress | None = None,
) -> list[list[float]]:
    """Summed log-likelihood of each option of each item, fp32, in the order given.

    ``contexts``: N lists of token ids; ``options``: N lists of K_i lists of token ids. The batches
    follow from the lengths and the settings alone (``batching.plan``).
    """
    _check(engine, contexts, options)
    batches = plan([len(context) for context in contexts], engine.settings.batch_tokens)
    found: list[list[float]] = []
    for batch in batches.batches:
        found += _score_batch(engine, [contexts[i] for i in batch], [options[i] for i in batch])
        if progress:
            progress(len(found), batches.count)
    return batches.restore(found)


def _check(
    engine: Engine, contexts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]]
) -> None:
    if len(contexts) != len(options):
        raise BadInput(f"{len(contexts)} contexts but {len(options)} lists of options")
    for at, (context, choices) in enumerate(zip(contexts, options, strict=True)):
        if not context or not choices or not all(choices):
            raise BadInput(f"item {at}: an empty context, no options, or an empty option")
        length = len(context) + max(map(len, choices))
        if engine.max_length and length > engine.max_length:
            raise BadInput(
                f"item {at}: {length} tokens, but the model was built for {engine.max_length}; shorten it"
            )


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, W) padded on the left, and the mask (B, W) of real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _score_batch(
    engine: Engine, contexts: list[Sequence[int]], options: list[Sequence[Sequence[int]]]
) -> list[list[float]]:
    ids, mask = left_pad(contexts, engine.pad_id, engine.settings.device)
    more = any(len(option) > 1 for choices in options for option in choices)
    output = engine.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=more,
        logits_to_keep=1,
    )
    first = torch.log_softmax(output.logits[:, -1].float(), dim=-1)  # (B, V)
    scores = [[first[row, option[0]].item() for option in choices] for row, choices in enumerate(options)]
    if more:
        _add_continuations(engine, output.past_key_values, mask, options, scores)
    if not all(map(_finite, (score for row in scores for score in row))):
        raise BadInput("the model's log-probabilities are not finite; its weights are damaged")
    return scores


def _finite(value: float) -> bool:
    return value - value == 0.0


def _add_continuations(
    engine: Engine,
    cache: Any,
    mask: torch.Tensor,
    options: list[Sequence[Sequence[int]]],
    scores: list[list[float]],
) -> None:
    """Add sum_{j>1} log p(o_j | c, o_<j) to ``scores``, in chunks of (item, option) rows."""
    rows = [(i, k) for i, choices in enumerate(options) for k in range(len(choices)) if len(choices[k]) > 1]
    lengths = [len(options[i][k]) - 1 for i, k in rows]
    for chunk in plan(lengths, _continuation_tokens(engine, mask.shape[1])).batches:
        members = [rows[at] for at in chunk]
        sums = _continuations(engine, cache, mask, members, [options[i][k] for i, k in members])
        for (i, k), value in zip(members, sums, strict=True):
            scores[i][k] += value


def _continuation_tokens(engine: Engine, context_width: int) -> int:
    """Bound of rows x (L-1) for one chunk: its logits and its repeated cache must stay small."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    repeated = 8 * engine.settings.batch_tokens // context_width  # each row repeats the whole context
    return max(1, min(LOGIT_ELEMENTS // vocabulary, repeated))


def _continuations(
    engine: Engine, cache: Any, mask: torch.Tensor, members: list[tuple[int, int]], texts: list[Sequence[int]]
) -> list[float]:
    """Rows (R) of options padded on the right to (R, L): feed o_1..o_{L-1}, read o_2..o_L."""
    device = mask.device
    width = max(map(len, texts))
    padded = torch.tensor([list(t) + [engine.pad_id] * (width - len(t)) for t in texts], device=device)
    real = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=device)
    items = torch.tensor([i for i, _ in members], device=device)
    context = mask[items]  # (R, C)
    start = context.sum(-1, keepdim=True)
    logits = engine.model(
        input_ids=padded[:, :-1],
        attention_mask=torch.cat([context, real[:, :-1]], dim=1),
        position_ids=start + torch.arange(width - 1, device=device),
        past_key_values=_repeated(cache, items),
        use_cache=True,
    ).logits.float()  # (R, L-1, V)
    targets = padded[:, 1:]
    logprobs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    values: list[float] = torch.where(real[:, 1:].bool(), logprobs, 0.0).sum(-1).tolist()
    return values


def _repeated(cache: Any, items: torch.Tensor) -> Any:
    """A cache whose row r is row ``items[r]`` of ``cache``, which stays as it was."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    new.batch_select_indices(items)
    return new
