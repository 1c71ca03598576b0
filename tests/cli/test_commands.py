"""Every command as a user types it: exit codes, ``--json``, ``--help``, and what the help imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer
from tests import acme

import meristem as ms
from meristem.cli.main import NOUNS as NAMES
from meristem.cli.main import build

app = typer.main.get_command(build())
FOUND = {name: app.get_command(None, name) for name in NAMES}
NOUNS = {name: noun for name, noun in FOUND.items() if isinstance(noun, typer.core.TyperGroup)}
VERBS = [(name, verb) for name, noun in NOUNS.items() for verb in noun.commands]
ALONE = [name for name in NAMES if name not in NOUNS]

# A command line for every verb, run in this order on the grown workspace, with its exit code.
COMMANDS = [
    ("model add plain --tier industrial --base base", 0),
    ("model list", 0),
    ("model show support@v3", 0),
    ("model lineage support", 0),
    ("model diff support@v2 support@v4", 0),
    ("model push support@v4 --to {tmp}/bundle", 0),
    ("model pull {tmp}/bundle", 0),
    ("model checkout support@v4 --to {tmp}/out", 0),
    ("model checkout support@v3 --to {tmp}/again", 0),
    ("model commit support --source {tmp}/again --reason elsewhere", 0),
    ("alias list support", 0),
    ("alias move support@canary support@v3 --expect 0", 0),
    ("alias move support@canary support@v4 --expect 0", 4),
    ("alias history support@canary", 0),
    ("alias protect support@shadow --anyone", 0),
    ("data add c --file {files}/c.jsonl", 0),
    ("data list", 0),
    ("data show a", 0),
    ("suite add c --file {files}/c.yaml", 0),
    ("suite list", 0),
    ("suite show c", 0),
    ("signal add --kind incident --model plain --note see", 0),
    ("signal list", 0),
    ("signal close signal-1 --reason solved", 0),
    ("plan make support", 0),
    ("plan list", 0),
    ("plan show plan-1", 0),
    ("signal add --kind incident --model plain --note again", 0),
    ("plan make plain", 0),
    ("plan close plan-4 --reason solved", 0),
    ("update run support --data b --method experience-replay:ratio=0.5 --method ewc:strength=1,samples=8", 0),
    ("update resume update-3", 0),
    ("update show update-3", 0),
    ("update reproduce update-3", 0),
    ("update close update-3", 2),
    ("update list", 0),
    ("eval run support@v4 --suite a", 0),
    ("eval compare support@v4 support@v2 --suite a", 0),
    ("eval compare support@v3 support@v2 --suite a", 1),
    ("eval compare support@v4 support@v2 --suite a --margin 0.001 --to {tmp}/compare.html", 3),
    ("eval matrix support@v4", 0),
    ("eval export support@v4 --suite a --to {tmp}/results.xml", 0),
    ("eval contamination support@v4 --suite a", 0),
    ("bench list", 0),
    ("bench run mixed-4 --data {tmp}/nowhere --out {tmp}/bench", 2),
    ("bench report {tmp}/nowhere", 2),
    ("release propose support@v4", 0),
    ("release propose support@v3", 1),
    ("release explain decision-2", 0),
    ("release promote decision-2", 1),
    ("release approve decision-3 --reason good", 0),
    ("release promote decision-3", 0),
    ("release history support", 0),
    ("release rollback support --reason careful", 0),
    ("release promote decision-3", 4),
    ("loop run --once", 0),
    ("data delete c --reason request --yes", 0),
    ("store gc --dry-run", 0),
    ("store gc", 0),
    ("store verify", 0),
    ("store reindex", 0),
    ("store migrate", 0),
    ("key add --file {tmp}/key.pem", 0),
    ("key list", 0),
    ("log checkpoint --key {tmp}/key.pem --anchor {tmp}/anchor.jsonl", 0),
    ("key rotate --file {tmp}/key.pem --to {tmp}/key2.pem", 0),
    ("log export --to {tmp}/log.jsonl", 0),
    ("log show --last 3", 0),
    ("log verify", 0),
    ("doctor", 0),
    ("method list", 0),
    ("method show ewc", 0),
    ("method show joint", 0),
    ("catalogue", 0),
    ("report support --out {tmp}/report.html", 0),
    ("init {tmp}/another", 0),
]


def test_every_verb_is_in_the_list():
    named = {tuple(line.split()[:2]) for line, _ in COMMANDS}
    assert {verb for verb in VERBS if verb not in named} == set()
    assert {name for name in ALONE if name not in {line.split()[0] for line, _ in COMMANDS}} == {"demo"}


def test_every_command_gives_json_and_nothing_else_on_stdout(cli, grown, files, tmp_path):
    for line, code in COMMANDS:
        words = line.format(tmp=tmp_path, files=files).split()
        done = cli(grown, *words, "--json")
        assert done.code == code, (line, done)
        if code == 0 or words[:2] in (["eval", "compare"], ["release", "propose"]):
            json.loads(done.out)
        else:
            assert done.out == "" and len(done.err.splitlines()) == 1, line


def test_every_command_speaks_to_people(cli, grown, files, tmp_path):
    """The same commands without --json: some text, no traceback, the same exit codes."""
    for line, code in COMMANDS:
        done = cli(grown, *line.format(tmp=tmp_path, files=files).split())
        assert done.code == code, (line, done)
        assert (done.out or done.err).strip() and "Traceback" not in done.out + done.err, line


@pytest.mark.parametrize(
    "words", [[], *[[noun] for noun in NOUNS], *[[name] for name in ALONE], *map(list, VERBS)]
)
def test_help(cli, words):
    done = cli(None, *words, "--help")
    assert done.code == 0 and "Usage: meristem" in done.out and done.err == ""


def test_a_noun_without_a_verb_shows_its_help(cli):
    done = cli(None, "model")
    assert done.code == 2 and done.out == "" and "  checkout  " in done.err


def test_inconclusive_is_exit_3(cli, grown):
    """A margin that so few items cannot settle: exit 3 from propose, promote and the loop."""
    acme.gates(grown, "{gate: negative_flips, suites: all, max_rate: 0.05}")
    ws = ms.Workspace.open(grown)
    ws.signal("new-data", "support", data=["b"])
    ws.close()
    acme.configure(grown, attempts="1", methods=json.dumps(acme.REPLAY_AND_EWC))
    done = cli(grown, "loop", "run", "--json")
    assert done.code == 3, done
    turn = json.loads(done.out)[0]
    assert turn["outcome"] == "stopped" and "items would settle it" in turn["reason"]
    assert cli(grown, "release", "promote", turn["decision"]).code == 3
    done = cli(grown, "release", "propose", turn["version"])
    assert done.code == 3 and "INCONCLUSIVE" in done.out


def test_a_plan_that_nobody_wants_any_more(cli, fresh):
    """Closed with its reason, the loop goes on to the next signal; a second time it is refused."""
    assert cli(fresh, "signal", "add", "--kind", "incident", "--model", "support", "--data", "a").code == 0
    assert cli(fresh, "plan", "make", "support").code == 0
    done = cli(fresh, "plan", "close", "plan-1", "--reason", "withdrawn", "--json")
    assert done.code == 0 and json.loads(done.out) == {"id": "plan-1", "status": "closed"}
    assert cli(fresh, "loop", "run").out == "no signal is pending\n"
    again = cli(fresh, "plan", "close", "plan-1")
    assert again.code == 2 and "only an open plan can be closed" in again.err


def test_a_failed_turn_of_one_model_is_not_hidden_by_another(cli, grown, files):
    """Two models, the first fails its gates, the second has nothing wrong: exit 1."""
    ws = ms.Workspace.open(grown)
    ws.add_model("zebra", tier="industrial", base="base")
    ws.signal("new-data", "support", data=["b"])
    ws.signal("base-upgrade", "zebra")
    ws.signal("incident", "zebra")
    ws.close()
    acme.configure(grown, attempts="1")
    done = cli(grown, "loop", "run", "--json")
    assert done.code == 1
    turns = json.loads(done.out)
    # A signal that cannot be answered does not keep the next one waiting.
    assert [t["outcome"] for t in turns] == ["stopped", "waiting", "waiting"]


def test_approvals(cli, grown):
    """Two signatures by two people before a passed decision may be promoted; a failed one cannot be signed."""
    acme.configure(grown, approvals="2")
    done = cli(grown, "release", "propose", "support@v4", "--json")
    assert json.loads(done.out)["id"] == "decision-3"  # planned, and so judged, under the policy before
    methods = ("--method", "experience-replay:ratio=0.5", "--method", "ewc:strength=2,samples=8")
    assert cli(grown, "update", "run", "support", "--data", "b", *methods).code == 0
    name = json.loads(cli(grown, "release", "propose", "support@v5", "--json").out)["id"]
    done = cli(grown, "release", "promote", name)
    assert done.code == 2 and "needs 2 approvals and has 0" in done.err
    for actor, missing in (("ann", 1), ("ann", 1), ("ben", 0)):
        done = cli(grown, "--actor", actor, "--json", "release", "approve", name)
        assert json.loads(done.out)["missing"] == missing
    assert cli(grown, "release", "approve", "decision-2").code == 2
    assert cli(grown, "release", "promote", name).code == 0


def test_tampering_is_exit_1(cli, grown):
    import sqlite3

    with sqlite3.connect(grown / ".meristem/meristem.db") as connection:
        connection.execute("update aliases set version = (select digest from versions where number = 3)")
    connection.close()
    done = cli(grown, "log", "verify")
    assert done.code == 1 and "TAMPERED" in done.out
    assert json.loads(cli(grown, "log", "verify", "--json").out)["intact"] is False


def test_a_broken_database_is_exit_5(cli, grown):
    (grown / ".meristem/meristem.db").write_bytes(b"not a database" * 100)
    done = cli(grown, "model", "list")
    assert done.code == 5 and len(done.err.splitlines()) == 1


def test_an_internal_error_is_exit_70_and_debug_shows_where(cli, grown, monkeypatch):
    def broken(self):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(ms.Workspace, "models", broken)
    done = cli(grown, "model", "list")
    assert done.code == 70 and done.err == (
        "meristem: internal error: ZeroDivisionError: oh (--debug shows where)\n"
    )
    done = cli(grown, "--debug", "model", "list")
    assert done.code == 70 and "Traceback" in done.err


def test_ctrl_c_is_exit_130(cli, grown, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ms.Workspace, "models", stopped)
    done = cli(grown, "model", "list")
    assert done.code == 130 and done.err == "meristem: interrupted; the same command finishes the work\n"


def test_ctrl_c_while_the_command_line_is_imported_is_exit_130():
    code = (
        "import sys, builtins; real = builtins.__import__\n"
        "def stopped(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "from meristem.cli.main import main\n"
        "builtins.__import__ = stopped; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "meristem: interrupted; the same command finishes the work\n"


@pytest.mark.parametrize(
    ("line", "code"), [("eval compare support@v3 support@v2 --suite a", 1), ("log verify", 0)]
)
def test_a_reader_that_went_away_does_not_change_the_exit_code(grown, line, code):
    """It is the command's own, also when that is not 0."""
    start = "from meristem.cli.main import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", start, "--workspace", str(grown), *line.split()]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(
    ("raised", "code"), [("BrokenPipeError(32, 'gone')", 141), ("SystemExit(1)", 1), ("SystemExit(0)", 0)]
)
def test_work_that_a_broken_pipe_cut_off_is_not_reported_as_done(raised, code):
    start = (
        "import sys; sys.argv = ['meristem', 'init']\nfrom meristem.workspace import Workspace\n"
        f"def cut(folder): raise {raised}\n"
        "Workspace.create = cut\nfrom meristem.cli.main import main; main()"
    )
    assert subprocess.run([sys.executable, "-c", start], check=False).returncode == code


def test_a_reader_that_goes_away_is_no_error(grown):
    code = "from meristem.cli.main import main; main()"
    words = [sys.executable, "-c", code, "--workspace", str(grown), "--json", "log", "show", "--last", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_help_imports_nothing_heavy():
    """What ``meristem --help`` loads: Typer, Rich and the command line's own files."""
    code = (
        "import sys; sys.argv = ['meristem', '--help']\n"
        "from meristem.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    heavy = [
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "sqlalchemy",
        "pydantic",
        "numpy",
        "scipy",
        "yaml",
        "fsspec",
    ]
    assert loaded.isdisjoint(heavy)
    assert "Continual learning" in done.stdout
