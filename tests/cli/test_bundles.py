"""``model push`` and ``model pull`` on a version that was really trained, evaluated and decided."""

from __future__ import annotations

import hashlib
import json

import pytest
from tests import acme

from meristem import Workspace
from meristem.errors import BadInput


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_command_line_carries_a_trained_version(trained, cli, tmp_path):
    pushed = cli(trained, "model", "push", "support@v4", "--to", tmp_path / "b", "--json")
    assert pushed.code == 0, pushed.err
    again = cli(trained, "model", "push", "support@v4", "--to", tmp_path / "b")
    assert "nothing was written" in again.out
    (tmp_path / "there").mkdir()
    (tmp_path / "there/meristem.yaml").write_text(acme.CONFIG)
    there = tmp_path / "there"
    assert cli(None, "init", there).code in (0, 2)
    pulled = cli(there, "model", "pull", tmp_path / "b", "--json")
    assert pulled.code == 0, pulled.err
    told = json.loads(pulled.out)
    assert (told["digest"], told["added"], told["aliases"]) == (
        json.loads(pushed.out)["digest"],
        True,
        ["champion"],
    )
    before = acme.state(there)
    assert "was here" in cli(there, "model", "pull", tmp_path / "b").out
    assert acme.state(there) == before
    ws, home = Workspace.open(there), Workspace.open(trained)
    mine = {(e.record.content, e.record.suite): e.digest for e in ws.evaluations()}
    theirs = {(e.record.content, e.record.suite): e.digest for e in home.evaluations()}
    assert mine and mine.items() <= theirs.items()
    assert ws.verify().problems == []
    for store, name in ((ws, "one"), (home, "two")):
        store.checkout(f"support@{told['digest']}", tmp_path / name / "out")
    one, two = tree(tmp_path / "one/out"), tree(tmp_path / "two/out")
    assert one["adapter_model.safetensors"] == two["adapter_model.safetensors"]
    assert one["base/model.safetensors"] == two["base/model.safetensors"]
    ws.close()
    home.close()


def test_the_command_line_refuses_with_the_right_code(trained, fresh, cli, tmp_path):
    assert cli(trained, "model", "push", "support@v4", "--to", tmp_path / "b").code == 0
    (pack,) = (tmp_path / "b/packs").iterdir()
    body = pack.read_bytes()
    pack.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    before = acme.state(fresh)
    assert cli(fresh, "model", "pull", tmp_path / "b").code == 1
    assert cli(fresh, "model", "pull", tmp_path / "nothing").code == 2
    (tmp_path / "odd/bundle.json").mkdir(parents=True)
    assert cli(fresh, "model", "pull", tmp_path / "odd").code == 5
    assert acme.state(fresh) == before


def test_rows_that_are_test_items_here_are_refused(trained, cli, tmp_path):
    assert cli(trained, "model", "push", "support@v4", "--to", tmp_path / "b").code == 0
    ws = Workspace.create(tmp_path / "there", actor="lee")
    acme.suite_file(tmp_path / "a.yaml", "a")
    items = [
        {"id": row["id"], "prompt": row["prompt"], "answer": row["completion"]}
        for row in acme.training_rows("a")
    ]
    acme.lines(tmp_path / "a-a-items.jsonl", items)
    ws.add_suite("a", tmp_path / "a.yaml")
    before = acme.state(tmp_path / "there")
    with pytest.raises(BadInput, match="also test items of suite a"):
        ws.pull(tmp_path / "b")
    assert acme.state(tmp_path / "there") == before
    ws.close()
