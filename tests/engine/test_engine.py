"""Loading, prompts, generation, identity, batch plans."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.conftest import make_model, make_tokenizer

from meristem.engine import identity
from meristem.engine.batching import plan
from meristem.engine.generate import generate
from meristem.engine.identity import EngineSettings, engine_digest, engine_document
from meristem.engine.load import load, load_for_training, wrap
from meristem.engine.prompts import encode_option, encode_prompt
from meristem.errors import BadInput
from meristem.store.canonical import digest_document


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


def test_generation_equals_a_naive_greedy_loop(engine):
    prompts = [[5, 60, 70], [9] * 17, [200, 100], [33, 34, 35, 36], [80]]
    expected = [engine.tokenizer.decode(greedy(engine.model, p, 8, engine.stop_ids)) for p in prompts]
    assert generate(engine, prompts, 8) == expected
    assert generate(engine, prompts, 8) == expected


def test_generation_stops_at_the_stop_token_and_ignores_shipped_sampling(tokenizer):
    model = make_model()
    prompt = [5, 60, 70]
    free = greedy(model, prompt, 6, ())
    model.generation_config.eos_token_id = [1, free[2]]
    model.generation_config.repetition_penalty = 50.0
    engine = wrap(model, tokenizer, EngineSettings(dtype="float32"))
    assert free[2] in engine.stop_ids
    cut = free.index(free[2])
    assert generate(engine, [prompt], 6) == [tokenizer.decode(free[:cut])]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [([[1]], 0, "at least 1"), ([[]], 4, "prompt 0 is empty"), ([[1] * 250], 10, "built for 256")],
)
def test_generation_refusals(engine, prompts, count, message):
    with pytest.raises(BadInput, match=message):
        generate(engine, prompts, count)


def test_prompts_use_the_chat_template_as_served(engine):
    text = engine.tokenizer.decode(encode_prompt(engine, "hi"))
    assert text == "<|user|>hi<end><|assistant|>"
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert (
        engine.tokenizer.decode(encode_prompt(engine, chat)) == "<|system|>a<end><|user|>b<end><|assistant|>"
    )
    assert engine.tokenizer.decode(encode_option(engine, "yes")) == "yes"


def test_prompts_without_a_template_are_plain():
    engine = wrap(make_model(), make_tokenizer(chat=False), EngineSettings(dtype="float32"))
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert engine.tokenizer.decode(encode_prompt(engine, chat)) == "a\n\nb"
    assert engine.tokenizer.decode(encode_option(engine, "yes")) == " yes"


def test_prompt_refusals(engine, tokenizer):
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(BadInput, match="no system messages"):
        encode_prompt(wrap(make_model(), refusing, EngineSettings()), "x")
    with pytest.raises(BadInput, match="no tokens"):
        encode_option(engine, "")


def test_load_sets_dtype_eval_and_sdpa(folders):
    base, adapter = folders
    plain = load(base)
    assert plain.model.dtype == torch.bfloat16
    assert plain.model.config._attn_implementation == "sdpa"
    tuned = load(adapter, base_folder=base)
    assert not tuned.model.training
    by_kind = {("lora" in name, p.dtype) for name, p in tuned.model.named_parameters()}
    assert by_kind == {(False, torch.bfloat16), (True, torch.float32)}, "as plain PEFT loads it"
    assert tuned.stop_ids == plain.stop_ids == (1,)
    assert tuned.max_length == 256
    assert tuned.digest == plain.digest == engine_digest(EngineSettings())


def test_an_adapter_s_own_tokenizer_serves_scoring_and_training(folders, tmp_path, tokenizer):
    base, adapter = folders
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    for folder, template in ((adapter, tokenizer.chat_template), (own, "{{ messages[0].content }}")):
        if folder == own:
            changed = make_tokenizer()
            changed.chat_template = template
            changed.save_pretrained(own)
        scoring = load(folder, base_folder=base).tokenizer
        _, training = load_for_training(folder, base, "float32")
        assert scoring.chat_template == training.chat_template == template


def test_load_refusals(folders, tmp_path):
    base, adapter = folders
    with pytest.raises(BadInput, match="needs base_folder"):
        load(adapter)
    with pytest.raises(BadInput, match="no adapter folder"):
        load(base, base_folder=base)
    with pytest.raises(BadInput, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(BadInput, match="dtype 'int4'"):
        load(base, dtype="int4")
    with pytest.raises(BadInput, match="device 'gpu': a device is cpu, cuda"):
        load(base, device="gpu")
    with pytest.raises(BadInput, match=r"device 'cuda:99': \w+ CUDA devices here"):
        load(base, device="cuda:99")
    with pytest.raises(BadInput, match="batch_tokens"):
        load(base, batch_tokens=0)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"no adapter_model\.safetensors"):
        load(tmp_path / "pickled", base_folder=base)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((base / "config.json").read_text())
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(tmp_path / "bare")


def test_engine_digest_follows_every_setting_and_needs_no_torch(monkeypatch):
    settings = [
        EngineSettings(),
        EngineSettings(dtype="float32"),
        EngineSettings(device="cuda"),
        EngineSettings(attention="eager"),
        EngineSettings(batch_tokens=1),
    ]
    assert len({engine_digest(one) for one in settings}) == len(settings)
    document = engine_document(settings[0])
    assert document["scoring"] == identity.SCORING and document["libraries"]["tokenizers"]
    with monkeypatch.context() as patched:
        patched.setattr(identity, "SCORING", identity.SCORING + 1)
        assert engine_digest(settings[0]) != digest_document(document)
    assert engine_digest(settings[0]) == digest_document(document)
    code = (
        "import sys, meristem.engine.identity as i, meristem.evaluation.run, meristem.evaluation.verdicts;"
        "print(i.engine_digest(i.EngineSettings())); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == engine_digest(EngineSettings())


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200), st.integers(1, 9))
def test_plan_is_a_bounded_permutation_with_an_inverse(lengths, bound, rows):
    made = plan(lengths, bound, rows)
    assert sorted(made.order()) == list(range(len(lengths)))
    assert made == plan(lengths, bound, rows)
    for batch in made.batches:
        width = max(lengths[i] for i in batch)
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * width <= bound
    values = [f"item {i}" for i in made.order()]
    assert made.restore(values) == [f"item {i}" for i in range(len(lengths))]
