"""Loading and identity."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from tests.engine.conftest import ARCHITECTURES, make_tokenizer

from meristem.engine import identity
from meristem.engine.identity import EngineSettings, engine_digest, engine_document
from meristem.engine.load import load, load_for_training
from meristem.errors import BadInput
from meristem.store.canonical import digest_document


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


def test_a_model_without_sdpa_is_loaded_all_the_same(tmp_path, tokenizer):
    ARCHITECTURES["gemma2"]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).model.config._attn_implementation == "eager"


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
