"""Reproduction: execute an update again from its manifest and compare, bit by bit, with what is recorded."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection

from meristem.ecosystem import ledger, retirement, versions
from meristem.ecosystem.folders import ingest
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.records import Asset, Content, Reproduction, Update, UpdateOutcome
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, Interrupted
from meristem.store.index import locate
from meristem.store.packs import Blob, disk_failure
from meristem.store.store import Store, read_document
from meristem.training import method_states, updates
from meristem.training.updates import Progress

FOLDER = "reproduce-"  # runs/reproduce-update-3-...: held by a lock as long as its process lives
_STOPPING = "stopping after this step; Ctrl-C again stops at once"

# dtype -> how numpy reads its bits
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_WHOLE = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """Named tensors and files, as digests: the weights of a version, or its method state."""

    tensors: dict[str, str]
    files: dict[str, str]


def of_version(connection: Connection, version: VersionEntry) -> Entry:
    """The update that made ``version``. Raises ``BadInput`` when none did."""
    made = version.record
    for entry in ledger.newest_first(connection, "update", version.model):
        update = entry.as_(Update)
        if entry.result and ([update.parent], update.data, update.recipe) == (
            made.parents,
            made.data,
            made.recipe,
        ):
            outcome = UpdateOutcome.from_document(read_document(connection, entry.result))
            if outcome.version == version.digest:
                return entry
    raise BadInput(f"{version.label} was not made by an update of this workspace; there is nothing to repeat")


def reproduce(store: Store, actor: str, entry: Entry, progress: Progress | None = None) -> Reproduction:
    """Train ``entry`` again in a folder of its own, compare with its version, and record what was found.

    No version is made and no alias moves. Raises ``BadInput`` when the update is not done, when other library versions
    are installed than it was made with, or when data or weights that it needs were given up; ``Interrupted`` after
    Ctrl-C, with nothing left behind.
    """
    update = entry.as_(Update)
    with store.database.read() as connection:
        version = _made(connection, entry)
        _refuse_lost_inputs(connection, entry, update)
    if changed := updates.other_code(update):
        raise BadInput(f"{entry.id} was made with {', '.join(changed)}: install that again to reproduce it")
    with _temporary(store, entry) as folder, updates.disk_errors(folder):
        try:
            trained = updates.train(store, update, folder, progress, _STOPPING)
        except Interrupted as stopped:
            raise Interrupted(
                f"the reproduction of {entry.id} was stopped; nothing of it is kept"
            ) from stopped
        difference = _compare(store, update, version, trained)
    found = Reproduction(
        update=entry.digest, version=version.digest, equal=difference is None, difference=difference
    )
    with store.transaction(actor, f"{entry.id} was executed again") as tx:
        name = difference["name"] if difference else None
        tx.append("reproduction.recorded", tx.add_document(found.document()), equal=found.equal, first=name)
    return found


def in_words(difference: dict[str, Any]) -> str:
    """One line about the first difference."""
    text = f"{difference['part']} {difference['name']}: {difference['why']}"
    if "index" in difference:
        return (
            f"{text}, {difference['differing']} of {difference['elements']}; the first at "
            f"{difference['index']}: recorded {difference['recorded']}, here {difference['here']}"
        )
    if "recorded" in difference:
        return f"{text}: recorded {difference['recorded']}, here {difference['here']}"
    return text


def _made(connection: Connection, entry: Entry) -> VersionEntry:
    if entry.status != "done" or entry.result is None:
        raise BadInput(f"{entry.id} is {entry.status} and has made no version; give an update that is done")
    outcome = UpdateOutcome.from_document(read_document(connection, entry.result))
    return versions.by_digest(connection, outcome.version)


def _refuse_lost_inputs(connection: Connection, entry: Entry, update: Update) -> None:
    """Before any compute: what was deleted or retired cannot be trained on again."""
    parent = versions.by_digest(connection, update.parent)
    state = [update.method_state] if update.method_state else []
    for digest in dict.fromkeys(
        [*update.data, *updates.history_data(connection, parent), *state, parent.digest]
    ):
        if gone := retirement.event_of(connection, digest):
            label = gone.data.get("label", digest)
            raise BadInput(f"{entry.id} cannot be reproduced: {label} was {retirement.told(gone)}")


@contextmanager
def _temporary(store: Store, entry: Entry) -> Iterator[Path]:
    """A folder that is gone afterwards. Its lock tells ``doctor`` whether its process still lives."""
    try:
        runs = store.root / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{entry.id}-", dir=runs))
    except OSError as error:
        raise disk_failure(error, store.root) from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _compare(
    store: Store, update: Update, version: VersionEntry, trained: updates.Trained
) -> dict[str, Any] | None:
    """The first difference between what was trained and what is recorded; None when every bit is the same."""
    with ingest(trained.weights, updates.base_content(store, update)) as (content, blobs):
        state, state_blobs = method_states.encode(update.model, trained.states)
        wanted = version.record.assets.get("method-state")
        made = state.digest if trained.states else None
        if (content.digest, made) == (version.content, wanted):
            return None
        with store.database.read() as connection:
            recorded = versions.content_of(connection, version.content)
            before = Asset.from_document(read_document(connection, wanted)) if wanted else None
        fresh = {blob.digest: blob for blob in [*blobs, *state_blobs]}
        return (
            _first(store, "weights", _part(recorded), _part(content), fresh)
            or _first(store, "method state", _part(before), _part(state if made else None), fresh)
            # What is left is what a document says beside its tensors and files.
            or {"part": "weights" if content.digest != version.content else "method state",
                "name": "description", "why": "the documents differ"}
        )  # fmt: skip


def _part(document: Content | Asset | None) -> _Part:
    return _Part(document.tensors, document.files) if document else _Part({}, {})


def _first(
    store: Store, part: str, recorded: _Part, here: _Part, fresh: dict[str, Blob]
) -> dict[str, Any] | None:
    """The first name, tensors before files, under which the two hold different bytes."""
    for kind, old, new in (("tensor", recorded.tensors, here.tensors), ("file", recorded.files, here.files)):
        for name in sorted(old.keys() | new.keys()):
            about = {"part": part, "name": name}
            if name not in new:
                return {**about, "why": f"the {kind} is recorded, and was not made here"}
            if name not in old:
                return {**about, "why": f"the {kind} was made here, and is not recorded"}
            if old[name] != new[name]:
                return {**about, **_contents(store, old[name], fresh[new[name]])}
    return None


def _contents(store: Store, digest: str, here: Blob) -> dict[str, Any]:
    if here.dtype is None:
        return {"why": "the bytes of the file differ"}
    with store.database.read() as connection:
        recorded = locate(connection, [digest]).get(digest)
    if recorded is None:
        return {"why": "the elements differ; the recorded ones were given up"}
    if (recorded.dtype, recorded.shape) != (here.dtype, here.shape):
        shapes = [f"{found.dtype} {list(found.shape)}" for found in (recorded, here)]
        return {"why": "another dtype or shape", "recorded": shapes[0], "here": shapes[1]}
    return first_element(here.dtype, here.shape, store.read_blob(digest), here.data)


def first_element(
    dtype: str, shape: tuple[int, ...], recorded: bytes | memoryview, here: bytes | memoryview
) -> dict[str, Any]:
    """Where two tensors of one dtype and shape first differ in a bit, and in how many elements they do."""
    total = int(np.prod(shape, dtype=np.int64))
    width = len(memoryview(recorded).cast("B")) // total
    old, new = (np.frombuffer(data, dtype=np.uint8).reshape(total, width) for data in (recorded, here))
    different = np.flatnonzero((old != new).any(axis=1))
    position = int(different[0])
    return {
        "why": "elements differ",
        "index": [int(number) for number in np.unravel_index(position, shape or (1,))],
        "recorded": _value(dtype, old[position].tobytes()),
        "here": _value(dtype, new[position].tobytes()),
        "differing": int(different.size),
        "elements": total,
    }


def _value(dtype: str, data: bytes) -> str:
    """One element for people; as bits where numpy does not know the dtype, or the number hides its bits."""
    if dtype == "BF16":
        dtype, data = "F32", b"\0\0" + data  # the upper half of a float32
    if dtype in _FLOATS:
        value = np.frombuffer(data, dtype=_FLOATS[dtype])[0]
        return repr(value.item()) if np.isfinite(value) else f"{value} (0x{data[::-1].hex()})"
    if dtype in _WHOLE:
        return repr(np.frombuffer(data, dtype=_WHOLE[dtype])[0].item())
    return f"0x{data[::-1].hex()}"
