"""Checkouts: byte-checked copies that load as they are, and a cache that mends itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.ecosystem import hf
from tests.tiny import tiny_model

from meristem.ecosystem import checkouts, folders, models, versions
from meristem.errors import BadInput, EnvironmentFailure, Tampered


@pytest.fixture
def adapted(add, tmp_path):
    """A version that is an adapter over ``base``."""
    add("base")
    return add("tuned", "industrial", base="base", source=hf.adapter(tmp_path / "adapter"))


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_holds_the_version_and_says_which(store, add, tmp_path):
    version = add("base")
    made = checkouts.export(store, version, tmp_path / "new" / "out")
    assert (made.folder, made.base_folder) == (tmp_path / "new" / "out", None)
    about = json.loads((made.folder / "meristem.json").read_text())
    assert about == {"version": "base@v1", "digest": version.digest, "content": version.content, "base": None}
    with folders.ingest(made.folder) as (content, _):
        assert content.digest == version.content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_exported_adapter_brings_its_base(store, adapted, tmp_path):
    made = checkouts.export(store, adapted, tmp_path / "out")
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made.base_folder) == str(tmp_path / "out" / "base")
    with store.database.read() as connection:
        base = versions.resolve(connection, "base")
    with folders.ingest(made.base_folder) as (content, _):
        assert content.digest == base.content


def test_an_export_takes_an_empty_folder_and_no_other(store, add, tmp_path):
    version = add("base")
    out = tmp_path / "out"
    out.mkdir()
    checkouts.export(store, version, out)
    before = listing(out)
    with pytest.raises(BadInput, match="not empty"):
        checkouts.export(store, version, out)
    assert listing(out) == before
    with pytest.raises(BadInput, match="this is a file"):
        checkouts.export(store, version, out / "config.json")


def test_a_failed_export_leaves_nothing(store, add, tmp_path, monkeypatch):
    version = add("base")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_weights", full)
    with pytest.raises(EnvironmentFailure, match="free some space"):
        checkouts.export(store, version, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_an_export_of_damaged_bytes_is_refused_and_leaves_nothing(store, add, tmp_path):
    version = add("base")
    (pack,) = store.packs.root.glob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-40] + bytes(40))
    with pytest.raises(Tampered):
        checkouts.export(store, version, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_cache_is_made_once(store, adapted, monkeypatch):
    made = checkouts.cached(store, adapted.content)
    assert made.base_folder is not None
    monkeypatch.setattr(folders, "checkout", None)
    assert checkouts.cached(store, adapted.content) == made


def _flip(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x00")


def _reword(folder):
    (folder / "adapter_config.json").write_text("[]")


def _repoint(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/stranger"}))


def _lose(folder):
    (folder / "adapter_config.json").unlink()


def _add(folder):
    (folder / "chat_template.jinja").write_text("another prompt")


def _rename_tensors(folder):
    save_file({"x": np.zeros(3, np.float32)}, folder / "adapter_model.safetensors")


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [_flip, _reword, _repoint, _lose, _add, _rename_tensors, _empty])
def test_a_damaged_cache_is_built_again(store, adapted, damage):
    made = checkouts.cached(store, adapted.content)
    good = listing(made.folder)
    damage(made.folder)
    assert listing(checkouts.cached(store, adapted.content).folder) == good
    assert {path.name for path in made.folder.parent.iterdir()} == {made.folder.name, made.base_folder.name}


def test_two_processes_may_build_the_same_cache(store, add, monkeypatch):
    """The other one finishes between our check and our rename."""
    version = add("base")
    slow, honest = [], folders.checkout

    def raced(*args, **options):
        if not slow:
            slow.append(True)
            checkouts.cached(store, version.content)
        honest(*args, **options)

    monkeypatch.setattr(folders, "checkout", raced)
    made = checkouts.cached(store, version.content)
    with store.database.read() as connection:
        assert folders.matches(versions.content_of(connection, version.content), made.folder)
    assert [path.name for path in made.folder.parent.iterdir()] == [made.folder.name]


def test_a_checkout_loads_in_plain_transformers_and_peft_with_the_same_output(store, tmp_path):
    """A real (tiny) model and LoRA adapter: greedy tokens before storing and after a checkout are equal."""
    import torch
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model(tmp_path / "model")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-2, 2, parameter.numel()).reshape(parameter.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    models.add(store, "kim", "base", "foundation", str(tmp_path / "model"), None)
    models.add(store, "kim", "tuned", "industrial", str(tmp_path / "adapter"), "base")
    with store.database.read() as connection:
        entries = {name: versions.resolve(connection, name) for name in ("base", "tuned")}
    out = {
        name: checkouts.export(store, entry, tmp_path / f"out-{name}").folder
        for name, entry in entries.items()
    }

    def greedy(model, folder):
        tokens = AutoTokenizer.from_pretrained(folder)("the quick brown fox", return_tensors="pt")
        return model.eval().generate(**tokens, max_new_tokens=8, do_sample=False).tolist()

    base = greedy(AutoModelForCausalLM.from_pretrained(out["base"]), out["base"])
    assert base == greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "model")
    adapted = greedy(AutoPeftModelForCausalLM.from_pretrained(out["tuned"]), out["base"])
    assert adapted == greedy(tuned, tmp_path / "model")
    over = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out["tuned"] / "base"), out["tuned"]
    )
    assert greedy(over, out["base"]) == adapted
