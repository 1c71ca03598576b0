"""Versions of experts in the engine: routed by the prompt alone, the same answers batched or alone."""

from __future__ import annotations

import pytest
import torch
from tests.engine.conftest import ARCHITECTURES, make_model
from tests.engine.test_score import questions

from meristem.engine.generate import generate
from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.engine.score import score_options
from meristem.experts_format import ExpertEntry, RouterEntry
from meristem.methods.architecture.experts import Expert, Experts

SOFT, BEST = RouterEntry(mode="softmax", temperature=0.1), RouterEntry(mode="top-1")


def composed(router, tokenizer, architecture="llama", batch_tokens=96):
    """An engine with three experts on it that change every answer, and what weighs them."""
    model = ARCHITECTURES[architecture]()
    draw, factors = torch.Generator().manual_seed(3), {}
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            d_out, d_in = layer.weight.shape
            factors[name] = [
                (torch.randn(2, d_in, generator=draw) * 0.5, torch.randn(d_out, 2, generator=draw) * 0.5)
                for _ in range(3)
            ]
    experts = [
        Expert(
            ExpertEntry(task=str(at), rank=2, alpha=2, targets=list(factors)),
            {name: pairs[at] for name, pairs in factors.items()},
            torch.randn(32, generator=draw),
        )
        for at in range(3)
    ]
    return wrap(model, tokenizer, EngineSettings(dtype="float32", batch_tokens=batch_tokens)), Experts(
        model, router, experts
    )


@torch.inference_mode()
def alone(engine, attached, context, option):
    """log p of one option: one unpadded sequence whose experts the context picked."""
    with attached.fixed([context]):
        logits = engine.model(input_ids=torch.tensor([context + option]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)[-len(option) - 1 : -1]
    return logprobs.gather(1, torch.tensor(option)[:, None]).sum().item()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # under a tree mask, and as plain rows
@pytest.mark.parametrize("router", [SOFT, BEST], ids=lambda r: r.mode)
def test_options_are_scored_with_the_experts_of_their_context(router, architecture, tokenizer):
    engine, attached = composed(router, tokenizer, architecture)
    contexts, options = questions(1)
    found = score_options(engine, contexts, options)
    picked = set()
    for context, choices, scores in zip(contexts, options, found, strict=True):
        for option, score in zip(choices, scores, strict=True):
            assert score.logprob == pytest.approx(alone(engine, attached, context, option), abs=1e-4)
            picked.add(int(attached.routing.weights[0].argmax()))
    assert len(picked) > 1
    attached.remove()
    plain = score_options(engine, contexts, options)
    assert any(abs(a.logprob - b.logprob) > 0.1 for a, b in zip(plain[0], found[0], strict=True))


def test_one_context_under_two_routes_is_two_rows(tokenizer):
    """Windows of two texts begin with the same token; each is scored with the experts of its own text."""
    engine, attached = composed(BEST, tokenizer)
    texts = next(
        [[a] * 5, [b] * 5]
        for a in range(2, 60)
        for b in range(a, 60)
        if len({_pick(attached, [a]), _pick(attached, [b])}) == 2
    )
    found = score_options(engine, [[1], [1]], [[[7, 8]], [[7, 8]]], routes=texts)
    for text, [score] in zip(texts, found, strict=True):
        with torch.inference_mode(), attached.fixed([text]):
            logprobs = engine.model(input_ids=torch.tensor([[1, 7, 8]])).logits[0].log_softmax(-1)
        assert score.logprob == pytest.approx(float(logprobs[0, 7] + logprobs[1, 8]), abs=1e-4)
    assert found[0] != found[1]


@pytest.mark.parametrize("router", [SOFT, BEST], ids=lambda r: r.mode)
def test_texts_are_the_same_batched_or_alone(router, tokenizer):
    """In one padded batch, one prompt a batch, several samples of one prompt, and by the model's own ``generate``."""
    engine, attached = composed(router, tokenizer, batch_tokens=4096)
    prompts = [context[:20] for context in questions(2)[0]]
    together = generate(engine, prompts, max_new_tokens=8)
    assert len({_pick(attached, prompt) for prompt in prompts}) > 1
    assert together == [generate(engine, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    sampled = generate(engine, prompts, max_new_tokens=8, samples=3, temperature=1e-6)
    assert [{s.text for s in samples} for samples in sampled] == [{t.text} for [t] in together]
    for prompt, [text] in list(zip(prompts, together, strict=True))[:3]:
        ids = engine.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=list(engine.stop_ids),
            pad_token_id=0,
        )
        assert text.text == engine.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_a_model_without_experts_is_left_alone(tokenizer):
    """Nothing hangs on it, and its rows are grouped as they ever were."""
    model = make_model()
    engine = wrap(model, tokenizer, EngineSettings(dtype="float32", batch_tokens=96))
    contexts, options = questions(1)
    assert score_options(engine, contexts, options) == score_options(
        engine, contexts, options, routes=options[0]
    )
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.modules())


def _pick(attached, prompt):
    with attached.fixed([prompt]):
        return int(attached.routing.weights[0].argmax())
