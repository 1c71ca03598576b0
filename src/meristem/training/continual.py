"""The one seam between continual-learning methods and Hugging Face trainers.

::

    Trainer = continual(SFTTrainer, methods=[ExperienceReplay(), EWC()])
    trainer = Trainer(model, args=args, train_dataset=rows, processing_class=tokenizer, task="returns")
    trainer.train()
    state = trainer.method_state()      # give it to the next update as method_state=

Order within one optimizer step: each micro-batch runs ``around(forward + loss terms + backward)`` and its loss is
checked; after the last one come penalties with their own backward, gradient hooks, clipping (Hugging Face),
the optimizer, ``weights``.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor

from meristem.errors import BadInput, Clash, NonFiniteLoss
from meristem.methods import clashes
from meristem.methods.base import Context, Method, MethodState, Row, Step, trainable, unused
from meristem.methods.trainers import kind_of
from meristem.training import (
    _checkpoint,
    _hooks,
    _lean,
    _refusals,
    _rows,
    _sharding,
    _tags,
    _upstream,
)
from meristem.training._checkpoint import newest_complete_checkpoint
from meristem.training._seen import seen

__all__ = ["ContinualTrainer", "continual", "newest_complete_checkpoint"]


def continual(
    trainer_cls: type, methods: Sequence[Method], stage: str | None = None, lean: bool = True
) -> type:
    """A subclass of ``trainer_cls`` that trains with ``methods``.

    Its constructor takes all that ``trainer_cls`` takes, and by keyword ``task`` (name of the present task),
    ``method_state`` (what ``method_state()`` of the previous update gave, or the folder that
    ``save_method_state`` wrote), ``history`` (earlier task -> raw rows), ``reference_model`` and ``progress``
    (``(label, total) -> advance``). ``stage`` says which stage a trainer serves that Meristem does not know; without
    it the stages of such a trainer are not checked. Methods that cannot work together or with this trainer are refused by name (``Clash``). The objects given serve
    the first trainer that is made; each later one has its own in ``trainer.methods``, built from the same arguments,
    so that nothing but ``method_state`` goes from update to update (``{}``: begin anew). ``lean`` leaves out work that cannot change the
    trainer's losses (``_lean``), where it can; False keeps to the trainer's own path.
    """
    clashes.refuse(methods, trainer_cls.__name__, kind_of(trainer_cls), stage)
    attached = list(methods)
    told = {"__module__": trainer_cls.__module__, "__doc__": trainer_cls.__doc__}
    namespace = {"methods": attached, "lean": lean, **told}
    return type(f"Continual{trainer_cls.__name__}", (ContinualTrainer, trainer_cls), namespace)


class ContinualTrainer(_upstream.PrivateHooks):
    """What ``continual`` puts before a trainer class. ``interrupted``: set it True to keep ``finish`` from running."""

    methods: Sequence[Method] = ()
    interrupted = False
    lean = True
    model: Any
    processing_class: Any
    data_collator: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        task: str | None = None,
        method_state: Mapping[str, MethodState] | str | Path | None = None,
        history: Mapping[str, Sequence[Row]] | None = None,
        reference_model: Any = None,
        progress: Callable[[str, int], Callable[[int], None]] | None = None,
        **kwargs: Any,
    ) -> None:
        given = _upstream.by_name(type(self), ContinualTrainer, args, kwargs)
        self.methods = [unused(method, told=method_state is not None) for method in self.methods]
        options = given.get("args")
        _refusals.packing(self.methods, options)
        _refusals.best_model(self.methods, options)
        _refusals.model_init(self.methods, given)
        if isinstance(method_state, str | Path):
            method_state = _checkpoint.read_finished(Path(method_state))
        _refusals.shapes(method_state, history)
        for method in self.methods:
            if method_state and method.label in method_state:
                method.load_state_dict(method_state[method.label])
        self.reference_model = reference_model
        self._noted: dict[str, list[Tensor]] = defaultdict(list)
        self._tags: dict[str, list[str]] = {name: [] for name in _tags.KEYS}
        self._hidden: Tensor | None = None
        self.context = Context(
            task=task or "task",
            seed=getattr(options, "seed", 0),
            tokenizer=given.get("processing_class"),
            history={name: list(_rows.with_ids(rows, name)) for name, rows in (history or {}).items()},
            reporter=progress,
        )
        self._prepare_rows(given)
        super().__init__(**given)
        self._attach()

    # ---- construction --------------------------------------------------------------------------------------

    def _prepare_rows(self, arguments: dict[str, Any]) -> None:
        """ids and tasks onto the rows, then each method's ``prepare_data`` in order."""
        given = arguments.get("train_dataset")
        if isinstance(given, Dataset | list | tuple):
            data = _rows.with_ids(given, self.context.task)
            rows: Sequence[Row] = data
            self.context.rows = data
            for method in self.methods:
                if method.overrides("prepare_data"):
                    rows = method.prepare_data(rows, self.context)
            arguments["train_dataset"] = data if rows is data else _rows.dataset(rows)
        else:
            _refusals.streams(self.methods, given)
            self.context.rows = () if given is None else _rows.Stream()
        if isinstance(arguments.get("eval_dataset"), list):
            arguments["eval_dataset"] = _rows.dataset(arguments["eval_dataset"])

    def _attach(self) -> None:
        """The model exists, the optimizer does not: collator, callback, ``prepare_model``."""
        _refusals.gradients(self.methods, self)
        _refusals.sharded(self.methods, self.parameters())
        _refusals.quantized(self.methods, self.parameters())
        _refusals.checkpoints(self, writes=str(self.args.save_strategy) not in ("no", "SaveStrategy.NO"))
        self.not_lean = _lean.report(self) if self.lean else []  # what it cannot leave out, and why
        self.data_collator = _tags.TaggingCollator(self.data_collator)
        if any(m.overrides("weights") for m in self.methods):
            self.add_callback(_hooks.WeightsCallback(self.methods, self.parameters))  # type: ignore[attr-defined]
        context = self.context
        context.tokenizer = self.processing_class
        context.model = self.model
        context.batcher, context.loss_of = self._batches, self._likelihood
        with self._sharded():
            for method in _hooks.replacing_first(self.methods):
                method.prepare_model(self.model, _refusals.declared(method, context))

    def _keep_hidden(self, states: Tensor) -> None:
        self._hidden = states

    def _batches(self, rows: Sequence[Row], batch_size: int) -> Iterator[dict[str, Any]]:
        """Collated batches of raw rows on the model's device; rows whose labels are all masked are left out."""
        if not len(rows):
            return
        device = next(self.model.parameters()).device
        ready = [
            row
            for row in _upstream.tokenized(self, rows)
            if any(label != -100 for label in _rows.labels(row))
        ]
        keep = {"input_ids", "labels", "attention_mask", *_tags.KEYS}
        collate = _upstream.likelihood_collator(self)
        for start in range(0, len(ready), batch_size):
            chunk = [{k: v for k, v in row.items() if k in keep} for row in ready[start : start + batch_size]]
            batch = collate(chunk)
            _tags.pop(batch)
            yield send_to_device(dict(batch), device)

    def _nll(self, batch: Mapping[str, Any], model: Any = None) -> Tensor:
        """Mean negative log-likelihood over the tokens of ``batch`` whose label is not -100.

        logits (batch, length, vocabulary) in fp32, shifted by one against the labels (batch, length).
        """
        if "labels" not in batch:
            raise Clash(
                f"{type(self).__name__} gives no labels: a method asks for the likelihood of its batch"
            )
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
        with seen(self.methods, batch), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            logits = (model if model is not None else self.model)(**inputs, use_cache=False).logits
        if logits.shape[1] != batch["labels"].shape[1]:
            raise Clash("the model puts positions of its own before the rows (prompt tuning): use LoRA")
        labels = batch["labels"][:, 1:].reshape(-1)
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        kept = labels != -100
        return torch.nn.functional.cross_entropy(flat[kept].float(), labels[kept])

    def _likelihood(self, batch: Mapping[str, Any]) -> Tensor:
        """``_nll`` for ``ctx.loss``: differentiable with respect to sharded parameters too."""
        params = self.parameters()
        if not _sharding.sharded(params.values()):
            return self._nll(batch)
        return _sharding.differentiable(lambda: self._nll(batch), params)

    def _sharded(self) -> AbstractContextManager[Any]:
        return _sharding.mixing(self.parameters().values())

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """As the trainer's, and ``finish`` of every method once training has run to its end, on every rank.

        ``resume_from_checkpoint``: a folder, or True for the newest complete one; method state comes back from
        it, and a folder that is not complete is refused.
        """
        self.interrupted = False
        folder = self._resumed(resume_from_checkpoint)
        catches = any(m.overrides("loss") for m in self.methods)
        backbone = _upstream.backbone(self.model)
        with (
            _hooks.hidden_states(backbone, self._keep_hidden) if catches else nullcontext(),
            _lean.uncopied_inputs(self.model) if self.lean else nullcontext(),
        ):
            result = super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)  # type: ignore[misc]
        self._hidden = None
        if not self.interrupted:
            with self._sharded():
                for method in _hooks.served_last(self.methods):
                    method.finish(_refusals.declared(method, self.context))
        return result

    def _resumed(self, wanted: str | Path | bool | None) -> Path | None:
        if wanted is None or wanted is False:
            return None
        _refusals.checkpoints(self, writes=True)
        folder = newest_complete_checkpoint(self.args.output_dir) if wanted is True else Path(wanted)
        if folder is None:
            raise BadInput(
                f"{self.args.output_dir}: no complete checkpoint to resume from; train from the start"
            )
        states = _checkpoint.read(folder)
        if sorted(states) != sorted(m.label for m in self.methods):
            raise BadInput(f"{folder}: written with methods {sorted(states)}; resume with the same ones")
        for method in self.methods:
            method.load_state_dict(states[method.label])
        return folder

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; at the last one of an optimizer step also penalties and gradient hooks."""
        self._tags = _tags.pop(inputs)

        def run() -> Tensor:
            return super(ContinualTrainer, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

        arounds = [m for m in self.methods if m.overrides("around")]
        loss: Tensor = self._around(arounds, run) if arounds else run()
        self._refuse_non_finite(loss)
        if self.accelerator.sync_gradients:
            params = self.parameters()
            with _sharding.mixing(params.values()):
                self._penalize(params)
                for method in self.methods:
                    if method.overrides("gradients"):
                        method.gradients(params)
        return loss

    def _around(self, arounds: list[Method], run: Callable[[], Tensor]) -> Tensor:
        """``around`` of each method, the first outermost, with ``.grad`` empty inside.

        DDP reduces what is in ``.grad`` at the last micro-batch, so what earlier ones left, set aside meanwhile,
        is reduced here. At those earlier ones a method sees its own rank's gradient.
        """
        params = list(self.parameters().values())
        earlier = [(p, p.grad) for p in params]
        for parameter, _ in earlier:
            parameter.grad = None
        for method in reversed(arounds):
            run = partial(method.around, run)
        loss = run()
        reduces = self.accelerator.sync_gradients and not _sharding.sharded(params)
        for parameter, grad in earlier:
            if grad is not None:
                if reduces and self.accelerator.num_processes > 1:
                    grad = self.accelerator.reduce(grad, "mean")
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return loss

    def _penalize(self, params: Mapping[str, Tensor]) -> None:
        """Adds the gradient of every penalty, once per optimizer step, whatever the accumulation."""
        for method in self.methods:
            if not method.overrides("penalty"):
                continue
            value = method.penalty(params)
            if value is None:
                continue
            value = _sharding.whole(value)
            self._refuse_non_finite(value)
            self._noted[f"{method.label}/penalty"].append(value.detach())
            if value.requires_grad:
                _hooks.add_gradient(value, list(params.values()))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, and while training each method's term as a mean over micro-batches."""
        if isinstance(inputs, MutableMapping) and not set(_tags.KEYS.values()).isdisjoint(inputs):
            inputs = copy.copy(inputs)  # a trainer that generates may use the batch again
            self._tags = _tags.pop(inputs)
        self._hidden = None
        given = dict(inputs) if isinstance(inputs, Mapping) else inputs
        lean = _lean.labelled_positions(self.args.device) if self.lean else nullcontext()
        with seen(self.methods, given, self._tags["task"]), lean:
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        adding = [m for m in self.methods if m.overrides("loss")]
        if not adding or not model.training or not torch.is_grad_enabled():
            return result
        counted = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        with seen(self.methods, given, self._tags["task"]):
            extra = self._extra_loss(adding, model, given)
        if _upstream.loss_is_scaled(self, counted):
            extra = extra / _upstream.accumulation_steps(self)
        return (result[0] + extra, *result[1:]) if isinstance(result, tuple) else result + extra

    def _extra_loss(self, adding: list[Method], model: Any, inputs: Any) -> Tensor:
        step = Step(
            model=model,
            inputs=inputs,
            tasks=self._tags["task"],
            ids=self._tags["id"],
            loss_of=partial(self._nll, model=model),
            reference=self._reference,
            hidden=self._hidden,
        )
        total = torch.zeros((), device=self.args.device)
        for method in adding:
            value = method.loss(_refusals.declared(method, step))
            if value is not None:
                _refusals.sharded_term(method, value)
                self._noted[f"{method.label}/loss"].append(value.detach())
                total = total + value
        return total

    def _reference(self) -> AbstractContextManager[Any]:
        if self.reference_model is not None:
            return nullcontext(self.reference_model)
        return _upstream.adapter_off(self.accelerator.unwrap_model(self.model))

    def _refuse_non_finite(self, value: Tensor) -> None:
        number = float(value.detach())
        if not math.isfinite(number):
            raise NonFiniteLoss(number, self.state.global_step, self._tags["id"])

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _tags.pop(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._noted_means())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _noted_means(self) -> dict[str, float]:
        """Each method's term and penalty, as a mean over the logged steps and over all ranks."""
        names = [
            f"{m.label}/{hook}" for m in self.methods for hook in ("loss", "penalty") if m.overrides(hook)
        ]
        if not names:
            return {}
        values = [self._noted.pop(name, []) for name in names]
        sums = torch.tensor(
            [[sum(float(v) for v in noted), len(noted)] for noted in values], device=self.args.device
        )
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        return {
            name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count
        }

    # ---- state ---------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Any]:
        """Trainable parameters by stable name, as the methods see them."""
        return trainable(self.accelerator.unwrap_model(self.model))

    @property
    def sample_ids(self) -> list[str]:
        """Ids of the rows in the latest micro-batch."""
        return list(self._tags["id"])

    def method_state(self) -> dict[str, MethodState]:
        """What each method remembers, by its name; pass it to the next update as ``method_state=``.

        With sharded weights (FSDP2) every rank must call it: full tensors are gathered.
        """
        return {method.label: _sharding.whole_state(method.state_dict()) for method in self.methods}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's; a method that makes more than an adapter (experts) writes what it makes instead.

        ``meristem.engine.load.load`` reads such a folder.
        """
        writer = next((method for method in self.methods if method.content != "adapter"), None)
        if writer is None or _internal_call:  # a checkpoint holds what is in training, and the method's state
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif self.args.should_save:
            writer.save(Path(output_dir or self.args.output_dir))

    def save_method_state(self, folder: str | Path) -> None:
        """Writes ``method_state()`` after ``train()`` to ``folder``, as safetensors and JSON, for the next update.

        Every rank must call it; rank 0 writes.
        """
        self._write_state(Path(folder), finished=True)

    def checkpoint_written(self, folder: Path) -> None:
        self._write_state(folder, finished=False)

    def _write_state(self, folder: Path, finished: bool) -> None:
        gathers = _sharding.sharded(self.parameters().values())
        states = self.method_state() if gathers or self.args.should_save else {}
        self.accelerator.wait_for_everyone()  # the other ranks write their own files into the folder
        if self.args.should_save:
            _checkpoint.write(folder, states, self.state.global_step, finished)
        self.accelerator.wait_for_everyone()
