"""``Custody``: the verbs of a workspace that keep it safe and account for it.

Evidence, keys, garbage, deletion, migration, health: what an auditor and an operator ask for. ``Workspace`` adds the
verbs of whoever works with models.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem import config as configuration
from meristem.config import CONFIG_NAME, ModelSettings, WorkspaceConfig
from meristem.errors import BadInput
from meristem.store import evidence
from meristem.store.evidence import Event
from meristem.store.packs import write_file_durably
from meristem.store.store import Store

if TYPE_CHECKING:
    from meristem.ecosystem import deletion, gc
    from meristem.ecosystem.audit import Audit
    from meristem.ecosystem.doctor import Health
    from meristem.store.checkpoints import Checkpoint
    from meristem.store.keys import Standing

STORE_FOLDER = ".meristem"
Progress = Callable[[str, int, int, str], None]  # what, done, total, note


class Custody:
    """A workspace as it is kept: its folder, its configuration and its store."""

    def __init__(self, root: Path, *, actor: str | None = None, progress: Progress | None = None):
        self.root = Path(root)
        self.actor = actor or os.environ.get("MERISTEM_ACTOR") or _login_name()
        self.progress = progress
        self.config = configuration.load_config(self.root / CONFIG_NAME)
        self.store = store_of(self.root, self.config)

    @classmethod
    def migrate(cls, root: str | Path = ".", **options: Any) -> tuple[str, str]:
        """Lead the store of an older Meristem to this one's schema; returns the revisions ``(from, to)``."""
        workspace = cls(Path(root), **options)
        try:
            return workspace.store.database.migrate(workspace.actor)
        finally:
            workspace.close()

    @classmethod
    def doctor(cls, root: str | Path = ".", progress: Progress | None = None) -> Health:
        """Check the workspace in ``root``, broken or not; nothing is written. See ``ecosystem.doctor``."""
        from meristem.ecosystem import doctor

        root = Path(root)
        return doctor.examine(
            root, root / STORE_FOLDER, lambda config: store_of(root, config), _check_gates, progress
        )

    def close(self) -> None:
        self.store.database.close()

    # Evidence

    def events(self, *, after: int = 0, last: int | None = None) -> Iterator[Event]:
        """Events, oldest first; ``last``: only that many of the newest."""
        with self.store.database.read() as connection:
            if last is not None:
                yield from evidence.newest(connection, last)
            else:
                yield from evidence.read(connection, after=after)

    def add_key(self, file: str | Path, *, signer: str | Path | None = None) -> tuple[str, bool]:
        """Register the key in ``file``, made there if missing; returns ``(its public half, whether it was new)``.

        Every key but the first needs a ``signer``, the file of a key in force. See ``store.keys``.
        """
        from meristem.store import keys

        by = keys.load(Path(signer), self.root) if signer else None
        new = keys.load_or_make(Path(file), self.root)
        with self.store.transaction(self.actor, "a key for checkpoints") as tx:
            return new.public, keys.add(tx, new, by)

    def rotate_key(self, old: str | Path, new: str | Path) -> tuple[str, bool]:
        """Let the key in the file ``new`` (made if missing) take the place of the one in ``old``; as ``add_key``."""
        from meristem.store import keys

        before, after = keys.load(Path(old), self.root), keys.load_or_make(Path(new), self.root)
        with self.store.transaction(self.actor, f"in place of {before.public[:12]}") as tx:
            return after.public, keys.rotate(tx, before, after)

    def keys(self) -> list[Standing]:
        """The public keys that sign checkpoints, oldest first, with the events between which each counts."""
        from meristem.store import keys

        with self.store.database.read() as connection:
            return list(keys.registered(connection))

    def checkpoint(
        self, key: str | Path, *, anchor: str | Path | None = None, anchor_command: str | None = None
    ) -> Checkpoint:
        """Sign the present head, and hand it to a file or a command outside; see ``store.checkpoints``."""
        from meristem.store import checkpoints, keys

        outside = checkpoints.Anchor(Path(anchor), self.root) if anchor else None
        signer = keys.load(Path(key), self.root)
        with self.store.database.write() as connection:
            made = checkpoints.sign(connection, signer)
        if outside:  # committed by now: an anchor never knows a head that the workspace could still lose
            outside.append(made)
        if anchor_command is not None:
            checkpoints.pipe(made, anchor_command)
        return made

    def export_log(self) -> Iterator[bytes]:
        """One line of JSON per event, its stored bytes as they are, and after them one per checkpoint."""
        from meristem.store import checkpoints

        with self.store.database.read() as connection:
            yield from checkpoints.export(connection)

    def export_log_to(self, file: str | Path) -> None:
        """``export_log`` into a file, which then is there whole."""
        write_file_durably(Path(file), self.export_log())

    def verify(self, *, head: str | None = None, anchor: str | Path | None = None) -> Audit:
        """Recompute every digest, the chain, every signature and every pointer; see ``ecosystem.audit``."""
        from meristem.ecosystem import audit
        from meristem.store import checkpoints

        lines = checkpoints.Anchor(Path(anchor), self.root).read() if anchor else None
        return audit.verify(self.store, self._steps("verify"), head, lines)

    # Space

    def collect_garbage(self, *, dry_run: bool = False) -> gc.Collection:
        """Retire what ``retention`` in meristem.yaml gives up, and free the space of what nothing needs.

        ``dry_run`` only says what would go. See ``ecosystem.gc``.
        """
        from meristem.ecosystem import gc

        rules = {str(kind): days for kind, days in self.config.retention.items()}
        return gc.collect(self.store, self.actor, rules, dry_run=dry_run, progress=self._steps("gc"))

    def reindex(self) -> gc.Reindexed:
        """Make the index of blobs again from the packs alone."""
        from meristem.ecosystem import gc

        report = self.progress
        step = (lambda done, total: report("reindex", done, total, "")) if report else None
        return gc.reindex(self.store, step)

    def delete_data(self, reference: str, reason: str) -> deletion.Deletion:
        """Delete a data set for good: ``name`` with all its versions, ``name@v2`` or a digest.

        Its digest, the reason and the versions trained on it stay; see ``ecosystem.deletion``.
        """
        from meristem.ecosystem import deletion

        return deletion.delete(self.store, self.actor, reference, reason, self._steps("delete"))

    def _steps(self, verb: str) -> Callable[[str, int, int], None] | None:
        report = self.progress
        return (lambda what, done, total: report(f"{verb} {what}", done, total, "")) if report else None


def store_of(root: Path, config: WorkspaceConfig | None) -> Store:
    """The store that ``config`` names (None: the default one) of the workspace in ``root``; nothing is opened yet."""
    packs = config.packs if config else None
    if packs and "://" not in packs:
        packs = str(root / packs)
    return Store(root / STORE_FOLDER, config.store if config else None, packs)


def check_gates(settings: ModelSettings) -> None:
    """Raises ``BadInput`` for a gate that is not there or takes no such arguments."""
    from meristem.release import gates

    try:
        for gate in settings.gates:
            gates.build(gate.gate, gate.arguments)
    except BadInput as error:
        raise BadInput(f"{CONFIG_NAME}: {error}") from error


def _check_gates(config: WorkspaceConfig) -> None:
    for name in ("", *config.models):  # "": every model that has no settings of its own
        check_gates(config.for_model(name))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in many containers
        return f"uid-{os.getuid()}"
