"""``doctor``: every fault is named with its remedy, on any workspace, and looking changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import insert, update
from tests.acme import state
from tests.ecosystem import hf

import meristem as ms
from meristem.ecosystem import doctor, ledger, surroundings, versions
from meristem.ecosystem.records import Update
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store import leases
from meristem.store.evidence import Event
from meristem.store.packs import Blob, packs_at
from meristem.store.schema import blobs, checkpoints, events
from meristem.store.schema import leases as lease_table

SCHEMA_1 = Path(__file__).parents[1] / "store/fixtures/schema-1.tar.xz"
LIKE_SHA = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(surroundings.KEY, raising=False)


def filled(folder: Path, **options) -> ms.Workspace:
    ws = ms.Workspace.create(folder, **options)
    source = hf.full(folder.parent / "source")
    ws.add_model("base", tier="foundation", source=str(source))
    return ws


@pytest.fixture
def ws(tmp_path):
    made = filled(tmp_path / "ws")
    yield made
    made.close()


def examined(folder: Path) -> doctor.Health:
    return ms.Workspace.doctor(folder)


def of(health: doctor.Health, check: str, status: str | None = None) -> list[doctor.Finding]:
    return [f for f in health.findings if f.check == check and status in (None, f.status)]


def only(health: doctor.Health, check: str, status: str) -> doctor.Finding:
    """The one finding of ``check`` with ``status``; it says how to mend itself."""
    (found,) = of(health, check, status)
    assert status == "ok" or found.remedy
    assert "\n" not in found.text + found.remedy
    return found


def test_a_healthy_workspace(ws):
    before = state(ws.root)
    health = examined(ws.root)
    assert health.exit_code == 0 and health.problems == 0 and health.reached
    assert {f.check for f in health.findings if f.status == "ok"} >= {
        "configuration", "store", "schema", "database", "packs", "leftovers", "evidence", "clock", "updates",
        "leases", "permissions",
    }  # fmt: skip
    assert "no signed checkpoint" in only(health, "evidence", "warning").text
    assert "6 blobs in 1 packs" in only(health, "packs", "ok").text
    assert state(ws.root) == before


def test_where_there_is_no_workspace(tmp_path):
    with pytest.raises(BadInput, match="no workspace here"):
        examined(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["schema: meristem/workspace/v1\nunknown: 1\n", ":::", "\0"])
def test_a_configuration_that_cannot_be_read(ws, text):
    (ws.root / "meristem.yaml").write_text(text)
    health = examined(ws.root)
    assert "meristem.yaml" in only(health, "configuration", "problem").text
    assert of(health, "packs", "ok") and health.exit_code == 1  # the rest is looked at all the same


def test_a_slip_in_a_team_s_configuration_is_a_problem_and_nothing_out_of_reach(tmp_path):
    (tmp_path / "meristem.yaml").write_text("schema: meristem/workspace/v1\nstor: postgresql://team/db\n")
    health = examined(tmp_path)
    assert "stor" in only(health, "configuration", "problem").text and health.exit_code == 1


def test_a_configuration_that_is_gone(ws):
    (ws.root / "meristem.yaml").unlink()
    assert "meristem init" in only(examined(ws.root), "configuration", "problem").remedy
    shutil.rmtree(ws.root / ".meristem/packs")
    (ws.root / ".meristem/meristem.db").unlink()
    health = examined(ws.root)
    assert health.exit_code == 5 and not (ws.root / ".meristem/meristem.db").exists()


def test_a_store_out_of_reach(ws):
    ws.close()
    path = ws.root / ".meristem/meristem.db"
    for file in path.parent.glob("meristem.db*"):
        file.rename(file.with_name(f"elsewhere-{file.name}"))
    health = examined(ws.root)
    assert "restore it from a backup" in only(health, "schema", "problem").remedy
    assert health.exit_code == 5 and not of(health, "packs") and not path.exists()
    path.write_bytes(b"not a database" * 1000)
    assert examined(ws.root).exit_code == 5


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("store: postgresql://nobody@127.0.0.1:1/none", 5),
        ("store: mysql://nobody@127.0.0.1:1/none", 1),
        ("packs: no-such-scheme://bucket", 1),
    ],
)
def test_a_store_named_wrongly(ws, line, code):
    with (ws.root / "meristem.yaml").open("a") as file:
        file.write(f"{line}\n")
    health = examined(ws.root)
    assert health.problems and health.exit_code in (code, 2), health.findings


def test_an_older_schema(tmp_path):
    with tarfile.open(SCHEMA_1) as archive:
        archive.extractall(tmp_path, filter="data")
    (config,) = tmp_path.rglob("meristem.yaml")
    before = state(config.parent)
    health = examined(config.parent)
    assert "`meristem store migrate`" in only(health, "schema", "problem").remedy
    assert health.problems == 1 and of(health, "packs", "ok")
    assert state(config.parent) == before


def test_an_unknown_schema(ws):
    with ws.store.database.write() as connection:
        connection.exec_driver_sql("update alembic_version set version_num = '0999'")
    assert "matching release" in only(examined(ws.root), "schema", "problem").remedy


def test_a_damaged_database_and_a_damaged_index(ws):
    with ws.store.database.write() as connection:
        connection.execute(update(blobs).values(offset=1 << 40))
    health = examined(ws.root)
    assert only(health, "packs", "problem") and of(health, "evidence", "ok") and health.exit_code == 1
    ws.close()
    path = ws.root / ".meristem/meristem.db"
    body = bytearray(path.read_bytes())
    body[8192:12288] = os.urandom(4096)
    path.write_bytes(body)
    health = examined(ws.root)
    assert health.problems and health.exit_code in (1, 5)


def test_packs_that_are_gone_or_cut_short(ws):
    (path,) = (ws.root / ".meristem/packs").glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "1 of 1 packs are gone or cut short" in only(examined(ws.root), "packs", "problem").text
    path.unlink()
    assert "log verify" in only(examined(ws.root), "packs", "problem").remedy
    path.write_bytes(whole)
    assert examined(ws.root).problems == 0


def test_leftovers_of_dead_writers(ws):
    ws.store.packs.write([Blob.file(b"nobody names me")])
    packs, cache = ws.root / ".meristem/packs", ws.root / ".meristem/cache"
    dead = packs / ".tmp-0123456789abcdef-1-00000000"
    dead.write_bytes(b"half")
    cache.mkdir(exist_ok=True)
    for number in (os.getpid(), dead_process()):
        (cache / f".abc-{number}-00000000").mkdir()
    fresh, unfinished = of(examined(ws.root), "leftovers", "warning")
    assert "1 packs that nothing names" in fresh.text and "0 unfinished" in fresh.text
    assert fresh.remedy == "`meristem store gc`" and f"-{os.getpid()}-" not in unfinished.text
    long_ago = time.time() - 2 * leases.SECONDS
    os.utime(dead, (long_ago, long_ago))
    assert "1 unfinished" in of(examined(ws.root), "leftovers", "warning")[0].text


def dead_process() -> int:
    return int(
        subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout
    )


def test_a_writer_at_work_leaves_no_leftovers(ws):
    ws.store.put([Blob.file(b"soon to be named")])
    health = examined(ws.root)
    assert of(health, "leftovers", "ok") and "1 writers at work" in only(health, "leases", "ok").text
    with ws.store.database.write() as connection:
        connection.execute(update(lease_table).values(expires=time.time() - 1))
    health = examined(ws.root)
    assert "1 leases" in only(health, "leases", "warning").text and of(health, "leftovers", "warning")


def test_a_cut_tail_and_a_changed_event(ws):
    with ws.store.database.write() as connection:
        connection.execute(events.delete().where(events.c.sequence == 1))
    assert "chain is damaged" in only(examined(ws.root), "evidence", "problem").text


def checkpoint(ws, sequence, *, head=None, days=0.0):
    event = next(e for e in ws.events() if e.sequence == sequence)
    when = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - days * 86400))
    body = json.dumps({"sequence": sequence, "head": head or event.hash, "time": when}).encode()
    row = {"sequence": sequence, "key": "k", "body": body, "signature": b""}
    with ws.store.database.write() as connection:
        connection.execute(checkpoints.delete())
        connection.execute(insert(checkpoints).values(**row))


def test_how_far_the_evidence_is_signed(ws):
    checkpoint(ws, 2, days=3)
    assert "signed up to event 2, 1 events and 3 days ago" in of(examined(ws.root), "evidence", "ok")[1].text
    checkpoint(ws, 2, days=31)
    assert "31 days ago" in only(examined(ws.root), "evidence", "warning").text
    checkpoint(ws, 3, days=31)  # nothing happened since
    assert not of(examined(ws.root), "evidence", "warning")
    checkpoint(ws, 2, head=LIKE_SHA)
    assert "names another head" in only(examined(ws.root), "evidence", "problem").text


def test_clocks(ws, monkeypatch):
    now = time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now - 3600)
    found = only(examined(ws.root), "clock", "problem")
    assert "in the future" in found.text and "NTP" in found.remedy
    monkeypatch.undo()
    monkeypatch.setattr(type(ws.store.database), "now", lambda *_: time.time() + 60)
    assert "+60 s" in only(examined(ws.root), "clock", "warning").text


def test_permissions(ws, monkeypatch):
    ws.root.chmod(0o777)
    found = only(examined(ws.root), "permissions", "problem")
    assert "every user" in found.text and found.remedy == f"`chmod -R o-w {ws.root}`"
    ws.root.chmod(0o755)
    readable = {ws.root / ".meristem/packs"}
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: path not in readable)
    found = only(examined(ws.root), "permissions", "problem")
    assert "packs cannot be written by you" in found.text and found.remedy.startswith("`chmod -R u+rwX")
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)
    health = examined(ws.root)
    assert "can only be read by you" in only(health, "permissions", "warning").text and health.problems == 0


def test_the_signing_key(ws, tmp_path, monkeypatch):
    inside, outside = ws.root / "key.pem", tmp_path / "key.pem"
    for path in (inside, outside):
        path.write_bytes(b"secret")
        path.chmod(0o600)

    def told(path, status="problem"):
        monkeypatch.setenv(surroundings.KEY, str(path))
        return only(examined(ws.root), "signing key", status)

    assert told(outside, "ok")
    assert "inside the workspace" in told(inside).text
    assert "not there" in told(tmp_path / "none.pem").text
    outside.chmod(0o640)
    assert told(outside).remedy == f"`chmod 600 {outside}`"


@pytest.mark.parametrize(("free", "status"), [(10, "problem"), (64 << 20, "warning"), (1 << 40, "ok")])
def test_free_space(ws, monkeypatch, free, status):
    usage = type(shutil.disk_usage(ws.root))(1 << 41, 1 << 40, free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert "the largest champion takes 1" in only(examined(ws.root), "free space", status).text


def test_a_full_disk_is_told_even_when_the_database_cannot_be_read(ws, monkeypatch):
    def refuse(*_):
        raise EnvironmentFailure("disk I/O error; check space and permissions, then repeat the command")

    usage = type(shutil.disk_usage(ws.root))(1 << 41, 1 << 41, 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(type(ws.store.database), "read", refuse)
    health = examined(ws.root)
    assert only(health, "free space", "problem").text == "0 bytes free" and health.exit_code == 5


def test_free_space_on_a_machine_that_has_not_worked_with_the_store_yet(ws, tmp_path):
    (tmp_path / "second").mkdir()
    config = (ws.root / "meristem.yaml").read_text()
    (tmp_path / "second/meristem.yaml").write_text(f"{config}packs: {ws.root}/.meristem/packs\n")
    ws.store.root = tmp_path / "second/.meristem"  # the database of the first machine stands in for a server
    health = doctor.examine(
        tmp_path / "second", tmp_path / "second/.meristem", lambda config: ws.store, lambda config: None
    )
    assert of(health, "free space") and not of(health, "free space", "problem") and health.exit_code == 0


def test_a_champion_that_has_lost_bytes(ws):
    (path,) = (ws.root / ".meristem/packs").glob("*.safetensors")
    whole = path.read_bytes()
    ws.store.packs.write([Blob.file(b"of something else")])  # with no pack at all `reindex` refuses
    path.unlink()
    ws.reindex()
    health = examined(ws.root)
    found = only(health, "aliases", "problem")
    assert "base@champion: 6 of 6 blobs are not in the index" in found.text and health.exit_code == 1
    assert found.remedy == "restore the packs from a backup, then `meristem store reindex`"
    path.write_bytes(whole)
    ws.reindex()
    assert examined(ws.root).problems == 0


def test_bytes_lost_below_an_adapter(ws, tmp_path):
    ws.add_model("law", tier="industrial", base="base", source=str(hf.adapter(tmp_path / "adapter")))
    base = ws.version("base").content
    with ws.store.database.write() as connection:
        below = versions.content_of(connection, base).tensors.values()
        connection.execute(blobs.delete().where(blobs.c.digest.in_(list(below))))
    assert "law@champion" in " ".join(f.text for f in of(examined(ws.root), "aliases", "problem"))


@pytest.mark.parametrize(
    "statement",
    [
        "update aliases set version = 'sha256:0'",
        "update aliases set revision = 9",
        "update aliases set alias = 'canary'",
        "update alias_moves set version = 'sha256:0'",
        "update alias_moves set event = 1",
        "delete from aliases",
        "delete from alias_moves",
        "update events set hash = subject where kind = 'alias.moved'",
    ],
)
def test_an_alias_moved_behind_the_log_s_back(ws, statement):
    with ws.store.database.write() as connection:
        connection.exec_driver_sql(statement)
    found = of(examined(ws.root), "aliases", "problem")
    assert "base@champion is not where the evidence moved it" in " ".join(f.text for f in found)
    assert found[-1].remedy == "`meristem log verify`"


@pytest.mark.parametrize("where", ["defaults: {gates: [%s]}", "models: {base: {gates: [%s]}}"])
@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ("{gate: improvement, suites: new, confidence: 0.5}", "confidence"),
        ("{gate: no-such-gate, suites: new}", "unknown gate"),
    ],
)
def test_a_gate_that_cannot_be_built(ws, where, gate, told):
    (ws.root / "meristem.yaml").write_text(f"schema: meristem/workspace/v1\n{where % gate}\n")
    health = examined(ws.root)
    assert told in only(health, "configuration", "problem").text
    assert of(health, "packs", "ok") and health.exit_code == 1


def opened_update(ws, status):
    """An update as ``updates.open_update`` leaves it, with ``status``."""
    record = Update(model="base", parent=LIKE_SHA, data=[status], recipe=LIKE_SHA, method_state=None, code={})
    with ws.store.transaction("kim") as tx:
        entry = ledger.open_record(tx, "update", record, "base")
        if status != "open":
            ledger.set_status(tx, entry, status)
    return entry


def test_orphaned_updates(ws):
    runs = ws.root / ".meristem/runs"
    for status in ("open", "interrupted", "failed", "done", "open"):
        opened_update(ws, status)
    for name in ("update-2", "update-4", "update-9", "reproduce-update-4-x", "reproduce-update-4-y"):
        (runs / name).mkdir(parents=True)
    running = (runs / "update-5.lock").open("a+")
    again = os.open(runs / "reproduce-update-4-y", os.O_RDONLY)
    for held in (running, again):
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        health = examined(ws.root)
    finally:
        running.close()
        os.close(again)
    found = [finding.text.removeprefix(f"{runs}/") for finding in of(health, "updates", "warning")]
    assert [text.split(":")[0].split(" is ")[0] for text in found] == [
        "update-1", "update-2", "update-3", "reproduce-update-4-x", "update-4", "update-9",
    ]  # fmt: skip
    assert of(health, "updates", "warning")[0].remedy == "`meristem update resume update-1`"
    assert of(health, "updates", "warning")[3].remedy == f"`rm -r {runs / 'reproduce-update-4-x'}`"
    assert of(health, "updates", "warning")[4].remedy == "`meristem store gc`"
    assert "1 done, 1 under way" in only(health, "updates", "ok").text and health.problems == 0


def test_a_failing_check_is_a_problem_of_its_own(ws, monkeypatch):
    def breaks(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(Event, "from_body", breaks)
    health = examined(ws.root)
    assert "RuntimeError: two lines" in only(health, "clock", "problem").text
    assert of(health, "updates", "ok") and of(health, "leases", "ok") and health.exit_code == 1


MOUNTS = """\
overlay / overlay rw 0 0
server:/team /data\\040of/team nfs4 rw 0 0
/dev/sdb1 /data\\040of/team/local ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/kim", "overlay"), ("/data of/team/ws", "nfs4"), ("/data of/team/local/ws", "ext4")],
)
def test_the_file_system_below(path, kind):
    assert surroundings.kind_of_mount(Path(path), MOUNTS) == kind


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc/mounts")
def test_a_network_file_system_is_told(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/x {tmp_path} nfs4 rw 0 0\n")
    ((status, text, _),) = surroundings.file_system(tmp_path / "ws", mounts)
    assert status == "warning" and "nfs4" in text


def test_a_workspace_that_can_only_be_read(ws):
    """As an auditor gets it: every file without permission to write, and a user without root's powers."""
    ws.close()
    for path in (*ws.root.rglob("*"), ws.root):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
    from tests.cli.process import Limits, run

    try:
        done = run(ws.root, "doctor", limits=Limits(powerless=True))
    finally:
        ws.root.chmod(0o755)
        (ws.root / ".meristem").chmod(0o755)
    assert done.code == 0 and "can only be read by you" in done.out, done


@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
def test_a_bucket_that_keeps_what_is_deleted(status):
    fs = SimpleNamespace(call_s3=lambda method, Bucket: {"Status": status} if Bucket == "team" else {})
    (found,) = doctor._bucket(SimpleNamespace(packs=SimpleNamespace(fs=fs, root="team/packs")))
    assert (
        found[0] == "warning" and f"bucket team is {status.lower()}" in found[1] and "lifecycle" in found[2]
    )


def test_a_bucket_that_keeps_nothing_or_cannot_say(s3_url):
    def refuse(method, Bucket):
        raise PermissionError("AccessDenied")

    for call in (lambda method, Bucket: {}, refuse):
        packs = SimpleNamespace(fs=SimpleNamespace(call_s3=call), root="team/packs")
        assert list(doctor._bucket(SimpleNamespace(packs=packs))) == []
    for packs in (packs_at(s3_url()), packs_at("memory://packs")):
        assert list(doctor._bucket(SimpleNamespace(packs=packs))) == []


def test_a_team_s_store(tmp_path, postgresql_url, s3_url):
    folder = tmp_path / "ws"
    folder.mkdir()
    made = ms.Workspace.create(tmp_path / "template")
    made.close()
    text = (tmp_path / "template/meristem.yaml").read_text()
    (folder / "meristem.yaml").write_text(f"{text}store: {postgresql_url()}\npacks: {s3_url()}\n")
    ws = filled(folder)
    health = examined(folder)
    assert health.exit_code == 0, [f for f in health.findings if f.status == "problem"]
    assert "postgresql" in only(health, "store", "ok").text and "s3://" in only(health, "store", "ok").text
    assert not of(health, "file system") and of(health, "packs", "ok")
    location = ws.store.location(next(iter(ws.store.packs.headers())).digest)
    ws.store.packs.remove(location.pack)
    assert "gone or cut short" in only(examined(folder), "packs", "problem").text
    ws.close()


def test_the_command(ws):
    """Its output for people and programs, its exit code, and that it never imports torch."""
    command = [sys.executable, "-c", PROGRAM, "--workspace", ws.root, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "0 problems" in done.stdout, done
    (ws.root / ".meristem/packs").rename(ws.root / "elsewhere")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 1 and json.loads(done.stdout)["exit_code"] == 1
    assert "problem" in {check["status"] for check in json.loads(done.stdout)["checks"]}


PROGRAM = """
import sys
sys.modules["torch"] = None
from meristem.cli.main import main
main()
"""
