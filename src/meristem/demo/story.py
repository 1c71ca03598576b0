"""The demo: a forgetful update is caught and does not ship; a better one ships and is taken back bit for bit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meristem.demo import tampering
from meristem.errors import BadInput, MeristemError
from meristem.loop import Turn
from meristem.workspace import DecisionResult, Workspace

DATA = Path(str(files("meristem.demo").joinpath("data")))
MODEL, FOUNDATION, SOURCE = tampering.MODEL, "smollm2", "embedded"
TASKS = ("ticket-routing", "order-extraction", "policy-compliance")
MARKER = ".meristem-demo"

# Sizes, margins and why they hold by power: benchmarks/README.md, "The demo's margins".
SETTINGS = """\
schema: meristem/workspace/v1
evaluation: {{dtype: bfloat16, device: cpu, batch_tokens: 4096}}
defaults:
  gates:
    - {{gate: improvement, suites: new, min_gain: 0.0, confidence: 0.95}}
    - {{gate: non_inferiority, suites: learned, margin: {margin}, confidence: 0.95}}
    - {{gate: negative_flips, suites: learned, max_rate: {max_rate}, confidence: 0.95}}
  attempts: 2
  methods: []
  retry_methods: ["experience-replay:ratio=0.3", "ewc:strength={strength}"]
  recipe: {{epochs: {epochs}, learning_rate: 0.001, lora: {{rank: 8, alpha: 16, layers: 0.5}}, seed: {seed}}}
"""
MARGIN, MAX_RATE, STRENGTH, EPOCHS = 0.10, 0.20, 1000, 2
# (margin, confidence), ever stricter: one of them asks more than 200 items can answer, but not what none could
# (a loss that was observed to be larger than the margin; then a higher confidence in a wider margin is asked).
STRICTER = (
    *((0.03, 0.95), (0.01, 0.95), (0.0, 0.95), (0.0, 0.99), (0.0, 0.999), (0.0, 0.9999)),
    *((0.01, 0.9999), (0.03, 0.9999)),
)

Progress = Callable[[str, int, int, str], None]


def run(folder: Path, seed: int, progress: Progress | None = None, console: Console | None = None) -> Path:
    """Tell the whole story in ``folder`` and return the path of its report.

    Raises ``MeristemError`` when the story does not hold, naming the step.
    """
    say = Teller(console or Console())
    ws = _workspace(folder, seed, progress)
    _first_release(say, ws)
    _forgetful_update(say, ws)
    _protected_update(say, ws)
    _strict_margin(say, ws)
    _rollback_and_verify(say, ws)
    return _report(say, ws)


class Teller:
    """Prints the story as it happens, with the time it took so far."""

    def __init__(self, console: Console):
        self.console, self.started = console, time.monotonic()

    def chapter(self, title: str) -> None:
        self.console.print(
            f"\n[bold]{escape(title)}[/bold]  [dim]{time.monotonic() - self.started:.0f} s[/dim]"
        )

    def line(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False)

    def gates(self, decision: DecisionResult) -> None:
        table = Table(box=None, padding=(0, 2, 0, 2))
        for column in ("gate", "suite", "verdict", "why"):
            table.add_column(column, overflow="fold")
        colours = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
        for gate in decision.gates:
            verdict = f"[{colours[gate.outcome]}]{gate.outcome}[/]"
            table.add_row(gate.gate, gate.suite, verdict, escape(gate.reason))
        self.console.print(table)


def _workspace(folder: Path, seed: int, progress: Progress | None) -> Workspace:
    if (folder / MARKER).exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder}: not empty and not an earlier demo; give another folder with --dir")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    settings = SETTINGS.format(margin=MARGIN, max_rate=MAX_RATE, strength=STRENGTH, epochs=EPOCHS, seed=seed)
    (folder / "meristem.yaml").write_text(settings, encoding="utf-8")
    return Workspace.create(folder, actor="demo", progress=progress)


def _first_release(say: Teller, ws: Workspace) -> None:
    say.chapter("1. A model line: a foundation, and a support model tuned from it")
    ws.add_model(FOUNDATION, tier="foundation", source=SOURCE)
    start = ws.add_model(MODEL, tier="industrial", base=FOUNDATION)
    say.line(
        f"SmolLM2-135M-Instruct is {FOUNDATION}@v1; {start.label} starts from it ({start.digest[:19]}...)"
    )
    for task in TASKS:
        ws.add_suite(task, DATA / f"{task}.suite.yaml")
        entry = ws.add_data(task, DATA / f"{task}.train.jsonl")
        say.line(f"{task}: {entry.record.facts['rows']} training rows, {_items(ws, task)} test items")
    say.chapter(f"2. Task A, {TASKS[0]}: learn it, pass the gates, release")
    ws.signal("new-data", MODEL, data=[TASKS[0]], note="tickets of the first quarter")
    turn = _turn(say, ws)
    _expect(turn.outcome == "released", f"task A should be released, but: {turn.reason}")


def _forgetful_update(say: Teller, ws: Workspace) -> None:
    say.chapter(f"3. Task B, {TASKS[1]}, with plain fine-tuning")
    ws.signal("new-data", MODEL, data=[TASKS[1]], note="the warehouse wants order numbers extracted")
    turn = _turn(say, ws)
    _expect(turn.outcome == "stopped" and turn.next_signal is not None, "plain fine-tuning should be blocked")
    assert turn.version is not None
    comparison = ws.compare(turn.version, f"{MODEL}@champion", suite=TASKS[0])
    say.line(
        f"[bold]The gate blocks it[/bold]: {len(comparison.flipped)} tickets were routed right and are now wrong:"
    )
    _show_flips(say, ws, turn, comparison.flipped[:3])


def _protected_update(say: Teller, ws: Workspace) -> None:
    say.chapter("4. The loop answers the regression: the same data with replay and EWC")
    turn = _turn(say, ws)
    _expect(turn.outcome == "released", f"replay and EWC should pass, but: {turn.reason}")
    line = ws.task_matrix(f"{MODEL}@champion").matrix
    names = {"ACC": line.acc, "BWT": line.bwt, "FWT": line.fwt, "forgetting": line.forgetting}
    say.line("the released line: " + ", ".join(f"{k} {v:+.3f}" for k, v in names.items() if v is not None))


def _strict_margin(say: Teller, ws: Workspace) -> None:
    say.chapter("5. What a stricter policy would say of the same evidence")
    old, new = f"{MODEL}@v2", f"{MODEL}@champion"
    for margin, confidence in STRICTER:
        verdict = ws.judge(
            new, old, suite=TASKS[0], gate="non_inferiority", margin=margin, confidence=confidence
        )
        asked = f"margin {100 * margin:.0f} points, confidence {100 * confidence:.4g} %"
        say.line(f"{asked}: [bold]{verdict.outcome}[/bold]; {escape(verdict.reason)}")
        if verdict.outcome == "inconclusive" and verdict.needed is not None:
            return
    raise MeristemError("the demo's story broke: no stricter margin was inconclusive with a number of items")


def _rollback_and_verify(say: Teller, ws: Workspace) -> None:
    say.chapter("6. Take it back, bit for bit, and prove the log")
    before = ws.version(f"{MODEL}@champion")
    ws.rollback(MODEL, reason="the warehouse is not ready")
    after = ws.version(f"{MODEL}@champion")
    say.line(
        f"rolled back from {before.label} to {after.label}: content {after.content[:19]}..., every byte checked"
    )
    audit = ws.verify()
    say.line(f"log verify: intact ({audit.events} events, {audit.documents} documents, {audit.blobs} blobs)")
    _expect(audit.intact, f"the workspace should be intact, but: {audit.problems[:1]}")
    for what, problems in tampering.tamper_with_copies(ws):
        say.line(
            f"a copy with {what}: log verify finds {len(problems)} problem(s), first: {escape(problems[0])}"
        )


def _report(say: Teller, ws: Workspace) -> Path:
    from meristem.web.report import write_report

    path = write_report(ws, MODEL, ws.root / "report.html")
    ws.close()
    say.chapter("Done")
    say.line(f"report: {path.absolute()}")
    task = TASKS[2]
    say.line(
        f"your turn: meristem --workspace {ws.root} update run {MODEL} --data {task} --method experience-replay"
    )
    return path


def _turn(say: Teller, ws: Workspace) -> Turn:
    turn = ws.turn(MODEL)
    if turn is None or turn.decision is None or turn.version is None:
        raise MeristemError("the demo's story broke: the loop had nothing to do")
    say.line(f"{turn.plan.id}: {escape(turn.plan.record.document()['reason'])}")
    decision = ws.explain(turn.decision.id)
    say.gates(decision)
    say.line(
        f"{turn.decision.id}: {turn.version.label} {'is released' if turn.outcome == 'released' else 'does not ship'}"
    )
    return turn


def _show_flips(say: Teller, ws: Workspace, turn: Turn, flipped: tuple[str, ...]) -> None:
    from meristem.evaluation.service import load_suite_asset

    items = {
        i.id: i for task in load_suite_asset(ws.store, ws.asset("suite", TASKS[0])).tasks for i in task.items
    }
    assert turn.version is not None
    results = {r["id"]: r for r in ws.results(ws.evaluate(turn.version, TASKS[0]))}
    for name in flipped:
        item = items[name.partition("/")[2]]
        answer = results[item.id]["prediction"]
        text = item.chat()[-1]["content"].rpartition("\n\n")[2]
        say.line(f"  [dim]{escape(text)}[/dim]  {item.answer} -> [red]{escape(answer)}[/red]")


def _items(ws: Workspace, suite: str) -> int:
    return int(ws.asset("suite", suite).record.facts["items"])


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise MeristemError(f"the demo's story broke: {otherwise}")
