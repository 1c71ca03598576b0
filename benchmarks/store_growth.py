"""How the store's commands take to growth: 100, 1,000 and 10,000 versions with 100 events each.

    python benchmarks/store_growth.py --out benchmarks/results/store-growth.json
    python benchmarks/store_growth.py --out /dev/null --quick

The workspaces are loaded in bulk: rows, events and packs as the library would have written them, in one unsynced
transaction each (`log verify` passes on them). Ten models; nine have one version, ``support`` has the rest, each
with a signal, a decision, a release and a move of the champion. All other events are moves of one alias.

Commands are timed as whole processes and, to take the start-up out, repeated inside one; medians. ``log verify``
runs once per size above 100,000 events. What counts is the ratio to the smallest workspace.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL, ALIAS, OTHERS = "support", "canary", 9
BATCH = 10_000
COMMANDS = {
    "model list": ["model", "list"],
    "release history": ["release", "history", MODEL],
    "log show": ["log", "show"],
}
VERIFY, MOVE = "log verify", "alias move"
MOST = 2.0  # times the smallest workspace's seconds


def main() -> None:
    if sys.argv[1:2] == ["load"]:
        load(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["inside"]:
        print(json.dumps(inside(Path(sys.argv[2]), int(sys.argv[3]))))
    elif sys.argv[1:2] == ["move"]:
        move(Path(sys.argv[2]), 1)
    else:
        run(arguments())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--versions", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--events-per-version", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the workspaces are made; some 5 GB")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    args = parser.parse_args()
    if args.quick:
        args.versions, args.events_per_version, args.rounds = [50, 200], 20, 2
    return args


def run(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONDONT", "MERISTEM_"))}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(scratch) / "bytecode")
        for versions in args.versions:
            folder = Path(scratch) / str(versions)
            events = versions * args.events_per_version
            loaded, _ = process([sys.executable, __file__, "load", folder, versions, events], environment)
            row = {"versions": versions, "events": events, "loading seconds": round(loaded, 1)}
            row |= measure(folder, args.rounds, environment, events)
            rows.append(row)
            print(json.dumps(row, indent=2), flush=True)
    found = {"rounds": args.rounds, "rows": rows, "ratios to the smallest": ratios(rows)}
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


def measure(folder: Path, rounds: int, environment: dict[str, str], events: int) -> dict[str, Any]:
    meristem = [Path(sys.executable).with_name("meristem"), "--workspace", folder]
    commands = {name: [*meristem, *words] for name, words in COMMANDS.items()}
    commands[MOVE] = [sys.executable, __file__, "move", folder]
    commands[VERIFY] = [*meristem, "log", "verify"]
    found: dict[str, Any] = {}
    for name, command in commands.items():
        times = 1 if name == VERIFY and events > 100_000 else rounds
        process(command, environment) if times > 1 else None  # fills the caches
        runs = [process(command, environment) for _ in range(times)]
        found[name] = {
            "seconds": rounded(statistics.median(seconds for seconds, _ in runs)),
            "peak MB": round(statistics.median(peak for _, peak in runs) / 1e6, 1),
        }
    out = subprocess.run(
        [sys.executable, __file__, "inside", folder, str(rounds)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if out.returncode:
        raise SystemExit(out.stderr)
    for name, seconds in json.loads(out.stdout).items():
        found[name]["seconds in process"] = rounded(seconds)
    found[VERIFY]["microseconds per event"] = round(found[VERIFY]["seconds"] / events * 1e6, 1)
    return found


def process(command: list[Any], environment: dict[str, str]) -> tuple[float, int]:
    """Wall seconds and peak bytes of one process."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{command} failed:\n{errors.read().decode()}")
    return seconds, usage.ru_maxrss * 1024


def inside(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of each command, repeated in this process."""
    from meristem.cli.main import build

    app, found = build(), {}
    for name, words in COMMANDS.items():
        times = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                app(["--workspace", str(folder), *words], standalone_mode=False)
            times.append(time.perf_counter() - started)
        found[name] = statistics.median(times[1:])
    found[MOVE] = statistics.median(move(folder, 20 * rounds))
    return found


def move(folder: Path, moves: int) -> list[float]:
    """Move the alias to and fro; seconds of each move."""
    from meristem.workspace import Workspace

    ws, times = Workspace.open(folder, actor="bench"), []
    for number in range(moves):
        started = time.perf_counter()
        revision = next(alias.revision for alias in ws.aliases(MODEL) if alias.name == ALIAS)
        ws.move_alias(MODEL, ALIAS, f"{MODEL}@v{1 + number % 2}", expected=revision)
        times.append(time.perf_counter() - started)
    ws.close()
    return times


# Loading


def load(folder: Path, versions: int, events: int) -> None:
    from meristem.workspace import Workspace

    ws = Workspace.create(folder, actor="bench")
    with ws.store.database.write() as connection:
        loader = Loader(ws, connection)
        for number in range(OTHERS):
            loader.model(f"other-{number}")
        line = loader.model(MODEL)
        per_version = events // versions
        previous = champion = line
        for number in range(2, versions - OTHERS + 1):
            made = loader.version(MODEL, number, previous)
            loader.released(number, made, champion)
            previous = champion = made
            while loader.sequence < number * per_version:
                loader.move(MODEL, ALIAS, made if loader.sequence % 2 else line)
        while loader.sequence < events:
            loader.move(MODEL, ALIAS, line)
        loader.flush(everything=True)
    ws.close()


class Loader:
    """Writes what the library's verbs would have written, many rows at a time."""

    def __init__(self, ws: Any, connection: Any):
        from meristem.store import evidence, schema

        self.ws, self.connection, self.tables = ws, connection, schema.metadata.tables
        self.sequence, self.previous = evidence.head(connection)
        self.waiting: dict[str, list[dict[str, Any]]] = {}
        self.aliases: dict[tuple[str, str], tuple[str, int]] = {}
        self.numbers: dict[str, int] = {}

    def model(self, name: str) -> str:
        from meristem.ecosystem.records import Model

        record = Model(name=name, tier="foundation", base=None, source=f"folder {name}", fingerprint=None)
        digest = self.document(record.document())
        self.row("models", name=name, tier="foundation", base=None, document=digest)
        self.event("model.added", digest, name=name, tier="foundation", base=None)
        first = self.version(name, 1, None)
        self.move(name, "champion", first)
        return first

    def version(self, model: str, number: int, parent: str | None) -> str:
        """A content with one tensor of its own, in a pack of its own, as a commit leaves it."""
        from meristem.ecosystem.records import Content, Version
        from meristem.store.packs import Blob

        blob = Blob.tensor("U8", (32,), f"{model} {number}".ljust(32).encode())
        for place in self.ws.store.packs.write([blob]):
            shape = json.dumps(place.shape)
            facts = {"pack": place.pack, "offset": place.offset, "length": place.length, "dtype": place.dtype}
            self.row("blobs", digest=place.digest, shape=shape, **facts)
        content = Content(kind="full", base=None, tensors={"weight": blob.digest}, files={})
        inside = self.document(content.document())
        record = Version(model=model, content=inside, base=None, parents=[parent] if parent else [])
        digest = self.document(record.document())
        self.row("versions", digest=digest, model=model, number=number, content=inside)
        self.event("version.created", digest, model=model, number=number, content=inside)
        return digest

    def released(self, number: int, version: str, champion: str) -> None:
        """A signal, the decision that answered it, its release and the champion's move."""
        from meristem.ecosystem.records import Decision, Release, Signal

        self.record("signal", Signal(kind="demand", model=MODEL, note=f"number {number}"), "answered")
        revision = self.aliases[MODEL, "champion"][1]
        decision = Decision(
            model=MODEL,
            version=version,
            champion=champion,
            champion_revision=revision,
            plan=None,
            policy=self.document({"schema": "meristem/policy/v1"}, once=True),
            evaluations=[],
            gates=[],
            outcome="pass",
            approvals_needed=0,
        )
        decided = self.record("decision", decision, "pass")
        self.move(MODEL, "champion", version)
        release = Release(
            model=MODEL,
            kind="promote",
            version=version,
            previous=champion,
            revision=revision + 1,
            decision=decided,
        )
        self.record("release", release, "done")

    def record(self, kind: str, record: Any, status: str) -> str:
        number = self.numbers[kind] = self.numbers.get(kind, 0) + 1
        digest = self.document(record.document())
        self.row(
            "records", kind=kind, number=number, model=MODEL, document=digest, status=status, result=None
        )
        self.event(f"{kind}.opened", digest, number=number, model=MODEL, status=status)
        return digest

    def move(self, model: str, alias: str, to: str) -> None:
        previous, revision = self.aliases.get((model, alias), (None, 0))
        self.aliases[model, alias] = (to, revision + 1)
        self.event("alias.moved", to, model=model, alias=alias, revision=revision + 1, previous=previous)
        self.row(
            "alias_moves",
            model=model,
            alias=alias,
            revision=revision + 1,
            version=to,
            previous=previous,
            event=self.sequence,
        )

    def event(self, kind: str, subject: str, **data: Any) -> None:
        from meristem.store.canonical import canonical, digest_bytes

        self.sequence += 1
        body = canonical(
            {
                "schema": "meristem/event/v1",
                "sequence": self.sequence,
                "previous": self.previous,
                "kind": kind,
                "actor": "bench",
                "time": "2026-01-01T00:00:00.000000Z",
                "tool": "meristem bench",
                "subject": subject,
                "reason": "loaded in bulk",
                "data": data,
            }
        )
        self.previous = digest_bytes(body)
        self.row("events", sequence=self.sequence, hash=self.previous, kind=kind, subject=subject, body=body)

    def document(self, document: dict[str, Any], once: bool = False) -> str:
        """``once``: this one comes again and again."""
        from meristem.store.canonical import canonical, digest_bytes

        body = canonical(document)
        digest = digest_bytes(body)
        if not once or self.numbers.setdefault(digest, 0) == 0:
            self.row("documents", digest=digest, schema=document["schema"], body=body)
            self.numbers[digest] = 1
        return digest

    def row(self, table: str, **values: Any) -> None:
        self.waiting.setdefault(table, []).append(values)
        if len(self.waiting[table]) >= BATCH:
            self.flush()

    def flush(self, everything: bool = False) -> None:
        if everything:
            for (model, alias), (version, revision) in self.aliases.items():
                where = {"model": model, "alias": alias, "version": version, "revision": revision}
                self.waiting.setdefault("aliases", []).append(where)
        for table, rows in self.waiting.items():
            if rows:
                self.connection.execute(self.tables[table].insert(), rows)
        self.waiting = {}


# Numbers


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each command's seconds in the largest workspace over those in the smallest."""
    first, last = rows[0], rows[-1]
    found: dict[str, Any] = {}
    for name in (*COMMANDS, MOVE):
        keys = ("seconds", "seconds in process")
        found[name] = {key: round(last[name][key] / first[name][key], 2) for key in keys}
        found[name]["at most"] = MOST
        found[name]["met"] = all(found[name][key] <= MOST for key in keys)
    key = "microseconds per event"
    found[VERIFY] = {f"{key}, by events": {str(row["events"]): row[VERIFY][key] for row in rows}}
    found[VERIFY]["peak MB, by events"] = {str(row["events"]): row[VERIFY]["peak MB"] for row in rows}
    return found


def rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "versions    events  " + "  ".join(f"{name:>26}" for name in (*COMMANDS, MOVE, VERIFY))
    for row in rows:
        cells = []
        for name in (*COMMANDS, MOVE, VERIFY):
            cell = row[name]
            within = f"{cell['seconds in process']:.3g}" if "seconds in process" in cell else "-"
            cells.append(f"{cell['seconds']:.3g} s, {within}, {cell['peak MB']} MB".rjust(26))
        yield f"{row['versions']:8}  {row['events']:8}  " + "  ".join(cells)


def show(found: dict[str, Any]) -> None:
    print("seconds as a process, in process, peak memory")
    for line in table(found["rows"]):
        print(line)
    for name, ratio in found["ratios to the smallest"].items():
        print(name, ratio)


if __name__ == "__main__":
    main()
