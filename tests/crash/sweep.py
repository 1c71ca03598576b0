"""Kill an operation at every change that it makes to the workspace, restart, and see that nothing is lost.

An undisturbed run under ``strace`` lists the changes (writes, syncs, renames, links, unlinks, truncations, new files and
folders). Then, for each of them, the operation runs again on a fresh copy and

- ``before`` dies by SIGKILL on entering the call. strace delivers the signal at the entry stop, and the kernel then
  skips the call: it is not executed;
- ``after`` dies on entering the next call, whatever it is: this one was executed, nothing else was;
- ``ENOSPC``, ``EIO``: the call fails once with this error and is not executed; the process goes on.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash import checks, sync_order
from tests.crash.nursery import Done, Nursery
from tests.crash.operations import Operation
from tests.crash.traces import CHANGING, Call, Point, calls, points

from meristem.errors import MeristemError

KILLS = ("before", "after")
ERRORS = ("ENOSPC", "EIO")
KINDS = (*KILLS, *ERRORS)
DISK = 5  # the exit code of EnvironmentFailure
REFUSED = 2  # that of BadInput: "exists already"
_TRIES = 3


@dataclass
class Swept:
    """What one point showed. ``missed``: strace did not hit the place that was meant."""

    point: Point
    kind: str
    problems: list[str] = field(default_factory=list)
    missed: bool = False


class Sweep:
    """One operation, prepared once. ``folder`` is scratch; ``bug`` is planted in every process of the operation."""

    def __init__(self, operation: Operation, folder: Path, bug: str = ""):
        self.operation, self.bug = operation, bug
        self.folder = folder.resolve()
        self.prepared, self.here = self.folder / "prepared", self.folder / "here"
        self.ws = self.here / "ws"
        self.prepared.mkdir(parents=True)
        operation.prepare(self.prepared)
        self.nursery = Nursery(self.folder)
        self.before = self._read(self.prepared / "ws")
        self.trace = self._undisturbed()
        self.after = checks.read(self.ws)
        self.packs = checks.packs(self.ws)
        self.points = points(self.trace, self.ws)
        self.sync_problems = sync_order.problems(self.trace, self.ws, self.folder / "out")

    def close(self) -> None:
        self.nursery.close()

    def kinds(self, point: Point) -> list[str]:
        return [kind for kind in KINDS if kind != "after" or point.after is not None]

    def run(self, point: Point, kind: str) -> Swept:
        """Disturb the operation once, restart, and finish it."""
        for _ in range(_TRIES):
            done = self._disturb(point, kind)
            trace = calls(done.trace)
            if self._hit(trace, point, kind):
                return Swept(point, kind, self._judge(done, trace, point, kind))
        return Swept(point, kind, missed=True)

    def _undisturbed(self) -> list[Call]:
        """The trace of a run to its end, data included. Two of them, since only what repeats can be aimed at."""
        traces = []
        for _ in range(2):
            self._copy()
            done = self.nursery.run(self.operation.name, self.here, strace=["-s", "9000"], bug=self.bug)
            if done.code != 0:
                raise RuntimeError(f"{self.operation.name}: exit {done.code}: {done.err}")
            traces.append(calls(done.trace))
        first, second = (points(trace, self.ws) for trace in traces)
        if [str(p) for p in first] != [str(p) for p in second]:
            raise RuntimeError(f"{self.operation.name}: two runs change the workspace in different ways")
        return traces[1]

    def _disturb(self, point: Point, kind: str) -> Done:
        self._copy()
        name, nth = point.after if kind == "after" and point.after else (point.name, point.nth)
        fault = f"error={kind}" if kind in ERRORS else "signal=KILL"
        traced = ",".join(f"?{call}" for call in sorted({*CHANGING, name}))
        options = ["-e", f"trace={traced}", "-e", f"inject={name}:{fault}:when={nth}", "-s", "0"]
        return self.nursery.run(self.operation.name, self.here, strace=options, bug=self.bug)

    def _hit(self, trace: list[Call], point: Point, kind: str) -> bool:
        """Whether the place that was meant is the one that was hit."""
        changed = [c for c in trace if c.changes(self.ws) and (c.executed or kind == "before")]
        if len(changed) <= point.index:
            return False
        meant = changed[point.index]
        if meant.name != point.name or tuple(meant.under(self.ws)) != point.paths:
            return False
        if kind in ERRORS:
            return meant.injected
        return len(changed) == point.index + 1 and meant.executed == (kind == "after")

    def _judge(self, done: Done, trace: list[Call], point: Point, kind: str) -> list[str]:
        found = ["it hung"] if done.hung else []
        if kind in ERRORS:
            found += _manners(done)
            if done.code != 0 and point.name not in ("unlink", "unlinkat"):
                left = set(checks.temporaries(self.ws)) - set(checks.temporaries(self.prepared / "ws"))
                found += [f"{name} is left behind" for name in sorted(left)]
        elif done.code != -9:
            found.append(f"exit {done.code} instead of a kill")
        found += self._restart(trace, acknowledged=done.code == 0 or bool(done.out))
        return found + self._finish()

    def _restart(self, trace: list[Call], acknowledged: bool) -> list[str]:
        if self.operation.old_schema and checks.refuses_old_schema(self.ws):
            unkept = ["it said that it was done, and is not"] if acknowledged else []
            return [*unkept, *checks.integrity(self.ws)]
        try:
            found = checks.restart(
                self.ws, self.before, self.after, atomic=self.operation.atomic, acknowledged=acknowledged
            )
            return found + sync_order.unsynced(trace, self.ws, checks.named_packs(self.ws))
        except MeristemError as error:
            return [f"the workspace cannot be read: {error}"]

    def _finish(self) -> list[str]:
        """The same command again, undisturbed."""
        if not self.operation.atomic:
            checks.expire_leases(self.ws)
        done = self.nursery.run(self.operation.name, self.here)
        try:
            found = checks.read(self.ws)
        except MeristemError as error:
            return [f"after the rerun the workspace cannot be read: {error}"]
        if found != self.after:
            return [f"the rerun (exit {done.code}) ends elsewhere: {checks.difference(found, self.after)}"]
        packs = checks.packs(self.ws)
        # Of a writer that died its pack may be left, until gc takes it.
        if (set(packs) != set(self.packs)) if self.operation.atomic else (packs != self.packs):
            return [f"the rerun leaves other packs: {packs} instead of {self.packs}"]
        return [] if done.code in (0, REFUSED) else [f"the rerun: exit {done.code}: {done.err.strip()}"]

    def _read(self, folder: Path) -> checks.State:
        if self.operation.old_schema and checks.refuses_old_schema(folder):
            return {"records": {}}
        return checks.read(folder)

    def _copy(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.prepared, self.here)


def _manners(done: Done) -> list[str]:
    """A failed disk call ends in exit 5 and one line, or in success."""
    said = done.err.strip().splitlines()
    if done.code not in (0, DISK):
        return [f"exit {done.code}: {done.err.strip()[-300:]}"]
    if "Traceback" in done.err or (done.code == DISK and len(said) != 1):
        return [f"exit {done.code} with more than one line: {done.err.strip()[-300:]}"]
    return []
