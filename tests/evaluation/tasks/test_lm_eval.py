"""Local tasks of lm-evaluation-harness as suite tasks, held against lm-eval's own ``hf`` model."""

from __future__ import annotations

import json

import pytest
import yaml

from meristem.errors import BadInput
from meristem.evaluation.run import evaluate, prepare
from meristem.evaluation.suite_files import load_suite
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.base import Run

pytest.importorskip("lm_eval")

COLOURS = ["red", "deep blue", "green", "pale yellow"]
ROWS = [
    {
        "id": f"q{at}",
        "question": f"Colour of thing {at}?",
        "choices": COLOURS,
        "gold": at % 4,
        "tail": "x" * at,
    }
    for at in range(9)
]
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
CHOICE = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl", "train": "shots.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "training_split": "train",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": METRICS,
    "metadata": {"version": 2.0},
}
WRITTEN = {
    **{k: v for k, v in CHOICE.items() if k not in ("doc_to_choice", "metric_list")},
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n", "a"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "task": "texts",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{question * 12}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
}
GREEDY = {
    **{k: v for k, v in CHOICE.items() if k != "doc_to_choice"},
    "task": "greedy",
    "output_type": "loglikelihood",
    "doc_to_target": "{{choices[gold]}}",
    "metric_list": [METRICS[0]],
}


def write(folder, config, rows=ROWS, shots=None):
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    shots = shots or [{**row, "question": f"Shade of {row['id']}?"} for row in ROWS[:4]]
    for name, lines in (("rows", rows), ("shots", shots)):
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def suite_of(folder, *configs, kind="general", **keys):
    for config in configs:
        write(folder, config)
    tasks = [
        {"name": c["task"], "type": f"lm-eval:{c['task']}", "kind": kind, "include_path": "tasks", **keys}
        for c in configs
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "theirs", "tasks": tasks}))
    return load_suite(folder / "suite.yaml")


def their_own(engine, folder, config, chat, num_fewshot=0, limit=None):
    """``(aggregated results, samples)`` of lm-eval with its own model class over the same weights."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {k: str(folder / "tasks" / v) for k, v in config["dataset_kwargs"]["data_files"].items()}
    local = {**config, "dataset_kwargs": {"data_files": files}}
    loaded = TaskManager(include_defaults=False).load([local])
    for task in loaded["tasks"].values():  # as simple_evaluate, which then spends a second on pip and git
        task.set_config("num_fewshot", num_fewshot)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    model = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=4, max_length=256)
    found = evaluate(
        model,
        loaded,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    return found["results"][config["task"]], found["samples"][config["task"]]


def score(results):
    return sum(row["score"] for row in results) / len(results)


@pytest.mark.parametrize(("format", "metric"), [("text", "acc"), ("chat", "acc_norm")])
def test_choices_scores_and_hashes_are_lm_evals_own(engine, tmp_path, format, metric):
    suite = suite_of(tmp_path, CHOICE, num_fewshot=1, format=format, metric=metric)
    results = evaluate(engine, suite)
    whole, samples = their_own(engine, tmp_path, CHOICE, format == "chat", num_fewshot=1)
    assert score(results) == pytest.approx(whole[f"{metric},none"], abs=1e-12)
    assert [row["score"] for row in results] == [sample[metric] for sample in samples]
    for row, sample in zip(results, samples, strict=True):
        assert all(row["detail"][key] == sample[key] for key in ("doc_hash", "prompt_hash", "target_hash"))
        theirs = [response[0] for response in sample["filtered_resps"]]
        assert list(row["detail"]["logprobs"].values()) == pytest.approx(theirs, rel=1e-4)
        by = [
            value / (len(o) if metric == "acc_norm" else 1) for value, o in zip(theirs, COLOURS, strict=True)
        ]
        assert row["prediction"] == COLOURS[by.index(max(by))]
    assert {row["answer"] for row in results} == set(COLOURS)


def test_written_answers_greedy_targets_and_texts_are_lm_evals_own(engine, tmp_path):
    written, greedy = suite_of(tmp_path, WRITTEN, GREEDY, format="text").tasks
    for task, config, metric in ((written, WRITTEN, "exact_match"), (greedy, GREEDY, "acc")):
        results = evaluate(engine, Suite("s", (task,)))
        whole, samples = their_own(engine, tmp_path, config, False)
        assert score(results) == pytest.approx(whole[f"{metric},none"])
        if config is WRITTEN:
            assert [row["prediction"] for row in results] == [s["filtered_resps"][0] for s in samples]
    texts = suite_of(tmp_path, TEXTS, metric="bits_per_byte", format="text")
    results = evaluate(engine, texts)
    whole, _ = their_own(engine, tmp_path, TEXTS, False)
    assert texts.unit == "bits_per_byte" and {row["unit"] for row in results} == {"bits_per_byte"}
    bits, size = (sum(row["detail"][key] for row in results) for key in ("bits", "bytes"))
    assert bits / size == pytest.approx(whole["bits_per_byte,none"], rel=1e-5)
    assert results[0]["score"] == pytest.approx(-results[0]["detail"]["bits"] / results[0]["detail"]["bytes"])


def test_the_stored_suite_needs_none_of_its_files_and_names_none(engine, tmp_path):
    suite = suite_of(tmp_path, CHOICE, limit=5, num_fewshot=2)
    document = suite.to_document()
    assert str(tmp_path) not in json.dumps(document) and "rows.jsonl" not in json.dumps(document)
    assert [item["id"] for item in document["tasks"][0]["items"]] == ["0", "1", "2", "3", "4"]
    assert suite.test_rows()[1]["prompt"] == [
        {"role": "user", "content": "Question: Colour of thing 1?\nAnswer:"}
    ]
    before = evaluate(engine, suite)
    for file in (tmp_path / "tasks").iterdir():
        file.unlink()
    stored = Suite.from_document(json.loads(json.dumps(document, sort_keys=True)))
    assert stored.digest == suite.digest and evaluate(engine, stored) == before


def test_a_changed_data_file_makes_another_suite(tmp_path):
    first = suite_of(tmp_path, CHOICE)
    assert suite_of(tmp_path, CHOICE).digest == first.digest
    write(tmp_path, CHOICE, [{**ROWS[0], "tail": "other"}, *ROWS[1:]])
    assert load_suite(tmp_path / "suite.yaml").digest != first.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"harness": "0.4.0"}, r"frozen with lm-eval 0\.4\.0, and .* is installed; run: pip install"),
        ({"documents": [json.dumps(row) for row in [ROWS[0], ROWS[5], ROWS[2]]]}, r"\(1 changed: 1\); add"),
        ({"documents": [json.dumps(row) for row in ROWS[:2]]}, "not one entry per document"),
        ({"yaml": "../outside.yaml"}, "has no task file"),
        ({"yaml": "arc/arc_easy.yaml", "digest": "sha256:0"}, "another arc/arc_easy.yaml than was frozen"),
        ({"shots": []}, "an example that is not among the shots"),
        ({"documents": ["1", "2", "3"]}, "'1' is no JSON object"),
        ({"config": "{"}, "Expecting property name"),
        ({"config": '{"task": "colours", "use_prompt": "promptsource:x"}'}, "promptsource"),
        (
            {"config": '{"task": "c", "metric_list": [{"metric": "acc", "hf_evaluate": true}]}'},
            "which is code",
        ),
    ],
)
def test_a_task_that_is_not_what_was_frozen_is_refused_before_anything_runs(tmp_path, change, told):
    document = suite_of(tmp_path, CHOICE, num_fewshot=1, limit=3).to_document()
    document["tasks"][0]["frozen"].update(change)
    with pytest.raises(BadInput, match=told):
        prepare(Suite.from_document(document))


@pytest.mark.parametrize(
    ("yaml", "document", "options"),
    [
        (
            "arc/arc_easy.yaml",
            {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
            ("ice", "fire"),
        ),
        ("hellaswag/hellaswag.yaml", {"query": "He runs", "choices": ["far.", "blue."], "gold": 0}, None),
    ],
)
def test_a_frozen_built_in_task_needs_no_hub_and_uses_the_packages_own_code(engine, yaml, document, options):
    from importlib.metadata import version

    from meristem.evaluation.tasks.harness import lm_eval_frozen, lm_eval_source
    from meristem.evaluation.tasks.harness.lm_eval_task import Frozen, LmEval

    source = lm_eval_source.built_in(yaml)
    document = {**document, "label": str(document.get("gold"))}
    frozen = Frozen(
        harness=version("lm-eval"),
        version="1.0",
        yaml=yaml,
        digest=source.digest,
        documents=[json.dumps(document)],
    )
    with lm_eval_frozen.harness_ways():
        items = lm_eval_frozen.items(lm_eval_frozen.rebuild(frozen, 0), frozen)
    assert items[0].options == (options or tuple(document["choices"]))
    settings = LmEval(task=source.config["task"], metric="acc", filter="none", num_fewshot=0, frozen=frozen)
    [row] = evaluate(engine, Suite("s", (Task("t", "lm-eval", settings, "general", items),)))
    assert row["prediction"] in items[0].options and row["score"] == float(
        row["prediction"] == items[0].answer
    )


def test_documents_that_are_others_are_named():
    from meristem.evaluation.tasks.harness.shared import same_documents

    with pytest.raises(BadInput, match="1 changed: b; 1 gone: c; 2 new: d, e"):
        same_documents({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4", "e": "5"})


@pytest.mark.parametrize(
    ("change", "keys", "told"),
    [
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, {}, "cannot build it.*unsafe"),
        ({"class": "os.system"}, {}, "Python class"),
        ({"dataset_path": "pandas"}, {}, "a pickle, which is code"),
        ({"unsafe_code": True}, {}, "code that the model writes"),
        ({"doc_to_image": "image"}, {}, "only text"),
        ({"metric_list": [{"metric": "bleu", "hf_evaluate": True}]}, {}, "hub, which is code"),
        ({"metric_list": [{"metric": "no_such"}]}, {}, "none named 'no_such'"),
        ({"metric_list": ["acc"]}, {}, "metric_list: not a list of mappings"),
        ({"dataset_kwargs": "rows.jsonl"}, {}, "dataset_kwargs: not a mapping"),
        ({"dataset_kwargs": {"data_files": 3}}, {}, "dataset_kwargs: 3 is no file"),
        ({"include": 3}, {}, "include names no file"),
        ({"metric_list": [{"metric": "f1"}]}, {}, "f1 is no mean of its items.*: none"),
        ({}, {"metric": "brier"}, "no 'brier'; its metrics are acc, acc_norm"),
        ({}, {"filter": "strict"}, "no 'strict'; its filters are none"),
        ({"num_fewshot": 0}, {"num_fewshot": 2}, "fixes it at 0"),
        ({"training_split": "test"}, {"num_fewshot": 2}, "would be test documents"),
        ({"task": "other"}, {}, "no task 'colours'"),
        ({}, {"frozen": {"harness": "1", "version": "1", "digest": "d", "documents": []}}, "written when"),
        ({}, {"system": "Be brief."}, "brings its own items; remove system"),
        ({}, {"data": "tasks/rows.jsonl"}, "remove data"),
        ({}, {"include_path": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_one_line(tmp_path, change, keys, told):
    if change.get("task") or "nowhere" in keys.values():
        keys = {"task": "colours", **keys}
    write(tmp_path, {**CHOICE, **change})
    task = {"name": "t", "type": "lm-eval", "task": "colours", "kind": "general", "include_path": "tasks"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "tasks": [{**task, **keys}]}))
    with pytest.raises(BadInput, match=told) as caught:
        load_suite(tmp_path / "suite.yaml")
    assert "\n" not in str(caught.value)


def test_a_local_task_that_brings_python_is_refused_and_nothing_of_it_runs(tmp_path):
    write(tmp_path, CHOICE)
    (tmp_path / "tasks" / "code.py").write_text(
        "raise SystemExit('it ran')\n\ndef docs(rows):\n    return rows\n"
    )
    (tmp_path / "tasks" / "base.yaml").write_text("process_docs: !function code.docs\n")
    (tmp_path / "tasks" / "colours.yaml").write_text(yaml.safe_dump({"include": "base.yaml", **CHOICE}))
    task = {"name": "t", "type": "lm-eval", "task": "tasks/colours.yaml", "kind": "general"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "tasks": [task]}))
    with pytest.raises(BadInput, match=r"base\.yaml uses !function: a local task that brings Python code"):
        load_suite(tmp_path / "suite.yaml")


def test_a_harness_that_is_not_installed_is_told_with_the_command(tmp_path):
    from meristem.evaluation.tasks.harness.shared import installed_version

    with pytest.raises(
        BadInput, match=r"no-such-ai is not installed; run: pip install 'meristem\[no-such\]'"
    ):
        installed_version("no-such-ai")


def test_a_prompt_without_room_is_cut_on_the_declared_side_and_counted_or_refused(engine, tmp_path):
    long = {**CHOICE, "doc_to_text": "{{question * 15}} Answer:"}
    kept = suite_of(tmp_path, long, truncation="left", format="text", limit=4)
    results = evaluate(engine, kept)
    # as lm-eval: the longest option leaves the least room, and the last token is never fed
    assert all(row["detail"]["truncated"] > 0 for row in results)
    _, samples = their_own(engine, tmp_path, long, False, limit=4)
    assert [row["score"] for row in results] == [sample["acc"] for sample in samples]
    with pytest.raises(BadInput, match=r"suite 'theirs', task 'colours': item 0: .* tokens"):
        evaluate(engine, suite_of(tmp_path, long, format="text"))


def test_finished_batches_are_not_computed_again_and_progress_counts_items(engine, tmp_path):
    class Memory:
        def __init__(self):
            self.held = {}

        def get(self, batch):
            return self.held.get(batch)

        def put(self, batch, values):
            assert batch not in self.held
            self.held[batch] = json.loads(json.dumps(values))

    suite = suite_of(tmp_path, CHOICE, WRITTEN, format="text")
    parts, told = {}, []
    run = Run(lambda done, total: told.append((done, total)), lambda part: parts.setdefault(part, Memory()))
    for task in suite.tasks:
        first = task.settings.run(engine, task, run)
        parts[next(reversed(parts))].held.pop(0)
        assert task.settings.run(engine, task, run) == first
        assert told[-1] == (9, 9)
    assert list(parts) == ["loglikelihood", "generate-0"]
