"""Generation against transformers' own and against a loop without cache."""

from __future__ import annotations

import pytest
import torch
from tests.engine.conftest import ARCHITECTURES, Notebook, make_model

from meristem.engine import attention
from meristem.engine.generate import Generated, generate
from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.errors import BadInput

PROMPTS = [[5, 60, 70], [9] * 17, [200, 100], [33, 34, 35, 36], [80]]
FLOAT32 = EngineSettings(dtype="float32", batch_tokens=96)
SAMPLED = {"max_new_tokens": 6, "samples": 3, "temperature": 1.0}


@torch.inference_mode()
def greedy(model, prompt, count, stop):
    """One token after the other, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "lora", "gpt2", "mistral", "mamba", "prefix tuning"])
def test_greedy_equals_a_loop_and_transformers(name, tokenizer):
    engine = wrap(ARCHITECTURES[name](), tokenizer, FLOAT32)
    found = generate(engine, PROMPTS, max_new_tokens=8)
    for prompt, [sample] in zip(PROMPTS, found, strict=True):
        tokens = greedy(engine.model, prompt, 8, engine.stop_ids)
        assert sample.text == tokenizer.decode(tokens)
        assert sample.finished == (len(tokens) < 8)
        assert sample.tokens == len(tokens) + sample.finished
        ids = torch.tensor([prompt])
        theirs = engine.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=1,
        )
        assert sample.text == tokenizer.decode(theirs[0, len(prompt) :], skip_special_tokens=True)


def test_a_stop_token_ends_a_text_and_shipped_sampling_is_ignored(tokenizer):
    model = make_model()
    prompt = [5, 60, 70]
    free = greedy(model, prompt, 6, ())
    model.generation_config.eos_token_id = [1, free[2]]
    model.generation_config.repetition_penalty = 50.0
    engine = wrap(model, tokenizer, FLOAT32)
    cut = free.index(free[2])
    found = generate(engine, [prompt], max_new_tokens=6)
    assert found == [[Generated(tokenizer.decode(free[:cut]), cut + 1, True)]]


def test_a_stop_string_ends_a_text(engine):
    [[free], [other]] = generate(engine, [PROMPTS[0], PROMPTS[3]], max_new_tokens=8)
    stop = free.text[:4].strip("\ufffd")[-1]
    assert free.tokens == 8 and not free.finished and stop not in other.text
    tokens = greedy(engine.model, PROMPTS[0], 8, engine.stop_ids)
    needed = next(at for at in range(9) if stop in engine.tokenizer.decode(tokens[:at]))
    found = generate(engine, [PROMPTS[0], PROMPTS[3]], max_new_tokens=8, stop=["never", stop])
    assert found == [[Generated(free.text[: free.text.index(stop)], needed, True)], [other]]


def test_samples_are_deterministic_and_leave_the_global_state_alone(engine):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = generate(engine, PROMPTS, **SAMPLED, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert generate(engine, PROMPTS, **SAMPLED, seed=1) == found
    assert generate(engine, PROMPTS, **SAMPLED, seed=2) != found
    assert [len(samples) for samples in found] == [3] * 5
    assert any(len({s.text for s in samples}) == 3 for samples in found)
    cold = generate(engine, PROMPTS, max_new_tokens=6, samples=2, temperature=1e-4)
    assert [[s.text] * 2 for [s] in generate(engine, PROMPTS, max_new_tokens=6)] == [
        [s.text for s in x] for x in cold
    ]
    narrow = generate(engine, PROMPTS, max_new_tokens=6, samples=2, temperature=1.0, top_p=1e-6)
    assert narrow == cold


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_prompts_are_encoded_once_for_all_samples(name, tokenizer, monkeypatch):
    engine = wrap(ARCHITECTURES[name](), tokenizer, EngineSettings(dtype="float32", batch_tokens=512))
    seen = []
    engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = [[at] * 30 for at in range(2, 6)]
    shared = generate(engine, prompts, **SAMPLED)
    assert seen[0] == 4 * 29 and seen[1] == 4 * 3 and max(seen[1:]) == 4 * 3
    monkeypatch.setattr(attention, "keeps_plain_cache", lambda _: False)
    assert generate(engine, prompts, **SAMPLED) == shared


def test_samples_of_models_without_a_plain_cache(tokenizer):
    for name in ("mamba", "prefix tuning"):
        engine = wrap(ARCHITECTURES[name](), tokenizer, FLOAT32)
        assert generate(engine, PROMPTS, **SAMPLED) == generate(engine, PROMPTS, **SAMPLED)


def test_a_killed_run_resumes_to_the_same_texts(engine):
    whole = generate(engine, PROMPTS, **SAMPLED)
    journal = Notebook(limit=2)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, PROMPTS, **SAMPLED, journal=journal)
    journal.limit = None
    assert generate(engine, PROMPTS, **SAMPLED, journal=journal) == whole


@pytest.mark.parametrize(
    ("prompts", "way", "message"),
    [
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[]], {"max_new_tokens": 4}, "prompt 0 is empty"),
        ([[1] * 250], {"max_new_tokens": 10}, "built for 256"),
        ([[1]], {"max_new_tokens": 4, "samples": 2}, "would all be equal"),
        ([[1]], {"max_new_tokens": 4, "samples": 0}, "samples must be"),
        ([[1]], {"max_new_tokens": 4, "temperature": -1.0}, "temperature must be"),
        ([[1]], {"max_new_tokens": 4, "temperature": 1.0, "top_p": 0.0}, "top_p must be"),
        ([[1]], {"max_new_tokens": 4, "stop": [""]}, "empty stop string"),
    ],
)
def test_refusals(engine, prompts, way, message):
    with pytest.raises(BadInput, match=message):
        generate(engine, prompts, **way)


def test_logits_that_are_not_finite_are_refused_by_name(tokenizer):
    model = make_model()
    model.get_input_embeddings().weight.data[77] = float("nan")
    broken = wrap(model, tokenizer, FLOAT32)
    with pytest.raises(BadInput, match="prompt 1: the model's logits are not finite"):
        generate(broken, [[5, 6], [5, 77]], max_new_tokens=3)
    with pytest.raises(BadInput, match="'b-2'"):
        generate(broken, [[5, 6], [5, 77]], **SAMPLED, names=["'b-1'", "'b-2'"])
