"""Prompts as served, options behind them, and what is cut."""

from __future__ import annotations

import pytest
from tests.engine.conftest import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.engine.prompts import encode_options, encode_prompt, fit, render
from meristem.errors import BadInput

CHAT = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]


def test_a_chat_uses_the_template_as_served(engine):
    assert engine.tokenizer.decode(encode_prompt(engine, "hi")) == "<|user|>hi<end><|assistant|>"
    assert (
        encode_prompt(engine, CHAT)
        == engine.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    )
    context, options = encode_options(engine, CHAT, ["yes", "no"])
    assert context == encode_prompt(engine, CHAT)
    assert [engine.tokenizer.decode(option) for option in options] == ["yes", "no"]


@pytest.mark.parametrize("chat", [True, False])
def test_text_is_plain(chat):
    engine = wrap(make_model(), make_tokenizer(chat=chat), EngineSettings(dtype="float32"))
    format = "text" if chat else "chat"  # without a template a chat is text
    assert render(engine, CHAT, format) == "a\n\nb"
    assert engine.tokenizer.decode(encode_prompt(engine, CHAT, format)) == "a\n\nb"
    context, options = encode_options(engine, "Answer:", ["yes", "no"], format)
    assert engine.tokenizer.decode(context) == "Answer:"
    assert [engine.tokenizer.decode(o) for o in options] == [" yes", " no"]


def test_white_space_before_an_option_belongs_to_it(engine):
    context, options = encode_options(engine, "Answer:\n", ["yes"], "text")
    assert [engine.tokenizer.decode(part) for part in (context, *options)] == ["Answer:", "\n yes"]


def merging_tokenizer():
    """Begins every text with <s>, and has one token for "s y", so that the seam of "is yes" is inside a word."""
    from tokenizers import Tokenizer, models, processors

    words = ["<pad>", "<s>", "i", "s", " ", "y", "e", "n", "o", "s ", " y", "ye"]
    vocabulary = {word: at for at, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "y"), ("y", "e")]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


def test_joint_tokenization_equals_the_harness():
    """The same tokens as lm-evaluation-harness's ``_encode_pair`` gives on its own model class."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = merging_tokenizer()
    model = make_model()
    engine = wrap(model, tokenizer, EngineSettings(dtype="float32"))
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", add_bos_token=True)
    for prompt in ("is", "is ", "yes is no"):
        context, options = encode_options(engine, prompt, ["yes", "no"], "text")
        expected = [harness._encode_pair(prompt, f" {option}") for option in ("yes", "no")]
        assert [(context, option) for option in options] == expected


def test_refusals(engine):
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(BadInput, match="no system messages"):
        encode_prompt(wrap(make_model(), refusing, EngineSettings()), "x")
    with pytest.raises(BadInput, match="option '' has no tokens"):
        encode_options(engine, "x", ["a", ""])
    with pytest.raises(BadInput, match="prompt has no tokens"):
        encode_prompt(engine, "", "text")


def test_fit_cuts_the_side_it_is_told_and_counts():
    assert fit([1, 2, 3], None) == ([1, 2, 3], 0)
    assert fit([1, 2, 3], 3) == ([1, 2, 3], 0)
    assert fit([1, 2, 3, 4], 3, "left") == ([2, 3, 4], 1)
    assert fit([1, 2, 3, 4], 1, "right") == ([1], 3)
    with pytest.raises(BadInput, match="4 tokens, but there is room for 3"):
        fit([1, 2, 3, 4], 3)
    with pytest.raises(BadInput, match="fills the model's window alone"):
        fit([1, 2], -4, "left")
