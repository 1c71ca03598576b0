"""Ed25519 keys that sign the head of the chain: private ones in files outside the workspace, public ones as evidence.

An event ``key.added`` or ``key.rotated`` names the new public key (its subject is the key's document) and carries a
signature over a statement that holds the hash of the event before it, so it cannot be moved elsewhere::

    data: {"key": "<public, hex>", "by": "<public, hex>", "signature": "<hex>"}

The first key signs for itself; every later one is signed for by a key in force. From a rotation on the old key signs
nothing any more. Hex is lower case and of full length: no signature has a second spelling.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from meristem.errors import BadInput, Tampered
from meristem.store import evidence
from meristem.store.canonical import canonical, digest_document
from meristem.store.evidence import Event
from meristem.store.files import discard, disk_failure, sync_folder
from meristem.store.schema import events

if TYPE_CHECKING:  # cryptography takes a while to import, and few commands need it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from meristem.store.store import Transaction

SCHEMA = "meristem/key/v1"
STATEMENT_SCHEMA = "meristem/key-statement/v1"
ADDED, ROTATED = "key.added", "key.rotated"
_PUBLIC = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class SigningKey:
    """A private key; ``public`` is its public half in hex, which is its name everywhere."""

    public: str
    _private: Ed25519PrivateKey

    def sign(self, body: bytes) -> bytes:
        return self._private.sign(body)


@dataclass(frozen=True)
class Standing:
    """From which event to which a public key counts (``until`` is the event that ended it), and who vouched for it."""

    public: str
    since: int
    until: int | None
    by: str

    def counts_at(self, sequence: int) -> bool:
        return self.since <= sequence and (self.until is None or sequence < self.until)


class Keyring:
    """The public keys that a chain of events has let in."""

    def __init__(self) -> None:
        self._keys: dict[str, Standing] = {}

    def __iter__(self) -> Iterator[Standing]:
        return iter(self._keys.values())

    def get(self, public: str) -> Standing | None:
        return self._keys.get(public)

    def in_force(self) -> list[Standing]:
        return [key for key in self if key.until is None]

    def counts(self, public: str, sequence: int) -> bool:
        """Whether ``public`` may sign the chain up to event ``sequence``."""
        found = self._keys.get(public)
        return found is not None and found.counts_at(sequence)

    def admit(self, event: Event) -> None:
        """Take in a ``key.added`` or ``key.rotated``. Raises ``Tampered`` unless a key in force signed for it."""
        try:
            public, by, signature = (event.data[name] for name in ("key", "by", "signature"))
        except (KeyError, TypeError) as error:
            raise Tampered("it does not name a key and who signed for it") from error
        if not (is_public(public) and is_public(by) and is_signature(signature)):
            raise Tampered("its keys and its signature are not written in hex as they should be")
        if event.subject != digest_document(document(public)):
            raise Tampered("its subject is not the document of its key")
        if public in self._keys:
            raise Tampered("the key was registered before")
        first = not self._keys and event.kind == ADDED and public == by
        if not first and not self.counts(by, event.sequence):
            raise Tampered("the key that signed for it was not in force")
        if not genuine(by, bytes.fromhex(signature), statement(event.kind, public, by, event.previous)):
            raise Tampered("its signature does not match")
        self._keys[public] = Standing(public, event.sequence, None, by)
        if event.kind == ROTATED:
            self._keys[by] = replace(self._keys[by], until=event.sequence)


def is_public(text: Any) -> bool:
    return isinstance(text, str) and _PUBLIC.fullmatch(text) is not None


def is_signature(text: Any) -> bool:
    return isinstance(text, str) and _SIGNATURE.fullmatch(text) is not None


def document(public: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "public": public}


def genuine(public: str, signature: bytes, body: bytes) -> bool:
    """Whether ``signature`` is the one that the private half of ``public`` makes for ``body``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, body)
    except (InvalidSignature, ValueError):
        return False
    return True


def registered(connection: Connection) -> Keyring:
    """The keys as the log tells. Raises ``Tampered`` when one of its key events is false."""
    ring = Keyring()
    query = select(events.c.body).where(events.c.kind.in_((ADDED, ROTATED))).order_by(events.c.sequence)
    for body in connection.scalars(query).all():
        event = Event.from_body(body)
        try:
            ring.admit(event)
        except Tampered as error:
            raise Tampered(f"event {event.sequence}: {error}") from error
    return ring


def add(tx: Transaction, new: SigningKey, signer: SigningKey | None) -> bool:
    """Register ``new``; False when it counts already. Every key but the first needs a ``signer`` in force.

    Raises ``BadInput`` when there is none, or when ``new`` was rotated out.
    """
    ring = registered(tx.connection)
    if (known := ring.get(new.public)) is not None:
        if known.until is not None:
            raise BadInput(
                f"the key {new.public[:12]} was rotated out by event {known.until}; make a new one"
            )
        return False
    if not ring.in_force():
        signer = new
    elif signer is None:
        raise BadInput("there is a key already: sign for the new one with `--key FILE` or MERISTEM_KEY")
    else:
        _refuse_out_of_force(ring, signer)
    _append(tx, ADDED, new, signer)
    return True


def rotate(tx: Transaction, old: SigningKey, new: SigningKey) -> bool:
    """Let ``new`` take the place of ``old``, which signs for it and nothing after; False when it has done so already.

    Raises ``BadInput`` unless ``old`` is in force and ``new`` is unknown.
    """
    ring = registered(tx.connection)
    known, before = ring.get(new.public), ring.get(old.public)
    if known and before and known.by == old.public and before.until == known.since:
        return False
    _refuse_out_of_force(ring, old)
    if known is not None:
        raise BadInput(f"the key {new.public[:12]} is registered already; rotate to a new one")
    _append(tx, ROTATED, new, old)
    return True


def _refuse_out_of_force(ring: Keyring, key: SigningKey) -> None:
    found = ring.get(key.public)
    if found is None:
        raise BadInput(
            f"the key {key.public[:12]} is not registered; `meristem key add --file FILE` does that"
        )
    if found.until is not None:
        raise BadInput(f"the key {key.public[:12]} was rotated out by event {found.until}; use its successor")


def _append(tx: Transaction, kind: str, new: SigningKey, by: SigningKey) -> None:
    _, previous = evidence.head(tx.connection)
    signature = by.sign(statement(kind, new.public, by.public, previous)).hex()
    subject = tx.add_document(document(new.public))
    tx.append(kind, subject, key=new.public, by=by.public, signature=signature)


def statement(kind: str, public: str, by: str, previous: str) -> bytes:
    """What ``by`` signs to let ``public`` in, right behind the event whose hash is ``previous``."""
    return canonical(
        {"schema": STATEMENT_SCHEMA, "kind": kind, "key": public, "by": by, "previous": previous}
    )


def load_or_make(path: Path, workspace: Path) -> SigningKey:
    """The key in ``path``, made there if nothing is; what is there is never overwritten.

    Raises what ``load`` raises.
    """
    refuse_inside(path, workspace, "a private key")
    if not path.exists():
        _make(path)
    return load(path, workspace)


def load(path: Path, workspace: Path) -> SigningKey:
    """The key in ``path``.

    Raises ``BadInput`` for what is no Ed25519 key in PEM, for a file in ``workspace``, and for one that others than
    its owner can read: whoever holds the key can sign a chain of their own.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    refuse_inside(path, workspace, "a private key")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise BadInput(f"{path}: others than its owner can read this private key; `chmod 600 {path}`")
            private = serialization.load_pem_private_key(file.read(), password=None)
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; `meristem key add --file {path}` makes a key") from error
    except OSError as error:
        raise disk_failure(error, path) from error
    except TypeError as error:
        raise BadInput(f"{path}: the key is encrypted; give one without a password") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not a private key in PEM; give another file") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise BadInput(f"{path}: not an Ed25519 key; give another file")
    return SigningKey(private.public_key().public_bytes_raw().hex(), private)


def refuse_inside(path: Path, workspace: Path, what: str) -> None:
    """Raises ``BadInput`` for a file in the workspace: whoever can change the one could change the other."""
    if path.resolve().is_relative_to(workspace.resolve()):
        raise BadInput(f"{path}: this is inside the workspace; keep {what} elsewhere")


def _make(path: Path) -> None:
    """A new key in ``path``, whole or not at all, for its owner alone, and never over a file that is there."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = Ed25519PrivateKey.generate().private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:  # made by somebody else in this moment: theirs is taken
        pass
    except OSError as error:
        raise disk_failure(error, path) from error
    finally:
        discard(temporary)
