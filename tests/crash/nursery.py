"""Processes to kill, without paying for their imports each time.

A small process imports everything once and forks; each child is one whole ``meristem`` command in its own process,
down to the interpreter's own end. It waits at a gate until ``strace`` holds it, so that its first system call is counted.
Before the gate nothing touches the workspace. Run as ``python -m tests.crash.nursery`` this module is that process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 60.0  # seconds that an operation on a tiny workspace may take
ANY_TRACER = (0x59616D61, -1)  # prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY): strace is no parent of the child


@dataclass(frozen=True)
class Done:
    """How a process ended: exit code (or minus a signal), what it said, and the trace, if one was asked for."""

    code: int
    out: str
    err: str
    trace: str
    hung: bool = False


def usable() -> str | None:
    """Why ``strace`` cannot be used here; None when it can."""
    try:
        tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        return "strace is not installed"
    return None if tried.returncode == 0 else f"strace may not trace: {tried.stderr.strip()}"


class Nursery:
    """``folder`` holds what the processes write; it must lie outside the workspaces."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MERISTEM_")},
            "PYTHONHASHSEED": "0",  # sets in the same order each time: the calls come in the same order
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MERISTEM_ACTOR": "kim",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._ask({})  # answers when everything is imported

    def run(self, operation: str, folder: Path, *, strace: list[str] | None = None, bug: str = "") -> Done:
        """Run an operation on ``folder``'s workspace; ``strace`` are options, None leaves it alone."""
        out, err, trace = (self.folder / name for name in ("out", "err", "trace"))
        request = {
            "operation": operation,
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
            "bug": bug,
        }
        child = int(self._ask(request))
        tracer = self._attach(child, [*strace, "-o", str(trace)]) if strace is not None else None
        hung = False
        print("go", file=self._server.stdin, flush=True)
        if not select.select([self._server.stdout], [], [], LONGEST)[0]:
            hung = True
            os.kill(child, signal.SIGKILL)
        code = int(self._answer())
        if tracer is not None:
            tracer.communicate(timeout=LONGEST)
        text = trace.read_text(encoding="utf-8", errors="replace") if tracer is not None else ""
        return Done(code, out.read_text(), err.read_text(), text, hung)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=LONGEST)
        self._server.stdout.close()

    def _attach(self, child: int, options: list[str]) -> subprocess.Popen[str]:
        command = ["strace", "-f", "-y", *options, "-p", str(child)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = tracer.stderr.readline()
        if "attached" not in said:
            tracer.kill()
            raise RuntimeError(f"strace: {said}{tracer.stderr.read()}")
        return tracer

    def _ask(self, request: dict[str, Any]) -> str:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery died (exit {self._server.wait()})")
        return line.strip()


def _serve() -> None:
    from tests.crash import bugs, operations

    operations.preload()
    gc.collect()
    gc.freeze()
    prctl = ctypes.CDLL(None).prctl
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if not request:
            print("ready", flush=True)
            continue
        gate, opener = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(opener)
            _redirect(request["out"], request["err"])
            prctl(*ANY_TRACER)
            os.read(gate, 1)
            os.close(gate)
            bugs.plant(request["bug"])
            operations.perform(request["operation"], Path(request["folder"]))
            sys.exit()
        os.close(gate)
        print(child, flush=True)
        sys.stdin.readline()
        os.write(opener, b"x")
        os.close(opener)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _redirect(out: str, err: str) -> None:
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)


if __name__ == "__main__":
    _serve()
