"""Option scores against one full forward pass per option."""

from __future__ import annotations

import random

import pytest
import torch
from tests.engine.conftest import ARCHITECTURES, WINDOW, Notebook, make_model

from meristem.engine import attention, score
from meristem.engine.identity import EngineSettings
from meristem.engine.load import load, wrap
from meristem.engine.score import OptionScore, score_options
from meristem.errors import BadInput

FLOAT32 = EngineSettings(dtype="float32", batch_tokens=96)


@torch.inference_mode()
def brute_force(model, context, option):
    """Sum of log p and whether each token is the argmax; one unpadded sequence, no cache."""
    logits = model(input_ids=torch.tensor([context + option]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)[-len(option) - 1 : -1]
    tokens = torch.tensor(option)
    total = logprobs.gather(1, tokens[:, None]).sum().item()
    return OptionScore(total, bool((logprobs.argmax(-1) == tokens).all()))


def assert_right(model, contexts, options, found):
    for context, choices, scores in zip(contexts, options, found, strict=True):
        for option, (logprob, greedy) in zip(choices, scores, strict=True):
            expected = brute_force(model, context, option)
            assert logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert greedy == expected.greedy


def questions(seed, items=13, longest_context=40, longest_option=6):
    """Random tokens; options of an item often begin alike, some items share a context."""
    rng = random.Random(seed)
    word = lambda low, high: [rng.randrange(2, 258) for _ in range(rng.randint(low, high))]  # noqa: E731
    contexts = [word(1, longest_context) for _ in range(items)]
    contexts[-1] = list(contexts[0])
    options = [[word(1, longest_option) for _ in range(rng.randint(1, 5))] for _ in range(items)]
    for choices in options[::2]:
        choices.append((choices[0] + word(1, 2))[:longest_option])
        choices.append([*choices[0][:-1], 2])
    return contexts, options


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_a_forward_per_option_for_every_architecture(name, tokenizer):
    """40 + 6 tokens pass the sliding windows, so those models get plain rows; so do the ones without a tree mask."""
    engine = wrap(ARCHITECTURES[name](), tokenizer, FLOAT32)
    expected = {"llama": True, "lora": True, "gpt2": True}.get(name, False)
    assert (attention.tree_span(engine.model) > 46) == expected
    contexts, options = questions(1)
    assert_right(engine.model, contexts, options, score_options(engine, contexts, options))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_a_sliding_window_takes_the_tree_mask_where_everything_fits_into_it(name, tokenizer):
    engine = wrap(ARCHITECTURES[name](), tokenizer, FLOAT32)
    assert attention.tree_span(engine.model) == WINDOW
    contexts, options = questions(2, longest_context=WINDOW - 6)
    found = score_options(engine, contexts, options)
    assert sum(fed(engine, contexts, options)) < sum(
        len(c) for c, o in zip(contexts, options, strict=True) for _ in o
    )
    assert_right(engine.model, contexts, options, found)


@pytest.mark.parametrize("longest_option", [1, 2, 30])
def test_short_and_long_options(engine, longest_option):
    contexts, options = questions(longest_option, longest_option=longest_option)
    assert_right(engine.model, contexts, options, score_options(engine, contexts, options))


def test_both_ways_agree(engine, monkeypatch):
    contexts, options = questions(4)
    tree = score_options(engine, contexts, options)
    monkeypatch.setattr(attention, "tree_span", lambda _: 0)
    for left, right in zip(tree, score_options(engine, contexts, options), strict=True):
        assert [s.logprob for s in left] == pytest.approx([s.logprob for s in right], abs=1e-4)
        assert [s.greedy for s in left] == [s.greedy for s in right]


def test_options_that_the_model_would_say_are_greedy(engine):
    context, option = [5, 60, 70], []
    for _ in range(3):
        ids = torch.tensor([context + option])
        option.append(engine.model(input_ids=ids).logits[0, -1].argmax().item())
    scores = score_options(engine, [context], [[option, option[:2], [*option[:2], option[2] ^ 1]]])[0]
    assert [s.greedy for s in scores] == [True, True, False]


def test_an_adapter_changes_the_scores(folders):
    base, adapter = folders
    contexts, options = questions(3)
    tuned = load(adapter, base_folder=base, dtype="float32", batch_tokens=96)
    found = score_options(tuned, contexts, options)
    assert_right(tuned.model, contexts, options, found)
    plain = score_options(load(base, dtype="float32", batch_tokens=96), contexts, options)
    assert (
        max(abs(a[0] - b[0]) for x, y in zip(found, plain, strict=True) for a, b in zip(x, y, strict=True))
        > 0.1
    )


def fed(engine, contexts, options):
    """A work count, not a clock: token positions of each forward."""
    seen = []
    hook = engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_options(engine, contexts, options)
    hook.remove()
    return seen


def test_contexts_are_encoded_once(engine):
    contexts = [[at] * 30 for at in range(2, 8)]
    assert (
        sum(fed(engine, contexts, [[[7], [8], [9]]] * 6)) == 6 * 30
    )  # the last token is predicted, never fed
    assert sum(fed(engine, contexts, [[[7, 8, 9], [8, 9, 7], [9]]] * 6)) == 6 * (30 + 2 + 2)
    assert sum(fed(engine, contexts, [[[7, 8, 9], [7, 9, 7], [7, 8, 2]]] * 6)) == 6 * (
        30 + 3
    )  # common beginnings
    assert sum(fed(engine, [contexts[0]] * 6, [[[7], [8, 9]]] * 6)) == 31  # equal contexts of different items


def test_a_shared_context_does_not_grow_a_tail_without_bound(engine):
    options = [[[2 + at // 200, 2 + at % 200, 5]] for at in range(700)]
    widths = fed(engine, [[9, 9]] * 700, options)
    assert max(widths) <= 2 + 256
    assert sum(widths) < 700 * 4


def test_logits_of_a_long_option_are_bounded(engine, monkeypatch):
    """Perplexity: one option of the whole text. Rows share a forward only while their logits fit the bound."""
    monkeypatch.setattr(score, "LOGIT_ELEMENTS", 258 * 40)
    contexts, options = questions(8, items=6, longest_context=2, longest_option=30)
    sizes = []
    hook = engine.model.get_output_embeddings().register_forward_hook(lambda *a: sizes.append(a[2].shape))
    found = score_options(engine, contexts, options)
    hook.remove()
    assert all(rows == 1 or rows * kept <= 40 for rows, kept, _ in sizes)
    assert_right(engine.model, contexts, options, found)


def test_a_long_text_by_itself_needs_no_mask(engine, monkeypatch):
    monkeypatch.setattr(score, "TAIL", 20)
    masks = []
    hook = engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"].dim()), with_kwargs=True
    )
    text = [2 + at % 200 for at in range(180)]
    found = score_options(
        engine, [[9], [9]], [[text[:60]], [text]]
    )  # the shorter one is a part of the longer
    hook.remove()
    assert set(masks) == {2}
    assert_right(engine.model, [[9], [9]], [[text[:60]], [text]], found)


def test_same_input_gives_the_same_bytes_and_order_follows_the_items(engine):
    contexts, options = questions(5)
    first = score_options(engine, contexts, options)
    assert score_options(engine, contexts, options) == first
    turned = score_options(engine, contexts[::-1], options[::-1])[::-1]
    for left, right in zip(first, turned, strict=True):
        assert [s.logprob for s in left] == pytest.approx([s.logprob for s in right], abs=1e-4)


def test_bf16_logits_are_normalised_in_fp32(tokenizer):
    small = wrap(make_model().bfloat16(), tokenizer, EngineSettings(dtype="bfloat16"))
    scores = score_options(small, [[5, 6, 7]], [[[token] for token in range(258)]])[0]
    assert torch.tensor([s.logprob for s in scores]).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_a_killed_run_resumes_to_the_same_scores(engine):
    contexts, options = questions(6)
    whole = score_options(engine, contexts, options)
    journal = Notebook(limit=2)
    with pytest.raises(KeyboardInterrupt):
        score_options(engine, contexts, options, journal=journal)
    journal.limit = None
    assert score_options(engine, contexts, options, journal=journal) == whole
    assert fed_with(engine, contexts, options, journal) == 0


def fed_with(engine, contexts, options, journal):
    calls = []
    hook = engine.model.register_forward_pre_hook(lambda *_: calls.append(1))
    score_options(engine, contexts, options, journal=journal)
    hook.remove()
    return len(calls)


def test_progress_counts_items(engine):
    contexts, options = questions(7)
    calls = []
    score_options(engine, contexts, options, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (13, 13) and calls == sorted(calls) and len(calls) > 2


@pytest.mark.parametrize(
    ("contexts", "options", "message"),
    [
        ([[1]], [], "1 contexts but 0"),
        ([[]], [[[1]]], "item 0: an empty context"),
        ([[1], [1]], [[[1]], []], "item 1: .* no options"),
        ([[1]], [[[1], []]], "empty option"),
        ([[1] * 255], [[[1, 2, 3]]], "257 tokens, but the model was built for 256"),
    ],
)
def test_refusals(engine, contexts, options, message):
    with pytest.raises(BadInput, match=message):
        score_options(engine, contexts, options)


def test_the_last_token_of_an_option_needs_no_room(engine):
    assert_right(engine.model, [[5] * 255], [[[6, 7]]], score_options(engine, [[5] * 255], [[[6, 7]]]))


def test_logits_that_are_not_finite_are_refused_by_name(tokenizer):
    model = make_model()
    model.get_input_embeddings().weight.data[77] = float("nan")
    broken = wrap(model, tokenizer, FLOAT32)
    contexts, options = [[5, 6], [5, 77]], [[[7], [8]], [[7], [8, 9]]]
    with pytest.raises(BadInput, match="item 1: the log-probabilities are not finite"):
        score_options(broken, contexts, options)
    with pytest.raises(BadInput, match="'b-2': the log"):
        score_options(broken, contexts, options, names=["'b-1'", "'b-2'"])
