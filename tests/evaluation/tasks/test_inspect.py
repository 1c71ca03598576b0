"""Tasks of an installed Inspect package as suite tasks: the package is a real one, written and put on the path here."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap

import pytest
import yaml

from meristem.engine.generate import generate
from meristem.engine.prompts import encode_prompt
from meristem.errors import BadInput
from meristem.evaluation.run import evaluate, prepare
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite
from meristem.evaluation.tasks.base import Run

pytest.importorskip("inspect_ai")

CODE = '''
import json
from pathlib import Path

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample, json_dataset
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import Score, accuracy, includes, mean, model_graded_qa, scorer
from inspect_ai.solver import generate, solver, use_tools
from inspect_ai.tool import tool

ROWS = Path(__file__).with_name("rows.jsonl")


def samples():
    return [Sample(**json.loads(line)) for line in ROWS.read_text().splitlines()]


@task
def letters(twice: bool = False):
    return Task(samples(), scorer=includes(), config=GenerateConfig(max_tokens=8), version=3,
                epochs=2 if twice else None)


@solver
def ask_again():
    async def solve(state, generate):
        state = await generate(state)
        if state.sample_id != "b":  # one sample is done after its first turn
            state.messages.append(ChatMessageUser(content="Again?"))
            state = await generate(state)
        return state
    return solve


@scorer(metrics=[mean()])
def lengths():
    async def score(state, target):
        return Score(value=min(1.0, len(state.output.completion) / 10), answer=state.output.completion)
    return score


@scorer(metrics={"short": [mean()], "long": [mean()]})
def both():
    async def score(state, target):
        return Score(value={"short": 0.25, "long": 7})
    return score


@scorer(metrics=[mean()])
def wordy():
    async def score(state, target):
        return Score(value="mostly right")
    return score


@scorer(metrics=[accuracy()])
def asking():
    async def score(state, target):
        await get_model().generate("Is it right?")
        return Score(value="C")
    return score


@tool
def clock():
    async def execute():
        """The time."""
        return "noon"
    return execute


@task
def turns():
    return Task(samples(), solver=ask_again(), scorer=lengths(), config=GenerateConfig(max_tokens=6))


@task
def drawn():
    return Task(samples(), scorer=includes(), config=GenerateConfig(max_tokens=4, temperature=1.0, seed=1))


@task
def tools():
    return Task(samples(), solver=[use_tools(clock()), generate()], scorer=includes())


@task
def broken(what: str):
    given = {
        "sandbox": dict(sandbox="docker"),
        "graded": dict(scorer=model_graded_qa()),
        "asking": dict(scorer=asking()),
        "scorer": dict(scorer=None),
        "wordy": dict(scorer=wordy()),
        "dict": dict(scorer=both()),
        "epochs": dict(epochs=Epochs(2, "max")),
        "top_k": dict(config=GenerateConfig(top_k=3)),
        "model": dict(model_roles={"critic": "mockllm/model"}),
        "files": dict(dataset=[Sample(input="x", files={"a": "b"})]),
        "twice": dict(dataset=[Sample(input="x", id=1), Sample(input="y", id=1)]),
        "solver": dict(solver=failing()),
        "raise": dict(dataset=json_dataset("no-such-file.jsonl")) if what == "raise" else {},
    }[what]
    return Task(**{"dataset": samples(), "scorer": includes(), **given})


@solver
def failing():
    async def solve(state, generate):
        if state.sample_id == "b":
            raise ValueError("it broke")
        return await generate(state)
    return solve
'''
ROWS = [
    {"id": "a", "input": "Say something.", "target": "e"},
    {"id": "b", "input": "Say something else entirely.", "target": ["q", "t"], "metadata": {"level": 1}},
    {
        "id": "c",
        "input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}],
        "target": "o",
    },
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of an installed package that registers its tasks."""
    place = tmp_path_factory.mktemp("venv") / "site-packages"  # where Inspect looks for what is installed
    inside = place / "acme_letters"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text(textwrap.dedent(CODE))
    write_rows(inside, ROWS)
    info = place / "acme_letters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme_letters\nVersion: 1.0\n")
    (info / "RECORD").write_text("acme_letters/__init__.py,,\n")
    (info / "top_level.txt").write_text("acme_letters\n")
    (info / "entry_points.txt").write_text("[inspect_ai]\nacme_letters = acme_letters\n")
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    yield inside
    sys.path.remove(str(place))


@pytest.fixture(autouse=True)
def rows_as_they_were(package):
    yield
    write_rows(package, ROWS)


def write_rows(package, rows):
    (package / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def suite_of(folder, name, **keys):
    task = {"name": "t", "type": f"inspect:acme_letters/{name}", "kind": "instruction", **keys}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "theirs", "tasks": [task]}))
    return load_suite(folder / "suite.yaml")


def said(engine, messages, **ways):
    ways = {"max_new_tokens": 8, **ways}
    return generate(engine, [encode_prompt(engine, chat) for chat in messages], **ways)


def test_samples_are_answered_by_our_engine_and_scored_by_the_tasks_scorer(engine, package, tmp_path):
    suite = suite_of(tmp_path, "letters")
    [task] = suite.tasks
    assert (task.metric, task.settings.frozen.version) == ("includes", "3")
    assert [item.answer for item in task.items] == ["e", "q", "o"] and task.items[1].references == ("t",)
    results = evaluate(engine, suite)
    texts = [made.text for [made] in said(engine, [item.chat() for item in task.items])]
    for row, item, text in zip(results, task.items, texts, strict=True):
        assert row["prediction"] == text
        wanted = any(target in text.lower() for target in (item.answer, *item.references))
        assert row["score"] == float(wanted) and row["detail"]["tokens"] > 8
    assert Suite.from_document(json.loads(json.dumps(suite.to_document()))) == suite
    assert str(package) not in json.dumps(suite.to_document())
    assert evaluate(engine, suite) == results


def test_our_mean_is_the_one_that_inspect_reports(engine, package, tmp_path):
    from meristem.evaluation.tasks.harness import inspect_run

    suite = suite_of(tmp_path, "turns")
    [task] = suite.tasks
    log, rounds = inspect_run.solve(engine, task, task.settings, task.settings._rebuilt(task), Run())
    results = evaluate(engine, suite)
    assert log.results.scores[0].metrics["mean"].value == pytest.approx(
        sum(row["score"] for row in results) / 3
    )
    assert rounds.solved == 3
    # sample b took one turn, the others two
    assert [sum(m.role == "assistant" for m in sample.messages) for sample in log.samples] == [2, 1, 2]


def test_epochs_are_averaged_and_every_draw_follows_from_the_seed(engine, package, tmp_path):
    twice = suite_of(tmp_path, "letters", args={"twice": True}, limit=2)
    rows, once = evaluate(engine, twice), evaluate(engine, suite_of(tmp_path, "letters", limit=2))
    assert [row["detail"]["scores"] for row in rows] == [[row["score"]] * 2 for row in once]
    drawn = suite_of(tmp_path, "drawn")
    assert evaluate(engine, drawn) == evaluate(engine, drawn)


def test_a_sample_that_changed_under_the_same_name_is_refused_before_anything_runs(package, tmp_path):
    suite = suite_of(tmp_path, "letters")
    prepare(suite)
    write_rows(package, [ROWS[0], {**ROWS[1], "metadata": {"level": 2}}, {**ROWS[2], "id": "d"}])
    with pytest.raises(
        BadInput, match=r"task 't': .*\(1 changed: b; 1 gone: c; 1 new: d\); add the suite again"
    ):
        prepare(suite)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"harness": "0.1"}, r"frozen with inspect-ai 0\.1, and .*pip install inspect-ai==0\.1"),
        ({"code": "sha256:0"}, "the installed acme_letters/letters is not the one that was frozen"),
        ({"samples": []}, "without its digests"),
    ],
)
def test_a_task_that_is_not_what_was_frozen_is_refused(package, tmp_path, change, told):
    document = suite_of(tmp_path, "letters").to_document()
    document["tasks"][0]["frozen"].update(change)
    with pytest.raises(BadInput, match=told):
        prepare(Suite.from_document(document))


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        ("broken", {"args": {"what": "sandbox"}}, "needs a sandbox"),
        ("broken", {"args": {"what": "graded"}}, "its scorer model_graded_qa asks a model"),
        ("broken", {"args": {"what": "scorer"}}, "has no scorer"),
        ("broken", {"args": {"what": "epochs"}}, "reduces epochs by max"),
        ("broken", {"args": {"what": "model"}}, "names its own models"),
        ("broken", {"args": {"what": "files"}}, "sample '1' needs a sandbox"),
        ("broken", {"args": {"what": "twice"}}, "two samples have the id '1'"),
        ("broken", {"args": {"what": "raise"}}, "cannot build 'acme_letters/broken'"),
        ("broken", {}, "cannot build 'acme_letters/broken'"),
        ("letters", {"metric": "f1"}, "no scorer 'f1'; its scorers are includes"),
        ("nothing", {}, "registers no Inspect task 'acme_letters/nothing'"),
        ("letters", {"type": "inspect:no_such/letters"}, "no installed package registers .* 'no_such'"),
        ("letters", {"type": "inspect:letters.py@letters"}, "task: String should match"),
        ("letters", {"prompt": "{x}"}, "brings its own items; remove prompt"),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_one_line(package, tmp_path, name, keys, told):
    with pytest.raises(BadInput, match=told) as caught:
        suite_of(tmp_path, name, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        ("tools", {}, "task 't': it uses tools"),
        ("broken", {"args": {"what": "asking"}}, "its scorer asks a model"),
        ("broken", {"args": {"what": "top_k"}}, "item 'a': generation settings top_k are not supported"),
        ("broken", {"args": {"what": "dict"}}, "name one of its values: both/short, both/long"),
        ("broken", {"args": {"what": "dict"}, "metric": "both/long"}, "is 7, and a score is a share"),
        ("broken", {"args": {"what": "wordy"}}, "is 'mostly right', and a score is a share"),
        ("broken", {"args": {"what": "solver"}}, "Inspect stopped .*it broke"),
    ],
)
def test_what_shows_only_while_it_runs_ends_the_task_with_one_line(
    engine, package, tmp_path, name, keys, told
):
    suite = suite_of(tmp_path, name, max_new_tokens=2, **keys)
    with pytest.raises(BadInput, match=told) as caught:
        evaluate(engine, suite)
    assert "\n" not in str(caught.value)


def test_one_value_of_a_scorer_with_several_can_be_chosen(engine, package, tmp_path):
    suite = suite_of(tmp_path, "broken", args={"what": "dict"}, metric="both/short", max_new_tokens=2)
    assert [row["score"] for row in evaluate(engine, suite)] == [0.25] * 3


def test_a_long_prompt_is_cut_on_the_declared_side_and_counted_or_refused(engine, package, tmp_path):
    write_rows(package, [{"id": "a", "input": "long " * 60, "target": "x"}])
    [row] = evaluate(engine, suite_of(tmp_path, "letters", truncation="left"))
    assert row["detail"]["truncated"] > 50
    with pytest.raises(BadInput, match=r"item 'a': .* tokens, but there is room for 248"):
        evaluate(engine, suite_of(tmp_path, "letters"))


def test_finished_batches_are_not_computed_again_and_progress_counts_samples(engine, package, tmp_path):
    kept, told = {}, []

    class Part:
        def __init__(self, name):
            self.name = name

        def get(self, batch):
            return kept.get((self.name, batch))

        def put(self, batch, values):
            assert (self.name, batch) not in kept
            kept[self.name, batch] = json.loads(json.dumps(values))

    [task] = suite_of(tmp_path, "turns").tasks
    run = Run(lambda done, total: told.append((done, total)), Part)
    first = task.settings.run(engine, task, run)
    assert len({name for name, _ in kept}) == 2  # two rounds
    assert task.settings.run(engine, task, run) == first and told[-1] == (3, 3)
