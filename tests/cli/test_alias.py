"""``meristem alias``, and the protected aliases behind every command that moves one."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import event as sql_event
from sqlalchemy import insert

import meristem as ms
from meristem.ecosystem.versions import by_digest
from meristem.store.canonical import canonical, digest_bytes
from meristem.store.database import Database
from meristem.store.schema import documents, versions
from meristem.training import updates


def listed(cli, folder, *words):
    done = cli(folder, *words, "--json")
    assert done.code == 0, done
    return json.loads(done.out)


def test_move_list_and_history(cli, grown):
    as_kim, as_lee = ["--actor", "kim"], ["--actor", "lee"]
    done = cli(grown, *as_kim, "alias", "move", "support@canary", "support@v3", "--reason", "try it")
    assert (done.code, done.out) == (0, "support@canary is support@v3 (revision 1)\n"), done
    made = listed(cli, grown, *as_lee, "alias", "move", "support@canary", "support@v4", "--expect", "1")
    assert (made["version"], made["revision"]) == ("support@v4", 2)
    rows = {row["alias"]: row for row in listed(cli, grown, "alias", "list", "support")}
    assert list(rows) == ["canary", "challenger", "champion"]
    assert (rows["canary"]["version"], rows["canary"]["revision"], rows["canary"]["actors"]) == (
        "support@v4", 2, [],
    )  # fmt: skip
    first, second = listed(cli, grown, "alias", "history", "support@canary")
    assert (first["revision"], first["from"], first["to"]) == (1, None, "support@v3")
    assert (first["actor"], first["reason"], first["time"][:2]) == ("kim", "try it", "20")
    assert (second["from"], second["to"], second["actor"]) == ("support@v3", "support@v4", "lee")
    assert "support@v4" in cli(grown, "alias", "history", "support@canary").out
    (newest,) = listed(cli, grown, "alias", "history", "support@canary", "--last", "1")
    assert newest == second


def test_a_stale_expectation_is_exit_4_and_changes_nothing(cli, grown):
    move = ["alias", "move", "support@canary", "support@v3"]
    assert cli(grown, *move, "--expect", "1").code == 4
    assert cli(grown, *move, "--expect", "0").code == 0
    done = cli(grown, "alias", "move", "support@canary", "support@v4", "--expect", "0")
    assert done.code == 4 and "moved from nothing to v3" in done.err
    assert [row["to"] for row in listed(cli, grown, "alias", "history", "support@canary")] == ["support@v3"]
    assert cli(grown, *move).code == 0  # it is there: no event
    assert len(listed(cli, grown, "alias", "history", "support@canary")) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("move support@champion support@v4", "moves by a release"),
        ("move support@v9 support@v4", "use lower-case letters"),
        ("move support@canary base@v1", "not a version of model support"),
        ("move support@canary support@v99", "no such version"),
        ("move support support@v4", "write MODEL@ALIAS"),
        ("history nobody@champion", "unknown model"),
        ("list nobody", "unknown model"),
        ("protect support@champion", "--actors"),
        ("protect support@champion --actors kim --anyone", "--actors"),
        ("protect nobody@champion --actors kim", "unknown model"),
        ("protect support@champion --actors lee", "name yourself (kim)"),
    ],
)
def test_what_is_refused(cli, grown, words, told):
    ws = ms.Workspace.open(grown)
    before = [event.hash for event in ws.events()]
    done = cli(grown, "--actor", "kim", "alias", *words.split())
    assert done.code == 2 and told in done.err, done
    assert [event.hash for event in ws.events()] == before
    ws.close()


def test_a_protected_champion(cli, grown, monkeypatch):
    """Only those named release to it or roll it back: others are refused before bytes are read, exit 2."""
    from meristem.release import rollout

    def cost(*_):
        raise AssertionError("compute was spent")

    as_kim, as_lee = ["--actor", "kim"], ["--actor", "lee"]
    done = cli(grown, *as_kim, "alias", "protect", "support@champion", "--actors", "kim, sam")
    assert (done.code, done.out) == (0, "support@champion is moved by kim, sam\n"), done
    with monkeypatch.context() as patched:
        patched.setattr(rollout, "check_bytes", cost)
        for words in (["promote", "decision-3"], ["rollback", "support", "--to", "support@v1"]):
            done = cli(grown, *as_lee, "release", *words)
            assert done.code == 2 and "kim, sam may move it, lee may not" in done.err, done
    for words in (["--actors", "lee"], ["--anyone"]):
        assert cli(grown, *as_lee, "alias", "protect", "support@champion", *words).code == 2
    assert cli(grown, *as_kim, "release", "promote", "decision-3").code == 0
    assert cli(grown, "--actor", "sam", "release", "rollback", "support").code == 0
    assert cli(grown, "--actor", "sam", "alias", "protect", "support@champion", "--anyone").code == 0
    assert cli(grown, *as_lee, "release", "rollback", "support", "--to", "support@v1").code == 0
    assert listed(cli, grown, "alias", "list", "support")[-1]["actors"] == []


def test_a_protected_challenger_stops_updates_and_commits_before_they_cost(cli, grown, tmp_path, monkeypatch):
    from meristem.store.store import Store

    def cost(*_):
        raise AssertionError("compute was spent")

    as_kim, as_lee = ["--actor", "kim"], ["--actor", "lee"]
    assert cli(grown, *as_kim, "model", "checkout", "support@v3", "--to", tmp_path / "v3").code == 0
    assert cli(grown, *as_kim, "alias", "protect", "support@challenger", "--actors", "kim").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(updates, "train", cost)
        done = cli(grown, *as_lee, "update", "run", "support", "--data", "b", "--method", "ewc")
        assert done.code == 2 and "lee may not" in done.err, done
        assert len(listed(cli, grown, "update", "list")) == len(listed(cli, grown, "plan", "list")) == 3
        patched.setattr(Store, "put", cost)
        commit = ["model", "commit", "support", "--source", tmp_path / "v3", "--reason", "made elsewhere"]
        done = cli(grown, *as_lee, *commit)
        assert done.code == 2 and "lee may not" in done.err, done
    made = listed(cli, grown, *as_kim, *commit)
    assert made["aliases"] == ["challenger"] and made["parents"] == ["support@v2"]
    assert cli(grown, *as_lee, "alias", "move", "support@challenger", "support@v4").code == 2


def longer(ws, count):
    """``count`` more versions of ``support``, rows and documents alone."""
    entry = ws.version("support@v2")
    rows, bodies = [], []
    for number in range(count):
        record = entry.record.model_copy(update={"tasks": [f"task-{number}"]})
        body = canonical(record.document())
        bodies.append({"digest": digest_bytes(body), "schema": record.SCHEMA, "body": body})
        rows.append(
            {"digest": digest_bytes(body), "model": "support", "number": 5 + number, "content": entry.content}
        )
    with ws.store.database.write() as connection:
        connection.execute(insert(documents), bodies)
        connection.execute(insert(versions), rows)


@pytest.mark.parametrize(
    "words",
    ["model list", "model show support@v3", "release history support", "release explain decision-2",
     "alias list support", "alias history support@champion", "model lineage support --last 2"],
)  # fmt: skip
def test_what_a_command_reads_does_not_grow_with_the_versions(cli, grown, words, monkeypatch):
    def statements():
        seen = []
        honest = Database.check_schema

        def counted(self):
            honest(self)
            sql_event.listen(self.engine, "after_cursor_execute", lambda *a: seen.append(a[2]))

        with monkeypatch.context() as patched:
            patched.setattr(Database, "check_schema", counted)
            assert cli(grown, *words.split()).code == 0
        return len(seen)

    few = statements()
    ws = ms.Workspace.open(grown)
    longer(ws, 200)
    with ws.store.database.read() as connection:
        assert by_digest(connection, ws.version("support@v204").digest).number == 204
    ws.close()
    assert statements() == few
