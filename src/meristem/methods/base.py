"""What a continual-learning method is: a :class:`Method` and the two things the seam hands to it.

Importing this module loads no torch: names and descriptions of methods can be listed on a small machine.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict

from meristem.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

Row = dict[str, Any]
Batch = dict[str, Any]
Params = Mapping[str, "nn.Parameter"]

HOOKS = (
    "prepare_data",
    "prepare_model",
    "batch",
    "loss",
    "penalty",
    "gradients",
    "weights",
    "around",
    "finish",
)


class MethodState(TypedDict):
    """What a method remembers between updates: tensors (saved as safetensors) and JSON."""

    tensors: dict[str, Tensor]
    json: dict[str, Any]


class Method:
    """One continual-learning technique; every hook is optional.

    A subclass says in its docstring: the formula with shapes, the paper, what it claims, and what state it
    keeps and how that grows with the number of tasks.
    """

    name: ClassVar[str] = ""
    """The name it is registered and reported under."""
    claims: ClassVar[tuple[str, ...]] = ()
    """What the tests must show, e.g. ``("less-forgetting",)``."""
    stages: ClassVar[frozenset[str]] = frozenset({"cpt", "cit", "ca", "rl"})
    """The training stages it works in."""
    columns: ClassVar[frozenset[str]] = frozenset()
    """Row fields it needs after collation, out of ``{"id", "task"}``."""
    needs_before: ClassVar[bool] = False
    """Whether ``weights`` wants a copy of the parameters from before the optimizer step."""
    replaces_architecture: ClassVar[bool] = False
    """Whether ``prepare_model`` rebuilds the network; two such methods clash."""
    fresh_adapter: ClassVar[bool] = False
    """Whether an update trains a fresh LoRA on the base instead of going on with the version's adapter."""
    weight_state: ClassVar[bool] = False
    """Whether its state describes the weights in training one by one, and is of no use with other ones: it goes with no
    method that has a fresh adapter or rebuilds the network, and after an update with one it starts anew."""
    serves_other_weights: ClassVar[bool] = False
    """Whether the version serves other weights than those in training. Whatever the order of the list, its
    ``prepare_model`` comes before that of other methods, so that they find the weights in training, and its ``weights``
    and ``finish`` after theirs."""
    content: ClassVar[Literal["adapter", "experts"]] = "adapter"
    """The kind of version that it makes; other than ``adapter``, ``save`` writes it, and only it continues one."""

    # What helps to choose; tests hold each of them against what the method does.
    alone: ClassVar[bool] = False
    """Whether it is a baseline that goes with no other method."""
    old_data: ClassVar[Literal["none", "first", "sample", "all"]] = "none"
    """Rows of earlier tasks that it reads: none; all of them once, where there is no saved state; a sample that
    it keeps in its state; all of them in every update."""
    task_id: ClassVar[Literal["none", "training", "inference"]] = "none"
    """Where it has to be told which task a row is of; an update counts as one task without a name too."""
    weight_copies: ClassVar[int] = 0
    """Copies of the trained weights that it holds while training, at most, rounded up; what ``grows`` apart."""
    grows: ClassVar[str] = ""
    """What every task adds to its state or to the adapter; empty when both keep their size."""
    sharded: ClassVar[bool] = True
    """Whether it works on sharded weights (FSDP2)."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What only some trainers have, out of ``{"likelihood", "next-token"}``: rows as batches of tokens and labels,
    a language-model head over a completion."""

    _used = False  # by a trainer
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        method = super().__new__(cls)
        method._arguments = _captured(cls, args, kwargs)
        return method

    @property
    def label(self) -> str:
        """The registered name, or the class name of an unregistered method."""
        return self.name or type(self).__name__

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments it was built from, defaults included: ``build(name, arguments())`` rebuilds it."""
        return copy.deepcopy(self._arguments)

    @classmethod
    def overrides(cls, hook: str) -> bool:
        """Whether this class has its own version of ``hook``."""
        return getattr(cls, hook) is not getattr(Method, hook)

    def prepare_data(self, rows: Sequence[Row], ctx: Context) -> Sequence[Row]:
        """Raw rows in, raw rows out, before the trainer is built: mix replay, rewrite, order."""
        return rows

    def prepare_model(self, model: Any, ctx: Context) -> None:
        """PEFT is applied, model and tokenizer are ready, the optimizer does not exist yet."""

    def batch(self, inputs: Batch) -> AbstractContextManager[Any]:
        """Entered around each forward on a labelled batch: the trainer's, evaluation's and that of ``ctx.loss``.

        ``inputs["tasks"]``: the task of each row, empty where that is not known.
        """
        return nullcontext()

    def loss(self, step: Step) -> Tensor | None:
        """An extra loss term for this micro-batch, as a mean; the seam scales it for accumulation."""
        return None

    def penalty(self, params: Params) -> Tensor | None:
        """A scalar of the trainable parameters, once per optimizer step with its own backward."""
        return None

    def gradients(self, params: Params) -> None:
        """Edit ``param.grad`` in place: accumulated and reduced, penalties included, not yet clipped."""

    def weights(self, params: Params, before: Mapping[str, Tensor] | None) -> None:
        """Edit the parameters in place after the optimizer step (called under ``no_grad``)."""

    def around(self, run: Callable[[], Tensor]) -> Tensor:
        """Wraps forward and backward of one micro-batch; ``run()`` returns its detached loss.

        ``param.grad`` is empty on entry and the method must leave it holding this micro-batch's gradient; the
        seam adds what earlier micro-batches accumulated. ``run`` may be called more than once.
        """
        return run()

    def finish(self, ctx: Context) -> None:
        """After a completed training: Fisher, bases, exemplars, prototypes."""

    def state_dict(self) -> MethodState:
        """The state as it is now; must not alias tensors that training goes on changing."""
        return {"tensors": {}, "json": {}}

    def load_state_dict(self, state: MethodState) -> None:
        """Restores what ``state_dict`` gave."""

    def save(self, folder: Path) -> None:
        """After ``finish``: writes the version into ``folder``, if its ``content`` is more than one adapter."""
        raise NotImplementedError(f"{self.label} makes a version of kind {self.content}, which it must write")


@dataclass
class Context:
    """Given to ``prepare_data``, ``prepare_model`` and ``finish``.

    ``rows`` are the raw rows of the present task as given, before any method mixed others in. ``history`` maps
    earlier tasks of the lineage to the raw rows of them that are still available; it may be empty. ``model``
    is None in ``prepare_data``.
    """

    task: str
    seed: int = 0
    tokenizer: Any = None
    history: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    model: Any = None
    batcher: Callable[[Sequence[Row], int], Iterator[Batch]] | None = None
    loss_of: Callable[[Batch], Tensor] | None = None
    reporter: Callable[[str, int], Callable[[int], None]] | None = None

    def batches(
        self,
        rows: Sequence[Row] | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        seed: int | None = None,
    ) -> Iterator[Batch]:
        """Collated tokenized batches of ``rows`` (default: the present task's own rows), on the model's device.

        With ``limit`` a random sample of that many rows is taken, the same one for the same ``seed`` (default:
        the run's). Over-long rows that tokenization drops give no batch.
        """
        if self.batcher is None:
            raise BadInput("ctx.batches() needs a model and a tokenizer: call it from prepare_model on")
        rows = self.rows if rows is None else rows
        return self.batcher(sample(rows, limit, self.seed if seed is None else seed), batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood over the batch's completion tokens, differentiable."""
        if self.loss_of is None:
            raise BadInput("ctx.loss() needs a model: call it from prepare_model on")
        return self.loss_of(batch)

    def progress(self, label: str, total: int) -> Callable[[int], None]:
        """Announces ``total`` units of work; the returned function is called with each number done."""
        return self.reporter(label, total) if self.reporter is not None else (lambda done: None)


@dataclass
class Step:
    """One micro-batch, given to ``loss``. ``model`` is the one under training, adapters on.

    ``hidden`` are the last hidden states ``(batch, length, width)`` of the trainer's own forward with their
    gradient, or None when that forward ran without one. ``reference()`` is a context manager that gives the
    same model with its adapter off, or the reference model of the run.
    """

    model: Any
    inputs: Batch
    tasks: list[str]
    ids: list[str]
    loss_of: Callable[[Batch], Tensor]
    reference: Callable[[], AbstractContextManager[Any]]
    hidden: Tensor | None = None


def sample(rows: Sequence[Row], limit: int | None, seed: int) -> Sequence[Row]:
    """``limit`` rows without replacement, in their own order; all of them when there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, free of the prefixes that DDP and ``torch.compile`` add."""
    return {
        name.removeprefix("module.").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def unused(method: Method, told: bool) -> Method:
    """``method`` for the first trainer that asks for it, else one built alike: a used one holds an update's state.

    ``BadInput`` where nobody ``told`` whether that state is to be gone on with or not.
    """
    if method._used:
        used, method = method, type(method)(**method.arguments())
        left, fresh = used.state_dict(), method.state_dict()
        if not told and (left["tensors"].keys(), left["json"]) != (fresh["tensors"].keys(), fresh["json"]):
            kept = ", ".join([*left["tensors"], *left["json"]][:3])
            raise BadInput(
                f"method {used.label} remembers an earlier update ({kept}): give method_state= of that update to go on "
                "from it, or method_state={} to begin anew"
            )
    method._used = True
    return method


def _captured(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``cls(*args, **kwargs)`` with defaults; {} when they do not bind."""
    initializer: Any = next(vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base))
    if initializer is object.__init__:
        return {}
    signature = inspect.signature(initializer)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        return {}  # __init__ raises the same error in a moment; copy.copy() fills the attribute later
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(bound.arguments[parameter.name])
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[parameter.name] = bound.arguments[parameter.name]
    return copy.deepcopy(found)
