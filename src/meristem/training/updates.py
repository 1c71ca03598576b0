"""Updates: from a manifest to a committed version, resumable at every instant.

An update is opened in the store with everything that decides its result. Training writes checkpoints under
``runs/update-N``; whoever runs the same update again continues from the newest complete one and gets the same
weights. The version appears in one transaction at the end, or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from meristem._quiet import quiet_libraries
from meristem.config import Recipe
from meristem.data.datasets import by_task, load_rows
from meristem.ecosystem import aliases, assets, checkouts, ledger, retirement, versions
from meristem.ecosystem.folders import ingest
from meristem.ecosystem.ledger import Entry
from meristem.ecosystem.reach import FINISHED
from meristem.ecosystem.records import Asset, Update, UpdateOutcome, Version, references
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import (
    BadInput,
    EnvironmentFailure,
    Interrupted,
    MeristemError,
    StateMoved,
    TrainingFailed,
)
from meristem.store.canonical import digest_document
from meristem.store.packs import disk_failure
from meristem.store.store import Store, read_document
from meristem.training import method_states
from meristem.training.interrupts import Interruption
from meristem.training.stopwatch import Stopwatch

Progress = Callable[[str, int, int, str], None]  # what, done, total, note

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again stops at once"
_CODE = ("meristem", "torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Trained:
    """``weights``: the folder of what was trained, as ``ingest`` reads it."""

    weights: Path
    states: dict[str, Any]
    steps: int
    tokens: int
    seconds: float
    curve: list[dict[str, float]]


def open_update(store: Store, actor: str, *, parent: VersionEntry, data: list[str], recipe: Recipe) -> Entry:
    """The update with exactly these inputs, finished or not, or a new one. Nothing is trained yet.

    A method state of ``parent`` that was given up (it held rows of a deleted data set) is not gone on with.
    """
    state = parent.record.assets.get("method-state")
    with store.database.read() as connection:
        lost = state is not None and retirement.event_of(connection, state) is not None
    update = Update(
        model=parent.model,
        parent=parent.digest,
        data=data,
        recipe=digest_document(recipe.document()),
        method_state=None if lost else state,
        code=code_versions(),
    )
    with store.transaction(
        actor, f"update {parent.label} with {', '.join(recipe_methods(recipe)) or 'no method'}"
    ) as tx:
        aliases.check_actor(tx.connection, parent.model, aliases.CHALLENGER, actor)
        if found := ledger.entries(tx.connection, "update", digest=update.digest):
            return found[-1]
        facts = {"document": tx.add_document(recipe.document())}
        assets.add(tx, Asset(kind="recipe", name=parent.model, files={}, facts=facts))
        return ledger.open_record(tx, "update", update, parent.model)


def run(store: Store, actor: str, entry: Entry, progress: Progress | None = None) -> VersionEntry:
    """Train (or go on training) ``entry`` and commit its version.

    Raises ``StateMoved`` while another process runs it, ``Interrupted`` after Ctrl-C with a checkpoint kept,
    ``NonFiniteLoss`` when the loss is NaN, ``EnvironmentFailure`` when the disk refuses; in each case the same
    call continues later. Raises ``BadInput`` when it was opened with other library versions than are installed.
    """
    with _locked(store, entry) as folder:
        with store.database.read() as connection:
            entry = ledger.find(connection, entry.id)
            if entry.status == "done" and entry.result:
                outcome = UpdateOutcome.from_document(read_document(connection, entry.result))
                shutil.rmtree(folder, ignore_errors=True)  # killed between its commit and this line
                return versions.by_digest(connection, outcome.version)
            aliases.check_actor(connection, entry.model, aliases.CHALLENGER, actor)
        _refuse_other_code(entry)
        entry = _opened(store, actor, entry)
        try:
            with disk_errors(folder):
                trained = train(store, entry.as_(Update), folder, progress)
        except BaseException as error:
            _note_stop(store, actor, entry, error)
            raise
        created = _commit(store, actor, entry, trained)
        shutil.rmtree(folder, ignore_errors=True)
        return created


def _opened(store: Store, actor: str, entry: Entry) -> Entry:
    """``entry`` as an open update again, if it was closed. Raises ``BadInput`` when its inputs were given up."""
    inputs = sorted(references(entry.record.document())[0])
    if entry.status != "closed":
        with store.database.read() as connection:
            retirement.refuse(connection, *inputs)
        return entry
    with store.transaction(actor, f"{entry.id} taken up again") as tx:
        retirement.refuse(tx.connection, *inputs)
        ledger.set_status(tx, entry, "open")
    return replace(entry, status="open")


def close(store: Store, actor: str, entry: Entry, reason: str) -> None:
    """Give up an update that is not done; its checkpoints go. Running it again opens it again.

    Raises ``BadInput`` for one that is done, ``StateMoved`` while a process runs it.
    """
    entry.as_(Update)
    with _locked(store, entry) as folder:
        with store.transaction(actor, reason or f"{entry.id} given up") as tx:
            now = ledger.find(tx.connection, entry.id)
            if now.status == "done":
                raise BadInput(f"{entry.id} is done; only one that is not can be closed")
            if now.status != "closed":
                ledger.set_status(tx, entry, "closed")
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_other_code(entry: Entry) -> None:
    """A resumed run with other libraries would end in weights that its record does not describe."""
    if changed := other_code(entry.as_(Update)):
        raise BadInput(
            f"{entry.id} was begun with {', '.join(changed)}: install that again, or start it as a new update "
            "with `meristem update run`"
        )


def other_code(update: Update) -> list[str]:
    """What computes differently here than where ``update`` was opened: ``torch 2.8 (now 2.9)``."""
    begun, here = update.code, code_versions()
    return [f"{name} {begun.get(name)} (now {here[name]})" for name in here if begun.get(name) != here[name]]


def train(
    store: Store, update: Update, folder: Path, progress: Progress | None, stopping: str = _STOPPING
) -> Trained:
    """Do what the manifest ``update`` says, with checkpoints in ``folder``; nothing is committed.

    ``stopping`` is told on Ctrl-C, when the step under way is finished before ``Interrupted`` is raised.
    """
    with Interruption() as early:  # some libraries swallow a KeyboardInterrupt while they are imported
        from meristem.training.continual import newest_complete_checkpoint
        from meristem.training.reporting import ProgressCallback, method_progress
        from meristem.training.saving import save

        stage = import_module(f"meristem.training.{_stage(store, update)}")
    if early.requested:
        raise KeyboardInterrupt

    recipe, rows, history, state = _inputs(store, update)
    with store.database.read() as connection:
        parent = versions.by_digest(connection, update.parent)
    here = checkouts.cached(store, parent.content)
    state = method_states.still_fitting(state, recipe, adapter=here.base_folder is not None)
    with (
        Stopwatch(folder / "seconds.json") as watch,
        Interruption(stopping) as interruption,
        quiet_libraries(),
    ):
        callback = ProgressCallback(progress, interruption, watch.note)
        trainer = stage.build_trainer(
            recipe,
            folder=here.folder,
            base_folder=here.base_folder,
            rows=rows,
            history=history,
            method_state=state,
            output=folder,
            callbacks=[callback],
            progress=method_progress(progress),
        )
        callback.attach(trainer)
        trainer.train(resume_from_checkpoint=newest_complete_checkpoint(folder))
        if interruption.requested:
            raise Interrupted(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "a checkpoint is kept, the same command continues"
            )
    states = {**state, **trainer.method_state()}
    with quiet_libraries():
        weights = save(trainer, recipe, here, folder)
    return Trained(
        weights=weights,
        states=states,
        steps=trainer.state.global_step,
        tokens=int(callback.tokens(trainer)),
        seconds=watch.seconds(),
        curve=callback.curve(trainer),
    )


def _inputs(store: Store, update: Update) -> tuple[Recipe, list[dict[str, Any]], dict[str, Any], Any]:
    """Recipe, new rows, rows of earlier tasks, and the method state of the parent."""
    recipe = Recipe.from_document(store.document(update.recipe))
    rows = [row for digest in update.data for row in load_rows(store, _asset(store, digest).files)]
    with store.database.read() as connection:
        gone = retirement.all_given_up(connection)  # what was deleted is replayed no more
        earlier = history_data(connection, versions.by_digest(connection, update.parent))
    learned = set(by_task(rows))
    history: dict[str, list[dict[str, Any]]] = {}
    for digest in earlier:
        if digest in update.data or digest in gone:
            continue
        for task, old in by_task(load_rows(store, _asset(store, digest).files)).items():
            if task not in learned:
                history.setdefault(task, []).extend(old)
    state = method_states.decode(store, _asset(store, update.method_state)) if update.method_state else {}
    return recipe, rows, history, state


def history_data(connection: Connection, version: VersionEntry) -> list[str]:
    """Digests of the data sets that a version and its ancestors learned, oldest first."""
    newest_first = [
        d for ancestor in versions.ancestors(connection, version) for d in reversed(ancestor.record.data)
    ]
    return list(dict.fromkeys(reversed(newest_first)))


def _stage(store: Store, update: Update) -> str:
    """The module of ``training`` that builds the trainer: the recipe's stage."""
    return Recipe.from_document(store.document(update.recipe)).stage


def _asset(store: Store, digest: str) -> Asset:
    return Asset.from_document(store.document(digest))


def _commit(store: Store, actor: str, entry: Entry, trained: Trained) -> VersionEntry:
    update = entry.as_(Update)
    with store.database.read() as connection:
        parent = versions.by_digest(connection, update.parent)
    tasks = {t for digest in update.data for t in _asset(store, digest).facts["tasks"]}
    with ingest(trained.weights, base_content(store, update)) as (content, blobs):
        state, state_blobs = method_states.encode(update.model, trained.states)
        stored = store.put([*blobs, *state_blobs])
        record = Version(
            model=update.model,
            content=content.digest,
            base=parent.record.base,
            parents=[parent.digest],
            recipe=update.recipe,
            data=update.data,
            tasks=sorted({*parent.record.tasks, *tasks}),
            assets={"method-state": state.digest} if trained.states else {},
            code=update.code,
        )
        with store.transaction(actor, f"{entry.id} trained {parent.label}") as tx:
            tx.add_blobs(stored)
            if trained.states:
                assets.add(tx, state)
            created = versions.create(tx, content, record)
            outcome = UpdateOutcome(
                update=entry.digest,
                version=created.digest,
                steps=trained.steps,
                tokens=trained.tokens,
                seconds=round(trained.seconds, 3),
                curve=trained.curve,
            )
            now = ledger.find(tx.connection, entry.id).status
            if now in FINISHED:  # on another machine of the team
                raise StateMoved(f"{entry.id} is {now} by now: somebody else ended it meanwhile; look at it")
            retirement.refuse(tx.connection, *update.data, update.parent)
            ledger.set_status(tx, entry, "done", tx.add_document(outcome.document()))
            aliases.point(tx, update.model, aliases.CHALLENGER, created.digest)
    return created


def base_content(store: Store, update: Update) -> str:
    """The digest of the full weights that an adapter made by ``update`` sits on."""
    with store.database.read() as connection:
        parent = versions.by_digest(connection, update.parent)
        return versions.content_of(connection, parent.content).base or parent.content


def _note_stop(store: Store, actor: str, entry: Entry, error: BaseException) -> None:
    """Record why a run stopped, unless the store cannot be written: that must not hide ``error``."""
    status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
    if entry.status == status:
        return
    with suppress(EnvironmentFailure, StateMoved), store.transaction(actor, _reason(error)) as tx:
        if ledger.find(tx.connection, entry.id).status not in FINISHED:
            ledger.set_status(tx, entry, status)


def _reason(error: BaseException) -> str:
    """What an event may hold: a text of ours with steps and ids, else only the error's name.

    The texts of libraries and of chat templates can quote training rows.
    """
    ours = isinstance(error, TrainingFailed | Interrupted)
    return str(error) if ours else type(error).__name__


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what the libraries make of a full or read-only disk into ``EnvironmentFailure``.

    torch and safetensors write through native code and raise their own errors; a disk error then stands in the
    text, or among the errors that led to theirs.
    """
    try:
        yield
    except MeristemError:
        raise
    except Exception as error:
        if (cause := _disk_error(error)) is None:
            raise
        raise disk_failure(cause, where) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        told = str(error)
        if match := re.search(r"os error (\d+)|code: (\d+)", told):
            number = int(match[1] or match[2])
            if number in _DISK:
                return OSError(number, os.strerror(number))
        if "PytorchStreamWriter failed" in told or "file write failed" in told:
            return OSError(errno.EIO, "a file could not be written whole")
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _locked(store: Store, entry: Entry) -> Iterator[Path]:
    """The run's folder, held by one process at a time; the lock dies with its process."""
    folder = store.root / "runs" / entry.id
    path = store.root / "runs" / f"{entry.id}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise disk_failure(error, folder) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise StateMoved(
                f"{entry.id} is being run by process {holder}; wait for it or stop it"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield folder


def recipe_methods(recipe: Recipe) -> list[str]:
    return [method.name for method in recipe.methods]


def code_versions() -> dict[str, str]:
    """Versions of everything that computes the result."""
    found = {"python": platform.python_version()}
    for name in _CODE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise BadInput(f"{name} is not installed; pip install 'meristem[train]'") from None
    return found
