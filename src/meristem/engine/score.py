"""Log-likelihoods of answer options, with every context encoded once.

For a context c and an option o = (o_1 ... o_L)::

    score(c, o) = sum_j log p(o_j | c, o_<j)

One forward per batch. Each row holds a context and, behind it, the options' tokens as a tree (``rows.py``): an
attention mask lets every token see the context and its own branch only, and positions go on after the context on
each branch. So a row costs C + (tokens of the options that are fed) and no key or value is ever copied. Logits are
computed for the tail alone. Models that take no such mask (``attention.tree_span``) get one plain row per option,
padded on the right; options that differ in their last token only still share a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from meristem.engine import attention
from meristem.engine.batching import Journal, Plan, Progress, plan, run_batches
from meristem.engine.load import Engine
from meristem.engine.rows import TAIL, Pair, Row, chain_rows, tree_layout, tree_rows
from meristem.errors import BadInput
from meristem.methods.architecture.experts import of, routed

LOGIT_ELEMENTS = 1 << 26  # logits of one batch, in the model's dtype: 128 MiB in bf16
FLOAT_ELEMENTS = 1 << 23  # logits in fp32 at once: 32 MiB
CPU_TOKENS = 512  # of one forward on a CPU: activations stay in its caches (a third faster than 4,096)

Value = list[Any]  # [log-likelihood, greedy]: an OptionScore as JSON


class OptionScore(NamedTuple):
    """``logprob``: summed log-likelihood in nats; ``greedy``: every token of the option is the most likely one."""

    logprob: float
    greedy: bool


def score_options(
    engine: Engine,
    contexts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    routes: Sequence[Sequence[int]] | None = None,
    names: Sequence[str] | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[list[OptionScore]]:
    """The score of each option of each item, in the order given.

    ``contexts``: N lists of token ids; ``options``: N lists of K_i lists of token ids; ``names``: what to call the
    items in an error; ``routes``: N lists of the tokens that decide the experts of a version that has some (default:
    the contexts, so that no option has a say in it). Equal contexts are encoded once, whichever items they belong to. The batches follow from the
    tokens and the settings alone. ``BadInput`` names the item that is empty, too long for the model, or whose
    log-probabilities are not finite.
    """
    names = names or [f"item {at}" for at in range(len(contexts))]
    _check(engine, contexts, options, names)
    routed_by = (routes or contexts) if of(engine.model) else [()] * len(contexts)
    pairs = [
        (tuple(context), option, tuple(route))
        for context, choices, route in zip(contexts, options, routed_by, strict=True)
        for option in choices
    ]
    owners = [name for name, choices in zip(names, options, strict=True) for _ in choices]
    rows, tree = _rows(engine, pairs)
    batches = _plan(engine, rows, tree)

    def compute(batch: tuple[int, ...]) -> list[list[Value]]:
        return _score_rows(engine, [rows[at] for at in batch], pairs, owners, tree)

    def report(done: int, total: int) -> None:
        if progress:  # in items: a row may serve several, and one may have several rows
            progress(len(contexts) * done // total, len(contexts))

    values = run_batches(batches, compute, journal, report)
    found = {
        number: OptionScore(*value)
        for row, scores in zip(rows, values, strict=True)
        for (number, _), value in zip(row.reads, scores, strict=True)
    }
    order = iter(range(len(pairs)))
    return [[found[next(order)] for _ in choices] for choices in options]


def _check(
    engine: Engine,
    contexts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    names: Sequence[str],
) -> None:
    if not len(contexts) == len(options) == len(names):
        raise BadInput(f"{len(contexts)} contexts but {len(options)} lists of options and {len(names)} names")
    for name, context, choices in zip(names, contexts, options, strict=True):
        if not context or not choices or not all(choices):
            raise BadInput(f"{name}: an empty context, no options, or an empty option")
        fed = len(context) + max(map(len, choices)) - 1  # the last token of an option is predicted only
        if engine.max_length and fed > engine.max_length:
            raise BadInput(
                f"{name}: {fed} tokens, but the model was built for {engine.max_length}; shorten it"
            )


def _rows(engine: Engine, pairs: Sequence[Pair]) -> tuple[list[Row], bool]:
    """The rows, and whether they go under a tree mask: not where the model takes none, nor where it would gain nothing.

    Long texts without a branch (perplexity) save the mask of W x W.
    """
    longest = max((len(context) + len(option) for context, option, _ in pairs), default=0)
    rows = tree_rows(pairs)
    gains = any(row.branches for row in rows) or max((len(row.tokens) for row in rows), default=0) <= TAIL
    if gains and longest <= attention.tree_span(engine.model):
        return rows, True
    return chain_rows(pairs), False


def _plan(engine: Engine, rows: Sequence[Row], tree: bool) -> Plan:
    settings, vocabulary = engine.settings, engine.model.get_output_embeddings().weight.shape[0]
    return plan(
        [row.width for row in rows],
        min(settings.batch_tokens, CPU_TOKENS) if settings.device == "cpu" else settings.batch_tokens,
        outputs=[len(row.tokens) + 1 if tree else row.width for row in rows],
        max_outputs=LOGIT_ELEMENTS // vocabulary,
    )


@torch.inference_mode()
def _score_rows(
    engine: Engine, rows: list[Row], pairs: Sequence[Pair], owners: Sequence[str], tree: bool
) -> list[list[Value]]:
    """The scores of the options on each row, in the order of its ``reads``."""
    with routed(engine.model, lambda: [row.route for row in rows]):
        logits, starts = _tree_logits(engine, rows) if tree else _chain_logits(engine, rows)
    reads = [
        (starts[at] + node, token)
        for at, row in enumerate(rows)
        for number, path in row.reads
        for node, token in zip(path, pairs[number][1], strict=True)
    ]
    looked_up = iter(_look_up(logits, reads))
    scores: list[list[Value]] = []
    for row in rows:
        scores.append([])
        for number, path in row.reads:
            tokens = [next(looked_up) for _ in path]
            logprob = sum(value for value, _ in tokens)
            if logprob - logprob != 0.0:
                raise BadInput(
                    f"{owners[number]}: the log-probabilities are not finite; the model is damaged"
                )
            scores[-1].append([logprob, all(top for _, top in tokens)])
    return scores


def _tree_logits(engine: Engine, rows: list[Row]) -> tuple[torch.Tensor, list[int]]:
    """Logits (B, K, V) of the last K positions, and where in B*K the first node of each row is."""
    device = engine.settings.device
    ids, positions, seen = (torch.from_numpy(part).to(device) for part in tree_layout(rows, engine.pad_id))
    if attention.base_model(engine.model).config.get_text_config()._attn_implementation != "sdpa":
        dtype = engine.model.get_output_embeddings().weight.dtype
        seen = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
    keep = max(len(row.tokens) for row in rows) + 1
    logits = _forward(engine, keep, input_ids=ids, attention_mask=seen[:, None], position_ids=positions)
    return logits, [(at + 1) * keep - len(row.tokens) for at, row in enumerate(rows)]


def _chain_logits(engine: Engine, rows: list[Row]) -> tuple[torch.Tensor, list[int]]:
    """As ``_tree_logits``, from plain sequences padded on the right: what comes later cannot reach back."""
    device = engine.settings.device
    width = max(row.width for row in rows)
    pads = [width - row.width for row in rows]
    filled = [
        [*row.context, *row.tokens] + [engine.pad_id] * pad for row, pad in zip(rows, pads, strict=True)
    ]
    mask = torch.tensor(
        [[1] * row.width + [0] * pad for row, pad in zip(rows, pads, strict=True)], device=device
    )
    first = min(len(row.context) for row in rows) - 1
    keep = width - first
    logits = _forward(engine, keep, input_ids=torch.tensor(filled, device=device), attention_mask=mask)
    return logits, [at * keep + len(row.context) - first for at, row in enumerate(rows)]


def _forward(engine: Engine, keep: int, **inputs: torch.Tensor) -> torch.Tensor:
    if attention.accepts(engine.model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    logits: torch.Tensor = engine.model(**inputs, use_cache=False).logits
    return logits[:, -keep:]


def _look_up(logits: torch.Tensor, reads: list[tuple[int, int]]) -> list[tuple[float, bool]]:
    """(log p, is it the most likely token) of each (position in B*K, token), normalised in fp32."""
    flat = logits.reshape(-1, logits.shape[-1])  # (B*K, V)
    at, token = (torch.tensor(column, device=flat.device) for column in zip(*reads, strict=True))
    used, which = at.unique(return_inverse=True)
    norms, tops = [], []
    for part in used.split(max(1, FLOAT_ELEMENTS // flat.shape[1])):
        chunk = flat[part].float()
        norms.append(chunk.logsumexp(-1))
        tops.append(chunk.argmax(-1))
    logprobs = flat[at, token].float() - torch.cat(norms)[which]
    return list(zip(logprobs.tolist(), (torch.cat(tops)[which] == token).tolist(), strict=True))
