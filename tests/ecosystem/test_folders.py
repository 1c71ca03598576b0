"""Folders in and out of the store: what belongs to a model, what is refused, and that the same comes out again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.ecosystem import hf

from meristem.ecosystem import folders
from meristem.ecosystem.records import Content
from meristem.errors import BadInput, Tampered

BASE = "sha256:" + "b" * 64


def content_of(folder, base=None):
    with folders.ingest(folder, base) as (content, _):
        return content


def put(store, folder, base=None):
    with folders.ingest(folder, base) as (content, blobs):
        stored = store.put(blobs)
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    return content


def test_the_model_is_its_tensors_and_its_configuration(tmp_path):
    content = content_of(hf.full(tmp_path / "m"))
    assert (content.kind, content.base) == ("full", None)
    assert set(content.tensors) == {"a.weight", "b.weight", "c.weight"}
    assert set(content.files) == {"config.json", "tokenizer.json", "merges.txt"}


def test_a_re_saved_or_sharded_model_is_the_same_content(tmp_path):
    """Other metadata, other file names, other order: the digest is that of what a version is."""
    plain = content_of(hf.full(tmp_path / "m"))
    assert content_of(hf.full(tmp_path / "again", metadata={"saved": "later"})) == plain
    assert content_of(hf.sharded(tmp_path / "shards")).digest == plain.digest


def test_other_weights_are_another_content(tmp_path):
    assert (
        content_of(hf.full(tmp_path / "m")).digest
        != content_of(hf.full(tmp_path / "n", hf.weights(1))).digest
    )


def test_only_what_transformers_would_load_is_the_model(tmp_path):
    """Hub folders carry consolidated and half-precision copies beside the weights."""
    folder = hf.full(tmp_path / "m")
    plain = content_of(folder)
    save_file(
        {"tok": np.zeros(3, np.float32), "a.weight": np.ones(2, np.float32)},
        folder / "consolidated.safetensors",
    )
    assert content_of(folder) == plain


def test_what_came_in_comes_out(store, tmp_path):
    folder = hf.full(tmp_path / "m", hf.weights() | {"odd": np.arange(3, dtype=np.uint8)})
    content = put(store, folder)
    seen = []
    folders.checkout(
        store, content, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", *content.files}
    assert all(
        (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in content.files
    )
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert folders.matches(content, tmp_path / "out")
    assert seen[-1] == (3 * 48 + 3, 3 * 48 + 3)


def test_an_adapter_names_its_base_by_content(tmp_path):
    content = content_of(hf.adapter(tmp_path / "a"), BASE)
    assert (content.kind, content.base) == ("adapter", BASE)
    assert set(content.files) == {"adapter_config.json"}
    assert content.digest != content_of(tmp_path / "a", BASE.replace("b", "c")).digest


def test_the_order_of_sets_and_the_place_of_the_base_do_not_belong_to_an_adapter(tmp_path):
    one = content_of(hf.adapter(tmp_path / "a", targets=["q_proj", "v_proj"], base="/home/kim/base"), BASE)
    two = content_of(hf.adapter(tmp_path / "b", targets=["v_proj", "q_proj"], base="base-on-a-hub"), BASE)
    three = content_of(hf.adapter(tmp_path / "c", targets=["q_proj"]), BASE)
    assert one.digest == two.digest != three.digest


def test_an_adapter_leaves_pointing_at_its_base(store, tmp_path):
    content = put(store, hf.adapter(tmp_path / "a"), BASE)
    folders.checkout(store, content, tmp_path / "out", base_folder=tmp_path / "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert content_of(tmp_path / "out", BASE) == content
    assert folders.matches(content, tmp_path / "out", tmp_path / "base")
    assert not folders.matches(content, tmp_path / "out", tmp_path / "elsewhere")


def _nothing(folder):
    shutil.rmtree(folder)


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").unlink()


def _other_name(folder):
    (folder / "training_args.bin").unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def _no_config(folder):
    (folder / "config.json").unlink()


def _bad_config(folder):
    (folder / "config.json").write_text("{")


def _list_config(folder):
    (folder / "config.json").write_text("[]")


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _no_tensor(folder):
    save_file({}, folder / "model.safetensors")


def _a_folder_inside(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


REFUSED = {
    _nothing: "no such folder",
    _pickled: "only pickled weights .pytorch_model.bin., which are never opened",
    _no_weights: "no model.safetensors",
    _other_name: "only weights.safetensors",
    _no_config: "no config.json",
    _bad_config: "config.json: not JSON",
    _list_config: "not a JSON object",
    _cut: "cut short",
    _empty_file: "not a safetensors file",
    _no_tensor: "no tensor",
    _a_folder_inside: "cannot be read",
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_a_folder_that_is_no_model_is_refused(tmp_path, damage, message):
    folder = hf.full(tmp_path / "m")
    damage(folder)
    with pytest.raises(BadInput, match=message) as refused:
        content_of(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_missing_shard_is_refused(tmp_path):
    folder = hf.sharded(tmp_path / "m")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"00002-of-00002\.safetensors: this shard is missing"):
        content_of(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": {"a.weight": "../m.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"z": "model-00001-of-00002.safetensors"}}', "promises tensor z"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, index, message):
    folder = hf.sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=message):
        content_of(folder)


def test_an_adapter_without_a_base_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--base"):
        content_of(hf.adapter(tmp_path / "a"))


def test_a_pickled_adapter_is_refused(tmp_path):
    folder = hf.adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="never opened"):
        content_of(folder, BASE)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a\\b", "..", ""])
def test_a_content_can_only_name_files_of_its_folder(name):
    with pytest.raises(BadInput, match="plain file name"):
        Content.from_document(
            {"schema": Content.SCHEMA, "kind": "full", "base": None, "tensors": {}, "files": {name: BASE}}
        )


@pytest.mark.parametrize("at", [-1, -60])
def test_a_damaged_pack_never_leaves_as_a_checkout(store, tmp_path, at):
    """The last bytes belong to a file, those before to a tensor."""
    content = put(store, hf.full(tmp_path / "m"))
    (pack,) = store.packs.root.glob("*.safetensors")
    body = bytearray(pack.read_bytes())
    body[at] ^= 1
    pack.write_bytes(body)
    with pytest.raises(Tampered):
        folders.checkout(store, content, tmp_path / "out")


def test_a_pack_that_shrank_never_leaves_as_a_checkout(store, tmp_path):
    content = put(store, hf.full(tmp_path / "m"))
    (pack,) = store.packs.root.glob("*.safetensors")
    for body in (pack.read_bytes()[:-100], b""):
        pack.write_bytes(body)
        with pytest.raises(Tampered):
            folders.checkout(store, content, tmp_path / "out")
