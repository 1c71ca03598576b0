"""Option log-probabilities against one full forward pass per option."""

from __future__ import annotations

import random

import pytest
import torch

from meristem.engine.batching import plan
from meristem.engine.identity import EngineSettings
from meristem.engine.load import Engine, load, wrap
from meristem.engine.score import option_logprobs
from meristem.errors import BadInput


@torch.inference_mode()
def naive(model, context, option):
    """Sum of log p, one unpadded sequence, no cache."""
    logits = model(input_ids=torch.tensor([context + option]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[len(context) - 1 + j, token].item() for j, token in enumerate(option))


def questions(seed, items=13, longest_option=6):
    rng = random.Random(seed)
    word = lambda low, high: [rng.randrange(2, 258) for _ in range(rng.randint(low, high))]  # noqa: E731
    contexts = [word(1, 40) for _ in range(items)]
    return contexts, [[word(1, longest_option) for _ in range(rng.randint(1, 5))] for _ in range(items)]


@pytest.mark.parametrize("longest_option", [1, 2, 6])
def test_equals_a_naive_forward_per_option(engine, longest_option):
    contexts, options = questions(longest_option, longest_option=longest_option)
    found = option_logprobs(engine, contexts, options)
    for context, choices, scores in zip(contexts, options, found, strict=True):
        assert scores == pytest.approx([naive(engine.model, context, option) for option in choices], abs=2e-4)


def test_equals_a_naive_forward_with_an_adapter(folders):
    base, adapter = folders
    contexts, options = questions(3)
    tuned = load(adapter, base_folder=base, dtype="float32", batch_tokens=96)
    found = option_logprobs(tuned, contexts, options)
    expected = [
        [naive(tuned.model, c, o) for o in choices] for c, choices in zip(contexts, options, strict=True)
    ]
    for left, right in zip(found, expected, strict=True):
        assert left == pytest.approx(right, abs=2e-4)
    plain = option_logprobs(load(base, dtype="float32", batch_tokens=96), contexts, options)
    assert max(abs(a - b) for x, y in zip(found, plain, strict=True) for a, b in zip(x, y, strict=True)) > 0.1


def test_contexts_are_encoded_once(engine, monkeypatch):
    """A work count, not a clock: token positions that go through the model."""
    seen = []
    original = engine.model.forward

    def counting(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counting)
    contexts = [[5] * 30] * 6
    option_logprobs(engine, contexts, [[[7], [8], [9]]] * 6)
    assert sum(seen) == 6 * 30  # options of one token: no second pass
    seen.clear()
    option_logprobs(engine, contexts, [[[7, 8, 9], [8, 9, 7], [9]]] * 6)
    assert sum(seen) == 6 * 30 + 6 * 2 * 2


def test_same_input_gives_the_same_bytes_and_order_follows_the_items(engine):
    contexts, options = questions(5)
    first = option_logprobs(engine, contexts, options)
    assert option_logprobs(engine, contexts, options) == first
    turned = option_logprobs(engine, contexts[::-1], options[::-1])[::-1]
    for left, right in zip(first, turned, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


def test_bf16_logits_are_normalised_in_fp32(tokenizer):
    from tests.engine.conftest import make_model

    small = wrap(make_model().bfloat16(), tokenizer, EngineSettings(dtype="bfloat16"))
    scores = option_logprobs(small, [[5, 6, 7]], [[[token] for token in range(258)]])[0]
    assert torch.tensor(scores).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_progress_counts_items(engine):
    contexts, options = questions(7)
    calls = []
    option_logprobs(engine, contexts, options, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (13, 13)
    assert len(calls) == len(plan([len(c) for c in contexts], 96).batches)


@pytest.mark.parametrize(
    ("contexts", "options", "message"),
    [
        ([[1]], [], "1 contexts but 0"),
        ([[]], [[[1]]], "empty context"),
        ([[1]], [[]], "no options"),
        ([[1]], [[[1], []]], "empty option"),
        ([[1] * 255], [[[1, 2]]], "257 tokens, but the model was built for 256"),
    ],
)
def test_refusals(engine, contexts, options, message):
    with pytest.raises(BadInput, match=message):
        option_logprobs(engine, contexts, options)


def test_a_damaged_model_is_refused(tokenizer):
    from tests.engine.conftest import make_model

    model = make_model()
    model.lm_head.weight.data[3] = float("nan")
    broken: Engine = wrap(model, tokenizer, EngineSettings(dtype="float32"))
    with pytest.raises(BadInput, match="not finite"):
        option_logprobs(broken, [[5, 6]], [[[7], [8]]])
