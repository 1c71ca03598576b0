"""Freeze a task of lm-evaluation-harness into a suite, and rebuild it from there. Imports lm_eval.

Documents stand in the suite as lm-eval's own functions left them, with the few-shot examples that it drew for each,
so that a rebuilt task needs no data file, no hub and no draw.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import datasets
import lm_eval.api.task as harness
import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.metrics import bits_per_byte, mean
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.samplers import ContextSampler
from lm_eval.defaults import DEFAULT_OTHER_SEED

from meristem._quiet import quiet_libraries
from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, Message
from meristem.evaluation.tasks.harness.lm_eval_source import Source, built_in, checked, with_data_paths
from meristem.evaluation.tasks.harness.lm_eval_task import Frozen
from meristem.evaluation.tasks.harness.shared import digest, first_line, same_documents

LOCAL_BUILDERS = frozenset({"json", "csv", "parquet", "text"})
# where documents come from; a frozen task brings its own
DATA_KEYS = frozenset(
    {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "process_docs"}
    | {f"{part}_split" for part in ("training", "validation", "test", "fewshot")}
)


class _Sandbox(SandboxedEnvironment):
    """Compiles a template once; lm-eval asks for it again with every document."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.compiled = lru_cache(maxsize=256)(super().from_string)

    def from_string(self, source: Any, *given: Any, **named: Any) -> Any:
        return self.compiled(source, *given, **named)


@contextmanager
def harness_ways() -> Iterator[None]:
    """Inside, lm-eval is silent and renders templates in a sandbox: a template must not reach into Python."""
    env, bar = lm_eval.utils.env, harness.tqdm
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    sandbox = _Sandbox(loader=env.loader, undefined=env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(env.filters)
    lm_eval.utils.env, harness.tqdm = sandbox, lambda rows, **_: rows
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with quiet_libraries():
            yield
    finally:
        lm_eval.utils.env, harness.tqdm = env, bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load(source: Source, num_fewshot: int | None) -> Any:
    """The task as lm-eval builds it, with its data. ``Refused`` with lm-eval's reason where it cannot."""
    config = copy.deepcopy(with_data_paths(source))
    _check_metrics(config)
    with tempfile.TemporaryDirectory() as cache:
        if config.get("dataset_path") in LOCAL_BUILDERS:
            config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "cache_dir": cache}
        try:
            task = harness.ConfigurableTask(config=config)
        except Exception as error:  # configuration, data or network: lm-eval raises anything
            raise Refused(f"lm-eval cannot build it ({first_line(error)})") from error
        _set_shots(task, num_fewshot)
    return task


def freeze(source: Source, task: Any, version: str, limit: int | None) -> Frozen:
    """The documents of ``task`` and the few-shot examples that lm-eval draws for them."""
    documents = [document for _, document in task.doc_iterator(limit=limit)]
    drawn = _draws(task, documents)
    named = [[_text(shot) for shot in shots] for shots in drawn]
    places = {text: at for at, text in enumerate(dict.fromkeys(text for shots in named for text in shots))}
    texts = [_text(document) for document in documents]
    if places.keys() & set(texts):
        raise Refused("few-shot examples would be test documents; give it a fewshot_split, or num_fewshot: 0")
    local = source.yaml is None
    return Frozen(
        harness=version,
        version=str(task.VERSION),
        yaml=source.yaml,
        config=json.dumps(_without_data(source.config), ensure_ascii=False) if local else None,
        digest=source.digest,
        documents=texts,
        shots=list(places),
        drawn=[[places[text] for text in shots] for shots in named] if places else [],
    )


def rebuild(frozen: Frozen, num_fewshot: int | None) -> Any:
    """The task of a stored suite. ``BadInput`` when its configuration or its documents are others than frozen."""
    if frozen.yaml is not None:
        source = built_in(frozen.yaml)
        if source.digest != frozen.digest:
            raise BadInput(
                f"the installed lm-eval has another {frozen.yaml} than was frozen; add the suite again"
            )
        config = _without_data(source.config)
    else:
        config = checked(json.loads(frozen.config or "{}"))
    documents = [json.loads(text) for text in frozen.documents]
    shots = [json.loads(text) for text in frozen.shots]
    config |= {
        "test_split": "frozen",
        "custom_dataset": lambda **_: {"frozen": datasets.Dataset.from_list(documents)},
        "fewshot_config": _replayed(config.get("fewshot_config"), shots, frozen.drawn),
    }
    try:
        _check_metrics(config)
        task = harness.ConfigurableTask(config=config)
        _set_shots(task, num_fewshot)
        found = {str(at): _text(document) for at, document in task.doc_iterator()}
    except Exception as error:
        raise BadInput(f"lm-eval cannot rebuild it ({first_line(error)})") from error
    same_documents({str(at): text for at, text in enumerate(frozen.documents)}, found)
    return task


def choose(task: Any, metric: str, filter: str) -> tuple[str, str]:
    """The metric and the filter whose value is an item's score. ``Refused`` unless its mean is lm-eval's figure."""
    aggregation, better = task.aggregation(), task.higher_is_better()
    metrics, filters = list(aggregation), [found.name for found in task._filters]
    if metric and metric not in metrics:
        raise Refused(f"metric: it has no {metric!r}; its metrics are {', '.join(metrics)}")
    if filter and filter not in filters:
        raise Refused(f"filter: it has no {filter!r}; its filters are {', '.join(filters)}")
    able = [name for name in metrics if _is_mean(aggregation[name], better.get(name))]
    if not (metric or able) or (metric and metric not in able):
        what = metric or ", ".join(metrics)
        raise Refused(
            f"metric: {what} is no mean of its items with higher better, so versions cannot be compared by item; "
            f"those that can: {', '.join(able) or 'none'}"
        )
    return metric or able[0], filter or filters[0]


def items(task: Any, frozen: Frozen) -> tuple[Item, ...]:
    """What people and leak checks read: the question without its examples, the right answer, the options."""
    return tuple(_item(task, str(at), json.loads(text)) for at, text in enumerate(frozen.documents))


def _item(task: Any, id: str, document: dict[str, Any]) -> Item:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        text = task.doc_to_target(document)
        if not isinstance(text, str) or not text.strip():
            raise Refused(f"document {id} has no text")
        return Item(id, (), "", text=text)
    options = [str(o) for o in task.doc_to_choice(document)] if task.config.doc_to_choice else []
    asked, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.multiple_input:  # the choices are contexts, and the target is what follows each
        said = Message("user", "\n".join(options))
        return Item(id, (said,), options[asked], tuple(options), references=(str(target),))
    right = [_answer(one, options) for one in (target if isinstance(target, list) else [target])]
    return Item(
        id, (Message("user", str(asked)),), (right or [""])[0], tuple(options), references=tuple(right[1:])
    )


def _answer(target: Any, options: list[str]) -> str:
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(options):
        return options[target]
    return str(target).strip()


def _draws(task: Any, documents: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Per document the examples that the task's sampler gives it, in the order of an evaluation."""
    count = task.config.num_fewshot or 0
    if not count:
        return []
    drawn: list[list[dict[str, Any]]] = []
    sample = task.sampler.sample

    def record(*given: Any, **named: Any) -> Any:
        found = list(sample(*given, **named))
        drawn.append(found)
        return found

    task.sampler.sample = record
    for document in documents:
        task.fewshot_context(document, count, gen_prefix=task.doc_to_prefix(document))
    return drawn


def _replayed(given: Any, shots: list[dict[str, Any]], drawn: list[list[int]]) -> dict[str, Any]:
    """A ``fewshot_config`` whose sampler gives each document in turn the examples that were drawn for it."""
    turns = iter(drawn)

    class Replay(ContextSampler):
        def sample(self, n: int, eval_doc: Any = None, df: Any = None, **named: Any) -> list[dict[str, Any]]:
            return [shots[at] for at in next(turns)]

    kept = {key: value for key, value in (given or {}).items() if key not in ("split", "process_docs")}
    return {**kept, "sampler": Replay, "samples": shots}


def _set_shots(task: Any, wanted: int | None) -> None:
    fixed = task.config.num_fewshot
    if wanted and fixed == 0:
        raise Refused("num_fewshot: the task itself fixes it at 0; leave it out")
    task.set_config("num_fewshot", fixed if wanted is None else wanted)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _check_metrics(config: dict[str, Any]) -> None:
    """lm-eval looks for a metric that it does not know on the hub, and what it finds there is code."""
    for metric in config.get("metric_list") or ():
        name = metric.get("metric")
        if config.get("process_results") is None and isinstance(name, str) and name not in METRIC_REGISTRY:
            raise Refused(f"metric: lm-eval has none named {name!r}")


def _is_mean(aggregation: Any, higher_is_better: bool | None) -> bool:
    return (aggregation is mean and higher_is_better is not False) or aggregation is bits_per_byte


def _without_data(config: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in config.items() if key not in DATA_KEYS}


def _text(document: dict[str, Any]) -> str:
    digest(document)  # refuses what JSON cannot hold
    return json.dumps(document, ensure_ascii=False)
