"""Keys, signed heads and anchors: who may sign, what is kept outside, and that nothing has a second spelling."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from sqlalchemy import delete, func, select, update

from meristem.errors import BadInput, EnvironmentFailure, Tampered
from meristem.store import checkpoints, evidence, keys
from meristem.store.canonical import canonical
from meristem.store.checkpoints import Anchor, Checkpoint
from meristem.store.schema import checkpoints as table
from meristem.store.schema import events


@pytest.fixture
def key(store, tmp_path):
    """A key that is registered as event 1."""
    made = keys.load_or_make(tmp_path / "key.pem", store.root)
    add(store, made)
    return made


@pytest.fixture
def other(store, tmp_path):
    """A key that nobody registered."""
    return keys.load_or_make(tmp_path / "other.pem", store.root)


@pytest.fixture
def anchor(store, tmp_path):
    return Anchor(tmp_path / "outside" / "anchor.jsonl", store.root)


@pytest.fixture(autouse=True)
def _outside(tmp_path):
    (tmp_path / "outside").mkdir()


def add(store, new, signer=None):
    with store.transaction("kim") as tx:
        return keys.add(tx, new, signer)


def rotate(store, old, new):
    with store.transaction("kim") as tx:
        return keys.rotate(tx, old, new)


def happen(store, count=1):
    for number in range(count):
        with store.transaction("kim") as tx:
            tx.append("test.happened", f"sha256:{number}")


def sign(store, key):
    with store.database.write() as connection:
        return checkpoints.sign(connection, key)


def examined(store, anchor=None):
    """``(anchored, signed, problems)`` of the whole log."""
    problems, ring = [], keys.Keyring()
    with store.database.read() as connection:
        for link in evidence.check_chain(connection):
            if link.event is not None and link.event.kind.startswith("key."):
                ring.admit(link.event)
        lines = anchor.read() if isinstance(anchor, Anchor) else anchor or []
        marks = checkpoints.examine(connection, ring, lines, lambda *problem: problems.append(problem))
    return *marks, problems


def count(store, what):
    with store.database.read() as connection:
        return connection.scalar(select(func.count()).select_from(what))


# Key files


def test_a_key_file_is_for_its_owner_alone_and_never_overwritten(store, tmp_path):
    path = tmp_path / "k.pem"
    made = keys.load_or_make(path, store.root)
    body = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and b"BEGIN PRIVATE KEY" in body
    assert keys.load_or_make(path, store.root).public == made.public and path.read_bytes() == body
    assert [found.name for found in tmp_path.iterdir() if "k.pem" in found.name] == ["k.pem"]
    path.write_text("mine")
    with pytest.raises(BadInput, match="not a private key"):
        keys.load_or_make(path, store.root)
    assert path.read_text() == "mine"


def test_a_key_inside_the_workspace_is_refused_through_links_too(store, tmp_path):
    (tmp_path / "link").symlink_to(store.root)
    inside = keys.load_or_make(tmp_path / "k.pem", store.root / "elsewhere")
    (tmp_path / "k.pem").rename(store.root / "k.pem")
    (tmp_path / "file").symlink_to(store.root / "k.pem")
    for path in (
        store.root / "k.pem",
        tmp_path / "link" / "k.pem",
        tmp_path / "file",
        tmp_path / "link" / "new",
    ):
        with pytest.raises(BadInput, match="inside the workspace"):
            keys.load_or_make(path, store.root)
    assert inside.public and not (store.root / "new").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_that_others_can_read_is_refused(store, tmp_path, mode):
    made = keys.load_or_make(tmp_path / "k.pem", store.root)
    (tmp_path / "k.pem").chmod(mode)
    for load in (keys.load, keys.load_or_make):
        with pytest.raises(BadInput, match=f"chmod 600 {tmp_path}/k.pem"):
            load(tmp_path / "k.pem", store.root)
    (tmp_path / "k.pem").chmod(0o400)
    assert keys.load(tmp_path / "k.pem", store.root).public == made.public


def test_what_is_no_key_is_refused(store, tmp_path):
    def pem(private, encryption):
        return private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    plain = serialization.NoEncryption()
    bad = {
        "another algorithm": pem(ec.generate_private_key(ec.SECP256R1()), plain),
        "a password": pem(ed25519.Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b"x")),
        "nothing": b"",
        "a picture": b"\x89PNG\x00",
    }
    for name, body in bad.items():
        (tmp_path / name).write_bytes(body)
        (tmp_path / name).chmod(0o600)
        with pytest.raises(BadInput, match="key"):
            keys.load(tmp_path / name, store.root)
    with pytest.raises(BadInput, match="no such file"):
        keys.load(tmp_path / "missing", store.root)
    with pytest.raises(EnvironmentFailure):
        keys.load_or_make(tmp_path / "no folder" / "key", store.root)


# Who may sign


def test_the_first_key_vouches_for_itself_and_later_ones_need_a_key_in_force(store, key, other, tmp_path):
    assert add(store, key) is False and count(store, events) == 1  # again: nothing
    with pytest.raises(BadInput, match="sign for the new one"):
        add(store, other)
    with pytest.raises(BadInput, match="not registered"):
        add(store, other, keys.load_or_make(tmp_path / "third.pem", store.root))
    assert add(store, other, key) is True
    with store.database.read() as connection:
        first, second = keys.registered(connection)
    assert (first.by, second.by) == (key.public, key.public) and (first.since, second.since) == (1, 2)


def test_a_rotation_ends_the_old_key(store, key, other, tmp_path):
    sign(store, key)
    assert rotate(store, key, other) is True
    assert rotate(store, key, other) is False and count(store, events) == 2  # again: nothing
    with pytest.raises(BadInput, match="rotated out by event 2"):
        sign(store, key)
    third = keys.load_or_make(tmp_path / "third.pem", store.root)
    for new, by in ((third, key), (key, other)):
        with pytest.raises(BadInput, match="rotated out"):
            add(store, new, by)
    with pytest.raises(BadInput, match="rotated out"):
        rotate(store, key, third)
    with pytest.raises(BadInput, match="registered already"):
        rotate(store, other, key)
    assert sign(store, other).sequence == 2
    assert examined(store)[2] == []


def test_a_checkpoint_by_a_key_that_was_rotated_out_is_found(store, key, other):
    rotate(store, key, other)
    happen(store)
    made = sign(store, other)
    fields = json.loads(made.body) | {"key": key.public}
    forged = canonical(fields)
    with store.database.write() as connection:
        values = {"sequence": made.sequence, "key": key.public, "body": forged, "signature": key.sign(forged)}
        connection.execute(table.insert().values(**values))
    _, signed, ((problem, _),) = examined(store)
    assert "may not sign event 3" in problem and signed.key == other.public


@pytest.mark.parametrize(
    "change",
    [
        {"signature": "0" * 128},
        {"signature": lambda s: s.upper()},
        {"signature": lambda s: s + "\n"},
        {"signature": lambda s: f" {s[1:]}"},
        {"signature": None},
        {"key": lambda s: s.upper()},
        {"by": "0" * 64},
        {"key": "0" * 64},
    ],
)
def test_a_false_key_event_is_refused(store, key, other, change):
    add(store, other, key)
    with store.database.read() as connection:
        first, second = [evidence.Event.from_body(body) for body in connection.scalars(select(events.c.body))]
    ring = keys.Keyring()
    ring.admit(first)
    ((name, value),) = change.items()
    data = second.data | {name: value(second.data[name]) if callable(value) else value}
    for event in (
        replace(second, data=data),
        replace(second, data={}),
        replace(second, data=[]),
        replace(second, subject=first.subject),
        replace(second, previous=evidence.GENESIS),  # its signature stands for one place in the log
        replace(second, kind=keys.ROTATED),
        first,
    ):
        with pytest.raises(Tampered):
            ring.admit(event)
    ring.admit(second)


# Signing the head


def test_the_same_head_is_the_same_checkpoint(store, key, other):
    add(store, other, key)
    first = sign(store, key)
    assert sign(store, key) == first and count(store, table) == 1
    assert sign(store, other).sequence == first.sequence and count(store, table) == 2
    happen(store)
    assert sign(store, key).sequence == first.sequence + 1


def test_who_is_not_registered_signs_nothing(store, other):
    happen(store)
    with pytest.raises(BadInput, match="not registered"):
        sign(store, other)
    assert count(store, table) == 0


def test_a_checkpoint_that_was_replaced_is_not_handed_on(store, key):
    sign(store, key)
    for values in ({"signature": bytes(64)}, {"body": b"{}"}, {"body": b"\xff"}):
        with store.database.write() as connection:
            connection.execute(update(table).values(**values))
        with pytest.raises(Tampered):
            sign(store, key)


def test_what_is_signed_is_said_and_the_rest_is_only_chained(store, key, anchor):
    anchor.append(sign(store, key))
    happen(store, 2)
    inner = sign(store, key)
    happen(store, 3)
    anchored, signed, problems = examined(store, anchor)
    assert (anchored.sequence, signed.sequence, problems) == (1, 3, [])
    assert (signed.key, signed.time) == (key.public, inner.time)
    assert examined(store)[0] is None and examined(store)[1].sequence == 3


# Anchors


def test_an_anchor_grows_by_whole_lines_and_holds_each_once(store, key, anchor):
    first = sign(store, key)
    assert anchor.append(first) is True and anchor.append(first) is False
    happen(store)
    assert anchor.append(sign(store, key)) is True
    lines = anchor.path.read_bytes().splitlines()
    assert [where for where, _ in anchor.read()] == [f"{anchor.path}:1", f"{anchor.path}:2"]
    assert json.loads(lines[0]) == {**json.loads(first.body), "signature": first.signature.hex()}


def test_an_append_that_broke_off_is_mended_by_the_next(store, key, anchor):
    first = sign(store, key)
    anchor.append(first)
    happen(store)
    second = sign(store, key)
    whole = anchor.path.read_bytes()
    for torn in (1, 8, 20, len(second.line())):
        anchor.path.write_bytes(whole + second.line()[:torn])
        with pytest.raises(BadInput, match=r":2: the last line is unfinished"):
            anchor.read()
        assert anchor.append(second) is True
        assert [line for _, line in anchor.read()] == [first, second]


@pytest.mark.parametrize("body", [b"my notes", b"my notes\n", b'{"head":1}', b"\n", b'{"head":"sha256:\n'])
def test_a_file_that_is_no_anchor_stays_as_it_is(store, key, anchor, body):
    anchor.path.write_bytes(body)
    with pytest.raises(BadInput, match=f"{anchor.path}:1: "):
        anchor.append(sign(store, key))
    with pytest.raises(BadInput, match=f"{anchor.path}:1: "):
        anchor.read()
    assert anchor.path.read_bytes() == body


def test_a_missing_an_empty_and_a_foreign_anchor_are_refused(store, key, anchor, tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        anchor.read()
    anchor.path.touch()
    with pytest.raises(BadInput, match="holds no checkpoint"):
        anchor.read()
    made = sign(store, key)
    body = canonical(json.loads(made.body) | {"store": evidence.GENESIS})
    anchor.path.write_bytes(Checkpoint.from_body(body, key.sign(body)).line() + b"\n")
    with pytest.raises(BadInput, match="another workspace"):
        anchor.append(made)
    _, _, ((problem, first),) = examined(store, anchor)
    assert (
        problem.startswith(f"{anchor.path}:1: this anchor is of another workspace, or the chain")
        and first == 1
    )
    (tmp_path / "link").symlink_to(store.root)
    for inside in (store.root / "a", tmp_path / "link" / "a", tmp_path / "outside" / ".." / "store" / "a"):
        with pytest.raises(BadInput, match="inside the workspace"):
            Anchor(inside, store.root)


def test_no_anchor_line_has_a_second_spelling(store, key, anchor):
    """Every byte flipped and every letter's case changed: refused as malformed, or found as false."""
    anchor.append(sign(store, key))
    good = anchor.path.read_bytes()
    for at in range(len(good)):
        for byte in {good[at] ^ 1, good[at] ^ 0x20}:
            anchor.path.write_bytes(good[:at] + bytes([byte]) + good[at + 1 :])
            try:
                _, _, problems = examined(store, anchor)
            except BadInput as error:
                assert f"{anchor.path}:1: " in str(error)
            else:
                assert problems, (at, byte)
    spaced = json.dumps(json.loads(good)).encode() + b"\n"
    doubled = good.replace(b'{"head"', b'{"head":"x","head"')
    for body in (spaced, doubled, b" " + good, good[:-1] + b"\r\n", good + b"\n"):
        anchor.path.write_bytes(body)
        with pytest.raises(BadInput):
            anchor.read()


def test_a_line_with_a_false_signature_is_named(store, key, other, anchor):
    made = sign(store, key)
    anchor.append(replace(made, signature=other.sign(made.body)))
    _, _, problems = examined(store, anchor)
    assert (f"{anchor.path}:1: the signature does not match", None) in problems


# What a checkpoint shows


def test_a_cut_tail_shows_and_says_from_where_on(store, key, anchor):
    happen(store, 2)
    anchor.append(sign(store, key))
    happen(store, 3)
    anchor.append(sign(store, key))
    with store.database.write() as connection:
        connection.execute(delete(events).where(events.c.sequence > 4))
        connection.execute(delete(table).where(table.c.sequence > 4))
    anchored, _, ((problem, first),) = examined(store, anchor)
    assert anchored.sequence == 3 and first == 4
    assert problem.startswith(f"{anchor.path}:2: ") and "event 6 was signed and is gone" in problem


def test_a_removed_and_an_exchanged_checkpoint_show(store, key, other, anchor):
    made = sign(store, key)
    anchor.append(made)
    with store.database.write() as connection:
        connection.execute(update(table).values(signature=other.sign(made.body)))
    problems = [problem for problem, _ in examined(store, anchor)[2]]
    assert any("does not hold this checkpoint" in problem for problem in problems)
    assert "checkpoint of event 1: the signature does not match" in problems
    with store.database.write() as connection:
        connection.execute(delete(table))
    assert examined(store)[2] == []
    ((problem, _),) = examined(store, anchor)[2]
    assert "does not hold this checkpoint" in problem


def test_a_stranger_who_signs_everything_anew_is_found(store, key, other, anchor, tmp_path):
    """The whole workspace made again, with a key of theirs: inside it nothing is wrong."""
    happen(store, 2)
    anchor.append(sign(store, key))
    with store.database.write() as connection:
        connection.execute(delete(events))
        connection.execute(delete(table))
    add(store, other)
    happen(store, 2)
    sign(store, other)
    assert examined(store)[2] == []
    problems = dict(examined(store, anchor)[2])
    told = "this anchor is of another workspace, or the chain was computed anew from its first event"
    assert any(problem.startswith(f"{anchor.path}:1: {told}") for problem in problems)
    assert any("does not lead back to the anchor's keys" in problem for problem in problems)


def test_keys_lead_back_to_the_anchor_through_additions_and_rotations(store, key, other, anchor, tmp_path):
    happen(store)
    anchor.append(sign(store, key))
    rotate(store, key, other)
    third = keys.load_or_make(tmp_path / "third.pem", store.root)
    add(store, third, other)
    sign(store, third)
    anchored, signed, problems = examined(store, anchor)
    assert (anchored.sequence, signed.sequence, problems) == (2, 4, [])
    fresh = Anchor(tmp_path / "outside" / "fresh", store.root)  # of the newest key alone
    fresh.append(sign(store, third))
    assert examined(store, fresh)[2] == []


# A command as an anchor


def test_a_command_gets_the_line(store, key, tmp_path):
    made, out = sign(store, key), tmp_path / "outside" / "out"
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
    checkpoints.pipe(made, f'{sys.executable} -c "{code}" {out}')
    assert out.read_bytes() == made.line() + b"\n"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (f"{sys.executable} -c 'import sys; sys.exit(\"no such bucket\")'", EnvironmentFailure),
        ("no-such-command-here", EnvironmentFailure),
        ("'", EnvironmentFailure),  # the shell says so
        ("echo no such bucket >&2; false", EnvironmentFailure),
        ("  ", BadInput),
    ],
)
def test_a_command_that_fails_has_anchored_nothing(store, key, command, error):
    with pytest.raises(error) as raised:
        checkpoints.pipe(sign(store, key), command)
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_one_line(store, key, anchor, monkeypatch):
    made = sign(store, key)

    def full(_descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailure, match="free some space"):
        anchor.append(made)


# Export


def test_an_export_is_the_bytes_that_were_hashed_and_the_checkpoints(store, key):
    happen(store, 3)
    made = sign(store, key)
    with store.database.read() as connection:
        lines = list(checkpoints.export(connection))
        bodies = list(connection.scalars(select(events.c.body).order_by(events.c.sequence)))
    assert lines == [*(body + b"\n" for body in bodies), made.line() + b"\n"]
    with store.database.write() as connection:
        connection.execute(update(events).where(events.c.sequence == 2).values(body=b"{\n}"))
    with store.database.read() as connection, pytest.raises(Tampered, match="event 2"):
        list(checkpoints.export(connection))
