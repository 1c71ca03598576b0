"""``meristem key`` and ``meristem log`` as an auditor types them, from the first key to a cut tail."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import sys
from contextlib import closing

import pytest
from tests.ecosystem import hf

import meristem as ms
from meristem.errors import EnvironmentFailure
from meristem.store.local_packs import LocalPacks


@pytest.fixture
def ws(tmp_path):
    made = ms.Workspace.create(tmp_path / "ws", actor="kim")
    made.add_model("base", tier="foundation", source=str(hf.full(tmp_path / "source")))
    made.close()
    return tmp_path / "ws"


@pytest.fixture
def key(cli, ws, tmp_path):
    path = tmp_path / "key.pem"
    assert cli(ws, "key", "add", "--file", path).code == 0
    return path


def test_keys_from_the_first_to_a_rotation(cli, ws, key, tmp_path):
    assert "registered already" in cli(ws, "key", "add", "--file", key).out
    refused = cli(ws, "key", "add", "--file", tmp_path / "second.pem")
    assert refused.code == 2 and "MERISTEM_KEY" in refused.err
    assert cli(ws, "key", "add", "--file", tmp_path / "second.pem", "--key", key).code == 0
    assert cli(ws, "key", "rotate", "--file", key, "--to", tmp_path / "third.pem").code == 0
    assert "already" in cli(ws, "key", "rotate", "--file", key, "--to", tmp_path / "third.pem").out
    listed = json.loads(cli(ws, "key", "list", "--json").out)
    assert [(k["since"], k["until"]) for k in listed] == [(4, 6), (5, None), (6, None)]
    assert cli(ws, "key", "list").out.count(listed[0]["public"]) == 1
    assert cli(ws, "key", "add", "--file", ws / "inside.pem").code == 2
    assert not (ws / "inside.pem").exists()
    assert json.loads(cli(ws, "log", "verify", "--json").out)["intact"]


def test_verify_says_what_is_anchored_what_is_signed_and_what_is_only_chained(
    cli, ws, key, tmp_path, monkeypatch
):
    anchor = tmp_path / "anchor.jsonl"
    monkeypatch.setenv("MERISTEM_KEY", str(key))
    assert "events 1 to 4: only chained" in cli(ws, "log", "verify").out
    for _ in range(2):  # the same head again: one line
        assert cli(ws, "log", "checkpoint", "--anchor", anchor).code == 0
    assert len(anchor.read_text().splitlines()) == 1
    _move(ws, "canary")
    assert "in the workspace only" in cli(ws, "log", "checkpoint").out
    _move(ws, "shadow")
    told = cli(ws, "log", "verify", "--anchor", anchor).out
    public = json.loads(anchor.read_text())["key"][:12]
    assert f"events 1 to 4: anchored outside, by key {public} at 20" in told
    assert "events 5 to 5: signed, but only inside the workspace" in told
    assert "events 6 to 6: only chained" in told
    head = json.loads(cli(ws, "log", "verify", "--json").out)["head"]
    assert "events 1 to 6: anchored outside, as a head" in cli(ws, "log", "verify", "--head", head).out


def test_a_cut_tail_is_exit_1_and_names_the_event(cli, ws, key, tmp_path):
    anchor = tmp_path / "anchor.jsonl"
    cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor)
    _move(ws, "canary")
    cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor)
    with closing(sqlite3.connect(ws / ".meristem" / "meristem.db")) as db, db:
        for table, column in (("events", "sequence"), ("checkpoints", "sequence"), ("alias_moves", "event")):
            db.execute(f"DELETE FROM {table} WHERE {column} > 4")
        db.execute("DELETE FROM aliases WHERE alias = 'canary'")
    assert cli(ws, "log", "verify").code == 0
    done = cli(ws, "log", "verify", "--anchor", anchor)
    assert done.code == 1 and f"first bad event: 5 ({anchor}:2: event 5 was signed and is gone" in done.out
    assert json.loads(cli(ws, "log", "verify", "--anchor", anchor, "--json").out)["first_bad"] == 5


@pytest.mark.parametrize("junk", ["", "sha256:12", "x" * 71])
def test_a_malformed_head_is_exit_2(cli, ws, junk):
    done = cli(ws, "log", "verify", "--head", junk)
    assert done.code == 2 and len(done.err.splitlines()) == 1


def test_a_malformed_anchor_is_exit_2_with_its_line_and_a_false_one_exit_1(cli, ws, key, tmp_path):
    anchor = tmp_path / "anchor.jsonl"
    assert cli(ws, "log", "verify", "--anchor", anchor).code == 2
    cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor)
    good = anchor.read_text()
    anchor.write_text(good + "{}\n")
    done = cli(ws, "log", "verify", "--anchor", anchor)
    assert done.code == 2 and f"{anchor}:2: not a checkpoint" in done.err
    at = good.index('"signature":"') + 13
    anchor.write_text(good[:at] + ("0" if good[at] != "0" else "1") + good[at + 1 :])
    done = cli(ws, "log", "verify", "--anchor", anchor)
    assert done.code == 1 and f"{anchor}:1: the signature does not match" in done.out


def test_a_checkpoint_needs_a_key_a_place_outside_and_a_command_that_works(cli, ws, key, tmp_path):
    assert cli(ws, "log", "checkpoint").code == 2
    assert cli(ws, "log", "checkpoint", "--key", key, "--anchor", ws / "anchor").code == 2
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(sys.stdin.read())"
    assert (
        cli(ws, "log", "checkpoint", "--key", key, "--anchor-command", f'{sys.executable} -c "{code}"').code
        == 0
    )
    assert json.loads(out.read_text())["sequence"] == 4
    done = cli(ws, "log", "checkpoint", "--key", key, "--anchor-command", "false")
    assert done.code == 5 and len(done.err.splitlines()) == 1


def test_a_checkpoint_says_where_it_went_and_a_command_is_the_shell_s(cli, ws, key, tmp_path):
    anchor, out = tmp_path / "anchor.jsonl", tmp_path / "out"
    command = f"cat > {out} && echo done"
    done = cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor, "--anchor-command", command)
    assert f"appended to {anchor}\ngiven to {command}" in done.out
    assert out.read_bytes() == anchor.read_bytes()
    done = cli(ws, "log", "checkpoint", "--key", key, "--anchor-command", "echo no such bucket >&2; false")
    assert done.code == 5 and "no such bucket" in done.err and "repeat" in done.err


def test_one_anchor_is_of_one_workspace(cli, ws, key, tmp_path):
    other = tmp_path / "other"
    ms.Workspace.create(other, actor="kim").close()
    assert cli(other, "key", "add", "--file", key).code == 0
    anchor = tmp_path / "anchor.jsonl"
    cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor)
    _move(ws, "canary")
    cli(ws, "log", "checkpoint", "--key", key, "--anchor", anchor)
    held = anchor.read_bytes()
    done = cli(other, "log", "checkpoint", "--key", key, "--anchor", anchor)
    assert done.code == 2 and "another workspace" in done.err and anchor.read_bytes() == held
    done = cli(other, "log", "verify", "--anchor", anchor)
    assert done.code == 1 and "1 problems" in done.out  # both of its lines are one mistake, or one attack
    assert "this anchor is of another workspace, or the chain was computed anew from its first" in done.out


def test_a_store_that_cannot_be_read_is_exit_5_and_no_tampering(cli, ws, monkeypatch):
    def refuse(*_):
        raise EnvironmentFailure("Forbidden; check the credentials")

    for method in ("entries", "views"):
        with monkeypatch.context() as patch:
            patch.setattr(LocalPacks, method, refuse)
            done = cli(ws, "log", "verify")
        assert done.code == 5 and "TAMPERED" not in done.out and "Forbidden" in done.err


def test_damage_that_sqlite_finds_in_its_file_is_a_problem(cli, ws, monkeypatch):
    path = ws / ".meristem" / "meristem.db"
    with closing(sqlite3.connect(path)) as db, db:  # an index that lacks the rows of its table
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_schema SET sql = replace(sql, '(kind)', '(subject)') WHERE name = 'ix_events_kind'"
        )
    done = cli(ws, "log", "verify")
    assert done.code == 1 and f"{path}: " in done.out and "ix_events_kind" in done.out


def test_times_say_their_zone(cli, ws):
    assert re.search(r"\d\d:\d\d:\d\dZ", cli(ws, "log", "show").out)
    assert re.search(r"\d\d:\d\d:\d\dZ", cli(ws, "alias", "history", "base@champion").out)


def test_show_gives_the_newest_events(cli, ws):
    assert [e["sequence"] for e in json.loads(cli(ws, "log", "show", "--last", "2", "--json").out)] == [2, 3]
    assert len(json.loads(cli(ws, "log", "show", "--last", "0", "--json").out)) == 3
    assert cli(ws, "log", "show", "--last", "-1").code == 2


def test_an_export_can_be_checked_without_meristem(ws, cli, key, tmp_path):
    cli(ws, "log", "checkpoint", "--key", key)
    assert cli(ws, "log", "export", "--to", tmp_path / "log.jsonl").code == 0
    *events, checkpoint = (tmp_path / "log.jsonl").read_bytes().splitlines()
    previous = "sha256:" + "0" * 64
    for line in events:
        assert json.loads(line)["previous"] == previous
        previous = "sha256:" + hashlib.sha256(line).hexdigest()
    assert json.loads(checkpoint)["head"] == previous


def _move(folder, alias):
    made = ms.Workspace.open(folder, actor="kim")
    made.move_alias("base", alias, "base@v1")
    made.close()
