"""The store beside DVC and MLflow, in one run, on the embedded LLM's checkpoint.

    python -m venv peers && peers/bin/pip install dvc mlflow
    python benchmarks/store_peers.py --peers-bin peers/bin --out benchmarks/results/store-peers.json

The peers live in an environment of their own, found by ``--peers-bin`` or the variable ``PEERS_BIN``. Each has its
defaults, DVC with analytics and update checks off. Every round makes a successor of the checkpoint in which two
tensors changed and gives it to all in turn; the median of the rounds counts. Before each timing everything written so
far is synced, the input is read (a warm page cache), and memory is touched and freed: a virtual machine's host
may have taken free pages back, and whoever needs them first would pay for it (``--cold-memory`` leaves that out).
All processes share one bytecode cache, filled before anything is timed.

Peak memory is that of the operating system (``ru_maxrss``); a mapped file counts with it. An alias move under
writers is timed from reading the alias to being acknowledged, repetitions after a lost race included; MLflow's set
needs no reading. The floors are what the same machine needs for the bare bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import mmap
import os
import platform
import shutil
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL, ALIAS, WEIGHTS = "support", "canary", "model.safetensors"
CHANGED = ("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight")
FLIP = bytes(value ^ 1 for value in range(256))
MB = 1_000_000
WRITERS = 4
TOUCHED = 600 * MB

# what is compared -> (ours, the peer's, our share of the peer's at most)
BOUNDS = {
    "commit, whole process": ("meristem model commit", "dvc add", 0.5),
    "commit, in process": ("Workspace.commit", "MLflow log and register", 3.0),
    "checkout of version 1, whole process": ("meristem model checkout", "dvc checkout", 1.0),
    "alias move": ("Workspace.move_alias", "MLflow set alias", 1.0),
    f"alias move, {WRITERS} writers": (
        f"Workspace.move_alias, {WRITERS} writers",
        f"MLflow set alias, {WRITERS} writers",
        1.0,
    ),
}
STORE_BOUND = 1.05  # bytes of one checkpoint and its successors, over those of the checkpoint


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        serve(WORKERS[sys.argv[2]](Path(sys.argv[3])))
        return
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bench = Bench(args, Path(scratch))
        bench.prepare()
        for number in range(1, args.rounds + 1):
            bench.commit_round(number)
        bench.measure_stores()
        bench.check_torch_stays_out()
        for number in range(args.rounds):
            bench.checkout_round(number)
        bench.alias_rounds()
        bench.floors()
        found = bench.result()
        bench.close()
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers-bin", type=Path, default=os.environ.get("PEERS_BIN"), metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, help="a folder with SmolLM2-135M; made if not given")
    parser.add_argument("--scratch", type=Path, help="where the stores are made; some 10 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--moves", type=int, default=50, help="alias moves per round and writer")
    parser.add_argument("--cold-memory", action="store_true")
    args = parser.parse_args()
    if args.peers_bin is None:
        parser.error("--peers-bin DIR: give the bin folder of an environment with dvc and mlflow")
    return args


class Bench:
    """Folders, workers and samples of one run."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch = args, scratch
        self.peers = args.peers_bin.absolute()
        self.meristem = Path(sys.executable).with_name("meristem")
        self.source, self.dvc = scratch / "source", scratch / "dvc"
        self.workspaces = [scratch / "workspace", scratch / "workspace-in-process"]
        self.samples: dict[str, list[float]] = {}
        self.peaks: dict[str, list[int]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.written: dict[str, list[int]] = {}
        self.facts: dict[str, Any] = {}
        self.workers: list[Worker] = []
        self.environment = {key: value for key, value in os.environ.items() if not _disturbs(key)}
        self.environment |= {"PYTHONPYCACHEPREFIX": str(scratch / "bytecode"), "MERISTEM_ACTOR": "bench"}

    # Before and after

    def prepare(self) -> None:
        self.runner = self.worker(sys.executable, "runner", self.scratch)
        if self.args.checkpoint:
            shutil.copytree(self.args.checkpoint, self.source)
        else:
            self.source.mkdir()
            code = (
                "import shutil, sys; from meristem.ecosystem.sources import open_source\n"
                "with open_source('embedded') as folder: shutil.copytree(folder, sys.argv[1], dirs_exist_ok=True)"
            )
            self.run("", [sys.executable, "-c", code, str(self.source)])
        self.facts["checkpoint bytes"] = size(self.source)
        for workspace in self.workspaces:
            self.run("", [self.meristem, "init", workspace])
            self.run(
                "", self.command(workspace, "add", MODEL, "--tier", "foundation", "--source", self.source)
            )
        self.dvc.mkdir()
        for command in (["init", "--no-scm"], ["config", "core.analytics", "false"]):
            self.run("", [self.peers / "dvc", *command], self.dvc)
        self.run("", [self.peers / "dvc", "config", "core.check_update", "false"], self.dvc)
        shutil.copytree(self.source, self.dvc / "model")
        self.run("", [self.peers / "dvc", "add", "model"], self.dvc)
        shutil.copy(self.dvc / "model.dvc", self.scratch / "version-1.dvc")
        self.inside = self.worker(sys.executable, "meristem", self.workspaces[1])
        self.mlflow = self.worker(self.peers / "python", "mlflow", self.scratch / "mlflow")
        self.mlflow.ask("commit", str(self.source))
        # Fill the bytecode caches with what is timed below.
        self.run("", self.command(self.workspaces[0], "list"))
        self.run(
            "", self.command(self.workspaces[0], "checkout", f"{MODEL}@v1", "--to", self.scratch / "warm")
        )
        shutil.rmtree(self.scratch / "warm")
        self.run("", [self.peers / "dvc", "checkout", "model.dvc"], self.dvc)

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    # The rounds

    def commit_round(self, number: int) -> None:
        replace(self.source / WEIGHTS, changed := successor(self.source / WEIGHTS, number))
        self.facts["changed bytes per successor"] = changed[1]
        replace(self.dvc / "model" / WEIGHTS, changed)
        before = size(self.dvc / ".dvc" / "cache")
        self.settle(self.dvc / "model")
        self.run("dvc add", [self.peers / "dvc", "add", "model"], self.dvc)
        self.note("dvc add", size(self.dvc / ".dvc" / "cache") - before)
        before = size(self.workspaces[0])
        self.settle(self.source)
        self.run("meristem model commit", self.commit_command())
        self.note("meristem model commit", size(self.workspaces[0]) - before)
        before = size(self.scratch / "mlflow")
        self.settle(self.source)
        self.sample("MLflow log and register", self.mlflow.ask("commit", str(self.source))["seconds"])
        self.note("MLflow log and register", size(self.scratch / "mlflow") - before)
        before = size(self.workspaces[1])
        self.settle(self.source)
        self.sample("Workspace.commit", self.inside.ask("commit", str(self.source))["seconds"])
        self.note("Workspace.commit", size(self.workspaces[1]) - before)

    def measure_stores(self) -> None:
        """Bytes of version 1 and its successors."""
        self.facts["store bytes"] = {
            "meristem": size(self.workspaces[0]),
            "dvc cache": size(self.dvc / ".dvc" / "cache"),
            "mlflow artifacts": size(self.scratch / "mlflow" / "artifacts"),
        }

    def check_torch_stays_out(self) -> None:
        """One more commit, untimed, whose imports are listed."""
        replace(self.source / WEIGHTS, successor(self.source / WEIGHTS, self.args.rounds + 1))
        listed = self.run("", self.commit_command(), more={"PYTHONPROFILEIMPORTTIME": "1"})
        imported = {line.rpartition("|")[2].strip() for line in listed.splitlines()}
        assert "meristem.workspace" in imported
        assert "torch" not in imported, "the commit imported torch"

    def commit_command(self) -> list[Any]:
        return self.command(self.workspaces[0], "commit", MODEL, "--source", self.source)

    def checkout_round(self, number: int) -> None:
        """Each writes version 1 where nothing is, right after its own last checkout was removed."""
        shutil.rmtree(self.dvc / "model")
        shutil.copy(self.scratch / "version-1.dvc", self.dvc / "model.dvc")
        self.settle(self.dvc / ".dvc" / "cache", self.workspaces[0])
        self.run("dvc checkout", [self.peers / "dvc", "checkout", "model.dvc"], self.dvc)
        folder = self.scratch / "checkout"
        shutil.rmtree(folder, ignore_errors=True)
        self.settle(self.dvc / ".dvc" / "cache", self.workspaces[0])
        arguments = ["checkout", f"{MODEL}@v1", "--to", folder]
        self.run("meristem model checkout", self.command(self.workspaces[0], *arguments))
        for file in (WEIGHTS, "tokenizer.json"):
            theirs = self.dvc / "model" / file
            assert tensors_of(theirs) == tensors_of(folder / file), f"{file}: the two checkouts differ"
        self.facts["dvc link type"] = self.link_type()

    def link_type(self) -> str:
        """How DVC put the file there. A reflink looks like a copy here; `dvc doctor` says whether it can be one."""
        path = self.dvc / "model" / WEIGHTS
        if path.is_symlink():
            return "symlink"
        if path.stat().st_nlink > 1:
            return "hardlink"
        doctor = subprocess.run([self.peers / "dvc", "doctor"], cwd=self.dvc, capture_output=True, text=True)
        line = next((x for x in doctor.stdout.splitlines() if x.startswith("Cache types")), "")
        return "reflink" if "reflink" in line else "copy"

    def alias_rounds(self) -> None:
        mlflow, writers = self.scratch / "mlflow", range(1, WRITERS)
        ours = [self.inside, *(self.worker(sys.executable, "meristem", self.workspaces[1]) for _ in writers)]
        theirs = [self.mlflow, *(self.worker(self.peers / "python", "mlflow", mlflow) for _ in writers)]
        sides = {"MLflow set alias": theirs, "Workspace.move_alias": ours}
        counts: dict[str, dict[str, int]] = {name: {} for name in sides}
        for worker in (*ours, *theirs):
            worker.ask("move", 1, 0)
        for _ in range(self.args.rounds):
            for name, workers in sides.items():
                self.settle()
                alone = workers[0].ask("move", self.args.moves, 0)
                self.samples.setdefault(name, []).extend(alone["seconds"])
                self.settle()
                self.move_together(name, workers, counts[name])
        self.facts[f"alias moves, {WRITERS} writers"] = counts
        assert counts["Workspace.move_alias"]["lost updates"] == 0, "an acknowledged move left no revision"

    def move_together(self, name: str, workers: list[Worker], counts: dict[str, int]) -> None:
        before = workers[0].ask("revision")
        for turn, worker in enumerate(workers):
            worker.send("move", self.args.moves, turn)
        answers = [worker.answer() for worker in workers]
        for answer in answers:
            self.samples.setdefault(f"{name}, {WRITERS} writers", []).extend(answer.pop("seconds"))
        if before is not None:
            moves = sum(answer["acknowledged"] for answer in answers)
            answers.append({"lost updates": moves - (workers[0].ask("revision") - before)})
        for answer in answers:
            for key, value in answer.items():
                counts[key] = counts.get(key, 0) + value

    def floors(self) -> None:
        """What the bare bytes cost: hashing, writing, starting."""
        changed = os.urandom(self.facts["changed bytes per successor"])
        body = memoryview((self.source / WEIGHTS).read_bytes())
        parts = pieces(body)
        few, whole, log = (self.scratch / name for name in ("few", "whole", "log"))
        for _ in range(self.args.rounds):
            self.settle(self.source)
            self.time("SHA-256 of the checkpoint", lambda: hash_all(parts, threads=1))
            self.time("SHA-256 of the checkpoint, 2 threads", lambda: hash_all(parts, threads=2))
            self.settle(self.source)
            self.time("write and sync the changed bytes", lambda: write(few, changed, sync=True))
            self.settle(self.source)
            self.time("write the checkpoint", lambda: write(whole, body, sync=False))
            whole.unlink()
            self.time("append 4 kB and sync", lambda: write(log, changed[:4096], sync=True))
            self.run("python -c pass", [sys.executable, "-c", "pass"])
            self.run("import meristem.workspace", [sys.executable, "-c", "import meristem.workspace"])

    # One measurement

    def command(self, workspace: Path, *arguments: Any) -> list[Any]:
        return [self.meristem, "--workspace", workspace, "model", *arguments]

    def run(
        self,
        name: str,
        command: list[Any],
        folder: Path | None = None,
        more: dict[str, str] | None = None,
    ) -> str:
        """Run a process to its end; its seconds and peak memory count under ``name``, if it has one."""
        words = [str(word) for word in command]
        answer = self.runner.ask("run", words, str(folder or self.scratch), self.environment | (more or {}))
        said: str = answer["errors"]
        if answer["code"]:
            raise SystemExit(f"{' '.join(words)} failed:\n{said}")
        if name:
            self.sample(name, answer["seconds"])
            self.peaks.setdefault(name, []).append(answer["peak"])
            self.cpu.setdefault(name, []).append(answer["cpu"])
        return said

    def time(self, name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        work()
        self.sample(name, time.perf_counter() - started)

    def sample(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def note(self, name: str, written: int) -> None:
        self.written.setdefault(name, []).append(written)

    def worker(self, python: Any, kind: str, folder: Path) -> Worker:
        made = Worker([str(python), __file__, "worker", kind, str(folder)], self.environment)
        self.workers.append(made)
        return made

    def settle(self, *folders: Path) -> None:
        """Nothing left to write; with ``folders``: these in the page cache, and free memory that is there."""
        os.sync()
        for folder in folders:
            for path in files(folder):
                path.read_bytes()
        if folders and not self.args.cold_memory:
            touched = mmap.mmap(-1, TOUCHED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
            touched.close()

    # The result

    def result(self) -> dict[str, Any]:
        rows = {}
        for name, seconds in self.samples.items():
            rows[name] = {"median seconds": rounded(statistics.median(seconds))}
            if len(seconds) > self.args.rounds:
                rows[name]["p95 seconds"] = rounded(statistics.quantiles(seconds, n=20)[-1])
            if name in self.peaks:
                rows[name]["CPU seconds"] = rounded(statistics.median(self.cpu[name]))
                rows[name]["peak MB"] = round(statistics.median(self.peaks[name]) / MB, 1)
            if name in self.written:
                rows[name]["store grew by MB"] = round(statistics.median(self.written[name]) / MB, 2)
        return {
            "setting": {
                **self.facts,
                "rounds": self.args.rounds,
                "memory": "as found" if self.args.cold_memory else "touched before each timing",
            },
            "versions": self.versions(),
            "rows": rows,
            "bounds": self.bounds(rows),
            "floors": floors_of(rows),
            "samples": {name: [rounded(x) for x in seconds] for name, seconds in self.samples.items()},
        }

    def bounds(self, rows: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for what, (ours, peer, most) in BOUNDS.items():
            ratio = rows[ours]["median seconds"] / rows[peer]["median seconds"]
            found[what] = {"ours": ours, "peer": peer, "ratio": round(ratio, 3), "at most": most}
        held = self.facts["store bytes"]["meristem"] / self.facts["checkpoint bytes"]
        what = f"store after {self.args.rounds} successors"
        found[what] = {
            "ours": "bytes stored",
            "peer": "bytes of one checkpoint",
            "ratio": round(held, 4),
            "at most": STORE_BOUND,
        }
        for entry in found.values():
            entry["met"] = entry["ratio"] <= entry["at most"]
        return found

    def versions(self) -> dict[str, str]:
        code = "import json; from importlib.metadata import version; print(json.dumps([version('dvc'), version('mlflow')]))"
        out = subprocess.run([self.peers / "python", "-c", code], capture_output=True, check=True).stdout
        dvc, mlflow = json.loads(out)
        return {
            "meristem": importlib.metadata.version("meristem"),
            "sqlalchemy": importlib.metadata.version("sqlalchemy"),
            "dvc": dvc,
            "mlflow": mlflow,
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "openssl": ssl.OPENSSL_VERSION,
            "cores": str(os.cpu_count()),
        }


# Workers: processes that stay, and time what they are asked to do


class Worker:
    """A process of this file in ``serve``: one JSON line asked, one answered."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answer()  # ready

    def ask(self, *question: Any) -> Any:
        self.send(*question)
        return self.answer()

    def send(self, *question: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.process.args} ended; run it by hand to see why")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(worker: Any) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not answer
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, verb)(*arguments)), file=answers, flush=True)
    worker.close()


class RunnerWorker:
    """Starts processes. It is small: the system counts the memory of who started a process as that one's peak."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, command: list[str], folder: str, environment: dict[str, str]) -> dict[str, Any]:
        with tempfile.TemporaryFile(dir=self.folder) as errors:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
            started = time.perf_counter()
            process = subprocess.Popen(command, cwd=folder, env=environment, **quiet)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        return {
            "seconds": seconds,
            "cpu": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss * 1024,
            "code": process.returncode,
            "errors": said,
        }

    def close(self) -> None:
        pass


class MeristemWorker:
    def __init__(self, folder: Path):
        from meristem.errors import StateMoved
        from meristem.workspace import Workspace

        self.ws, self.refused = Workspace.open(folder), StateMoved

    def commit(self, source: str) -> dict[str, Any]:
        started = time.perf_counter()
        self.ws.commit(MODEL, source)
        return {"seconds": time.perf_counter() - started}

    def move(self, moves: int, turn: int) -> dict[str, Any]:
        versions, taken, refused = self.ws.versions(MODEL), [], 0
        for number in range(moves):
            version = versions[(number + turn) % len(versions)]
            started = time.perf_counter()
            while True:
                try:
                    self.ws.move_alias(MODEL, ALIAS, version, expected=self.revision())
                    break
                except self.refused:
                    refused += 1
            taken.append(time.perf_counter() - started)
        return {"seconds": taken, "acknowledged": moves, "refused and repeated": refused}

    def revision(self) -> int:
        return next((alias.revision for alias in self.ws.aliases(MODEL) if alias.name == ALIAS), 0)

    def close(self) -> None:
        self.ws.close()


class MlflowWorker:
    def __init__(self, folder: Path):
        import mlflow

        new = not folder.exists()
        folder.mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        if new:
            mlflow.create_experiment("bench", artifact_location=(folder / "artifacts").as_uri())
            self.client.create_registered_model(MODEL)
        mlflow.set_experiment("bench")

    def commit(self, source: str) -> dict[str, Any]:
        started = time.perf_counter()
        with self.mlflow.start_run() as run:
            self.mlflow.log_artifacts(source, "model")
        place = f"{run.info.artifact_uri}/model"
        self.client.create_model_version(MODEL, source=place, run_id=run.info.run_id)
        return {"seconds": time.perf_counter() - started}

    def move(self, moves: int, turn: int) -> dict[str, Any]:
        versions = [v.version for v in self.client.search_model_versions(f"name = '{MODEL}'")]
        taken, overwritten = [], 0
        for number in range(moves):
            version = versions[(number + turn) % len(versions)]
            started = time.perf_counter()
            self.client.set_registered_model_alias(MODEL, ALIAS, version)
            taken.append(time.perf_counter() - started)
            found = self.client.get_model_version_by_alias(MODEL, ALIAS)
            overwritten += str(found.version) != str(version)
        return {
            "seconds": taken,
            "acknowledged": moves,
            "overwritten before their own read-back": overwritten,
        }

    def revision(self) -> None:
        """MLflow counts no moves."""

    def close(self) -> None:
        pass


WORKERS = {"runner": RunnerWorker, "meristem": MeristemWorker, "mlflow": MlflowWorker}


# Bytes


def successor(weights: Path, number: int) -> tuple[bytearray, int]:
    """The file with the lowest bit of two tensors of layer ``number`` flipped, and how many bytes those are."""
    body, changed = bytearray(weights.read_bytes()), 0
    for name, start, end in entries(body):
        if name in {pattern.format(number) for pattern in CHANGED}:
            body[start:end:2] = body[start:end:2].translate(FLIP)  # the lower byte of each bf16
            changed += end - start
    assert changed, "the checkpoint has none of the tensors to change"
    return body, changed


def entries(body: bytes | bytearray | memoryview) -> list[tuple[str, int, int]]:
    size = struct.unpack("<Q", body[:8])[0]
    header = json.loads(bytes(body[8 : 8 + size]))
    header.pop("__metadata__", None)
    return [(n, 8 + size + e["data_offsets"][0], 8 + size + e["data_offsets"][1]) for n, e in header.items()]


def pieces(body: memoryview) -> list[memoryview]:
    """The tensors, largest first."""
    return sorted((body[start:end] for _, start, end in entries(body)), key=len, reverse=True)


def tensors_of(path: Path) -> Any:
    body = path.read_bytes()
    if path.suffix != ".safetensors":
        return hashlib.sha256(body).hexdigest()
    return {name: hashlib.sha256(body[start:end]).hexdigest() for name, start, end in entries(body)}


def replace(path: Path, changed: tuple[bytearray, int]) -> None:
    """A new file: whatever a store linked the old one to stays as it is."""
    path.unlink()
    path.write_bytes(changed[0])


def hash_all(parts: list[memoryview], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))


def write(path: Path, data: bytes | memoryview, sync: bool) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)
        if sync:
            os.fsync(file.fileno())


def files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


# Numbers


def _disturbs(variable: str) -> bool:
    return variable.startswith(("PYTHONDONTWRITE", "PYTHONPYCACHE", "MERISTEM_", "MLFLOW_", "DVC_"))


def floors_of(rows: dict[str, Any]) -> dict[str, Any]:
    """Each of our numbers beside the sum of what it cannot do without."""
    parts = {
        "meristem model commit": ["python -c pass", "SHA-256 of the checkpoint", "write and sync the changed bytes"],
        "Workspace.commit": ["SHA-256 of the checkpoint", "write and sync the changed bytes"],
        "meristem model checkout": ["python -c pass", "SHA-256 of the checkpoint", "write the checkpoint"],
        "Workspace.move_alias": ["append 4 kB and sync"],
    }  # fmt: skip
    found = {}
    for name, bare in parts.items():
        floor = sum(rows[part]["median seconds"] for part in bare)
        gap = rows[name]["median seconds"] - floor
        found[name] = {
            "floor": " + ".join(bare),
            "floor seconds": rounded(floor),
            "gap seconds": rounded(gap),
        }
    return found


def rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def show(found: dict[str, Any]) -> None:
    for name, row in found["rows"].items():
        print(f"{name:42}", "  ".join(f"{key} {value}" for key, value in row.items()))
    for key, value in found["setting"].items():
        print(f"{key}: {value}")
    for what, entry in found["bounds"].items():
        verdict = "met" if entry["met"] else "MISSED"
        print(f"{what:42} {entry['ratio']:7.3f} of at most {entry['at most']}  {verdict}")
    for name, floor in found["floors"].items():
        print(f"{name:42} floor {floor['floor seconds']}, gap {floor['gap seconds']} ({floor['floor']})")


if __name__ == "__main__":
    main()
