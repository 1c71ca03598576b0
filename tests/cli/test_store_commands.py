"""``meristem store`` and ``meristem data delete`` on a real workspace."""

from __future__ import annotations

import json

import pytest
from tests import acme


def test_gc_says_what_it_would_do_and_does_it(cli, grown):
    acme.configure(grown)
    config = grown / "meristem.yaml"
    config.write_text(config.read_text() + "retention: {adapter: 0, method-state: 0}\n")
    before = acme.state(grown)
    told = json.loads(cli(grown, "store", "gc", "--dry-run", "--json").out)
    assert acme.state(grown) == before
    assert told["retired"]["adapter"] == ["support@v3"]  # v2 is the champion, v4 can still be promoted
    result = cli(grown, "store", "gc")
    assert result.code == 0
    assert "retired: 1 adapter (support@v3)" in result.out
    assert cli(grown, "store", "verify").code == 0
    assert cli(grown, "store", "gc").out.strip() == "nothing to collect"
    refused = cli(grown, "model", "checkout", "support@v3", "--to", grown.parent / "out")
    assert refused.code == 2
    assert "support@v3 was retired by event" in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_reindex_and_migrate(cli, fresh):
    assert "blobs in" in cli(fresh, "store", "reindex").out
    assert "already" in cli(fresh, "store", "migrate").out
    packs = fresh / ".meristem/packs"
    packs.rename(fresh / "elsewhere")
    away = cli(fresh, "store", "reindex")
    assert away.code == 5
    assert "mend `packs`" in away.err
    (fresh / "elsewhere").rename(packs)
    assert cli(fresh, "store", "verify").code == 0
    next(packs.glob("*.safetensors")).unlink()
    lost = cli(fresh, "store", "reindex")
    assert lost.code == 1
    assert "in no pack" in lost.out
    refused = cli(fresh, "store", "gc")
    assert refused.code == 1
    assert "run `meristem store reindex`" in refused.err


def test_what_is_not_finished_is_no_success(cli, fresh):
    """A pack that is damaged keeps its rows, or its dead bytes."""
    import meristem as ms

    ws = ms.Workspace.open(fresh, actor="kim")
    digest = ws.asset("dataset", "a").record.files["rows.jsonl"]
    pack = ws.store.packs.path(ws.store.location(digest).pack)
    ws.close()
    body = pack.read_bytes()
    pack.write_bytes(body[:8] + b"?" + body[9:])
    kept = cli(fresh, "data", "delete", "a", "--reason", "request 7", "--yes")
    assert kept.code == 1
    assert "repeat the command" in kept.out
    pack.write_bytes(body)
    assert cli(fresh, "data", "delete", "a", "--reason", "request 7", "--yes").code == 0
    assert not pack.exists()


def test_gc_that_leaves_something_alone_is_no_success(cli, fresh, monkeypatch):
    from meristem.ecosystem import gc

    monkeypatch.setattr(gc, "collect", lambda *_, **__: gc.Collection(False, problems=["pack x: damaged"]))
    left = cli(fresh, "store", "gc")
    assert (left.code, left.out.splitlines()[-1]) == (1, "  pack x: damaged")


def test_deletion_wants_a_yes_and_a_reason(cli, fresh):
    before = acme.state(fresh)
    assert cli(fresh, "data", "delete", "a").code == 2
    refused = cli(fresh, "data", "delete", "a", "--reason", "request 7")
    assert refused.code == 2
    assert "this deletes every version of a for good; repeat with --yes" in refused.err
    assert acme.state(fresh) == before
    done = cli(fresh, "data", "delete", "a", "--reason", "request 7", "--yes")
    assert done.code == 0
    assert "a@v1 deleted (event" in done.out
    refused = cli(fresh, "update", "run", "support", "--data", "a")
    assert refused.code == 2
    assert "data a@v1 was deleted by event" in refused.err
    left = json.loads(cli(fresh, "data", "show", "a").out)["given_up"]
    assert (left["how"], left["reason"], left["versions"]) == ("deleted", "request 7", [])
    listed = json.loads(cli(fresh, "data", "list", "--json").out)
    assert [row["given_up"] is not None for row in listed] == [True, False]
    assert cli(fresh, "store", "verify").code == 0


@pytest.mark.parametrize(
    "words", [["store", "gc"], ["store", "verify"], ["store", "reindex"], ["store", "migrate"]]
)
def test_without_a_workspace_they_say_so(cli, tmp_path, words):
    result = cli(tmp_path, *words)
    assert result.code == 2
    assert "meristem.yaml" in result.err


def test_an_update_that_will_not_be_finished_can_be_closed(cli, fresh, files):
    import meristem as ms

    ws = ms.Workspace.open(fresh, actor="kim")
    from meristem.config import Recipe
    from meristem.training import updates

    parent, digest = ws.version("support"), ws.asset("dataset", "a").digest
    entry = updates.open_update(ws.store, "kim", parent=parent, data=[digest], recipe=Recipe())
    folder = fresh / ".meristem/runs" / entry.id
    folder.mkdir(parents=True)
    refused = cli(fresh, "data", "delete", "a", "--reason", "request 7", "--yes")
    assert (refused.code, f"`meristem update close {entry.id}`" in refused.err) == (2, True)
    assert cli(fresh, "update", "close", entry.id).code == 0
    assert not folder.exists()
    assert cli(fresh, "data", "delete", "a", "--reason", "request 7", "--yes").code == 0
    again = cli(fresh, "update", "resume", entry.id)
    assert (again.code, "was deleted by event" in again.err) == (2, True)
    ws.close()
