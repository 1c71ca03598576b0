"""The streams: which tasks, in which orders, asked how, and the training budget that every method gets.

Sources of the orders: ``standard-4`` orders 1-3 as in O-LoRA (Wang et al. 2023, arXiv 2310.14152, appendix) and MoE-CL
(arXiv 2509.18133); ``long-15`` orders 4-6 as in Progressive Prompts (Razdaibiedina et al. 2023, arXiv 2301.12314) and
O-LoRA; ``mixed-*`` are this project's own. Prompts name neither task nor data set: such a name would tell the model which
task it is asked for, which the published O-LoRA prompts do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from meristem.errors import BadInput

Shape = Literal["choice", "text", "preference"]
STAGES: dict[Shape, str] = {"choice": "cit", "text": "cpt", "preference": "ca"}


@dataclass(frozen=True)
class Hub:
    """Where a task lies on the Hugging Face Hub. ``text``: a format string over its columns.

    The ids and columns below are from their pages and were not tried from here.
    """

    name: str
    config: str | None = None
    test: str = "test"
    text: str = "{text}"
    label: str = "label"


@dataclass(frozen=True)
class Task:
    """``folder``: its place under ``--data``; ``question``: what stands before a text, with ``{options}``."""

    name: str
    folder: str
    question: str = ""
    hub: Hub | None = None


@dataclass(frozen=True)
class Protocol:
    """``words``: texts are cut to this many words, in training and test alike (None: never).

    ``recipe`` holds what differs from the default recipe; ``published`` names the column of published numbers.
    """

    name: str
    about: str
    shape: Shape
    tasks: tuple[Task, ...]
    orders: dict[str, tuple[str, ...]]
    recipe: dict[str, Any] = field(default_factory=dict)
    words: int | None = None
    published: str | None = None

    @property
    def stage(self) -> str:
        return STAGES[self.shape]

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)


def _glue(config: str, text: str, test: str = "validation") -> Hub:
    return Hub("nyu-mll/glue", config, test, text)


def _superglue(config: str, text: str) -> Hub:
    return Hub("aps/super_glue", config, "validation", text)


_PAIR = "sentence 1: {premise}\nsentence 2: {hypothesis}"
_FEELING = "How does this review rate the product: {options}?"
_FOLLOWS = "Does the first sentence mean that the second is true: {options}?"
_TASKS = {
    task.name: task
    for task in (
        Task("agnews", "mtl5_agnews", "What is this news about: {options}?", Hub("fancyzhx/ag_news")),
        Task("amazon", "mtl5_amazon", _FEELING),
        Task(
            "dbpedia",
            "mtl5_dbpedia",
            "What is described here: {options}?",
            Hub("fancyzhx/dbpedia_14", text="Title: {title}\nText: {content}"),
        ),
        Task(
            "yahoo",
            "mtl5_yahoo",
            "What is this question about: {options}?",
            Hub(
                "community-datasets/yahoo_answers_topics",
                text="{question_title} {question_content}",
                label="topic",
            ),
        ),
        Task(
            "yelp",
            "mtl5_yelp",
            "How does this review rate the business: {options}?",
            Hub("Yelp/yelp_review_full"),
        ),
        Task("mnli", "cl15_mnli", _FOLLOWS, _glue("mnli", _PAIR, "validation_matched")),
        Task("cb", "cl15_cb", _FOLLOWS, _superglue("cb", _PAIR)),
        Task(
            "rte",
            "cl15_rte",
            _FOLLOWS,
            _glue("rte", "sentence 1: {sentence1}\nsentence 2: {sentence2}"),
        ),
        Task(
            "qqp",
            "cl15_qqp",
            "Do the two sentences ask the same: {options}?",
            _glue("qqp", "first sentence: {question1}\nsecond sentence: {question2}"),
        ),
        Task("sst2", "cl15_sst2", "Is this opinion good or bad: {options}?", _glue("sst2", "{sentence}")),
        Task(
            "imdb",
            "cl15_imdb",
            "Does the writer like the film: {options}?",
            Hub("stanfordnlp/imdb"),
        ),
        Task(
            "wic",
            "cl15_wic",
            "Has the word the same sense in both sentences: {options}?",
            _superglue("wic", "word: {word}\n{sentence1}\n{sentence2}"),
        ),
        Task(
            "copa",
            "cl15_copa",
            "Which one is right: {options}?",
            _superglue(
                "copa", 'Which is the {question} of "{premise}"?\nchoice1: {choice1}\nchoice2: {choice2}'
            ),
        ),
        Task(
            "boolq",
            "cl15_boolq",
            "Answer the question from the passage: {options}?",
            _superglue("boolq", "question: {question}\npassage: {passage}"),
        ),
        Task(
            "multirc",
            "cl15_multirc",
            "Is the answer right by the passage: {options}?",
            _superglue("multirc", "question: {question}\nanswer: {answer}\npassage: {paragraph}"),
        ),
    )
}


def _of(names: str) -> tuple[str, ...]:
    return tuple(names.split())


def _own_orders(stream: tuple[str, ...], start: int = 1) -> dict[str, tuple[str, ...]]:
    """The stream, reversed, and its odd positions first; each order once."""
    found = dict.fromkeys((stream, stream[::-1], stream[::2] + stream[1::2]))
    return {str(number): order for number, order in enumerate(found, start)}


def _tasks(names: tuple[str, ...]) -> tuple[Task, ...]:
    return tuple(_TASKS[name] for name in names)


_MIXED = _of("agnews amazon dbpedia mnli boolq wic copa qqp")
_FOUR = _of("dbpedia amazon yahoo agnews")
_FIFTEEN = _of("mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo")
_CORPORA = (
    Task("legal", "corpus_legal_en"),
    Task("medical", "corpus_medical_en"),
    Task("finance", "corpus_finance_en"),
    Task("code", "corpus_code_py"),
)
_PREFERENCES = (
    Task("harmless", "hh_rlhf_harmless"),
    Task("helpful", "dpo_en_demo"),
    Task("truthful", "truthfulqa_pairs"),  # benchmarks/truthful_pairs.py makes it
)
_SMALL = {"learning_rate": 1e-3, "lora": {"layers": 0.5}}  # chosen for the embedded 135M model on a CPU

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "mixed-2",
            "topics, then descriptions: small enough to choose settings on",
            "choice",
            _tasks(_MIXED[:3:2]),
            _own_orders(_MIXED[:3:2]),
            {**_SMALL, "max_steps": 36, "max_length": 256},
            words=32,
        ),
        Protocol(
            "mixed-4",
            "topics, ratings, descriptions, entailment",
            "choice",
            _tasks(_MIXED[:4]),
            _own_orders(_MIXED[:4]),
            {**_SMALL, "max_steps": 36, "max_length": 256},
            words=32,
        ),
        Protocol(
            "mixed-8",
            "mixed-4, then four yes/no and pair tasks",
            "choice",
            _tasks(_MIXED),
            _own_orders(_MIXED),
            {**_SMALL, "max_steps": 36, "max_length": 384},
            words=96,
        ),
        Protocol(
            "standard-4",
            "the standard CL benchmark, 4 tasks",
            "choice",
            _tasks(_FOUR),
            {
                "1": _of("dbpedia amazon yahoo agnews"),
                "2": _of("dbpedia amazon agnews yahoo"),
                "3": _of("yahoo amazon agnews dbpedia"),
            },
            {**_SMALL, "epochs": 1, "max_length": 1024},
            words=192,
            published="standard-4",
        ),
        Protocol(
            "long-15",
            "the 15-task sequence",
            "choice",
            _tasks(_FIFTEEN),
            {
                "4": _FIFTEEN,
                "5": _of("multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo"),
                "6": _of("yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic"),
            },
            {**_SMALL, "epochs": 1, "max_length": 1024},
            words=192,
            published="long-15",
        ),
        Protocol(
            "cpt",
            "continual pre-training: one domain after the other",
            "text",
            _CORPORA,
            _own_orders(tuple(task.name for task in _CORPORA)),
            {"stage": "cpt", "learning_rate": 2e-4, "max_steps": 36, "max_length": 256},
            words=160,
        ),
        Protocol(
            "ca",
            "continual alignment: one preference after the other",
            "preference",
            _PREFERENCES,
            _own_orders(tuple(task.name for task in _PREFERENCES)),
            {"stage": "ca", "learning_rate": 2e-4, "max_steps": 36, "max_length": 1536, "batch_size": 4},
            words=80,
        ),
    )
}


def protocol(name: str) -> Protocol:
    """Raises ``BadInput`` with the known names."""
    if name not in PROTOCOLS:
        raise BadInput(f"there is no protocol '{name}'; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def orders_of(protocol: Protocol, wanted: list[str]) -> dict[str, tuple[str, ...]]:
    """The wanted orders; none wanted: the first. ``all``: every one."""
    if wanted == ["all"]:
        return dict(protocol.orders)
    for name in wanted:
        if name not in protocol.orders:
            raise BadInput(
                f"{protocol.name} has no order '{name}'; it has {', '.join(protocol.orders)}, or say all"
            )
    return {name: protocol.orders[name] for name in wanted or list(protocol.orders)[:1]}
