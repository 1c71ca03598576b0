"""The folder of a version of kind ``experts``: several LoRAs over one base, and what routes an input to them.

::

    experts.json           schema, the method that made it, the router, the experts in the order they were learned
    experts.safetensors    experts.N.MODULE.lora_A.weight (r, d_in), ...lora_B.weight (d_out, r), vectors.N (width)
                           with a shared expert: shared.MODULE.lora_A.weight and ...lora_B.weight, and of each expert its
                           gates: static gates.N (modules, 2), by token gates.N.MODULE (2, d_in); of whole FFNs one
                           for all experts, gates.FFN (2, width), FFN the name without its last part
                           routed by prototypes: residuals.N (prompts kept, width) beside the mean vectors.N

No ``adapter_config.json`` lies in it: plain PEFT must fail instead of loading one expert as if it were the version.
Read by the store, which knows no torch, and by the methods, which know no store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from meristem.errors import BadInput

CONFIG, WEIGHTS = "experts.json", "experts.safetensors"
_PEFT = "base_model.model."


GateKind = Literal["static", "token", "ffn"]


def _given(fields: dict[str, Any], *optional: str) -> dict[str, Any]:
    """Without the ``optional`` ones that are None: documents stay as they were before there was such a field."""
    return {name: value for name, value in fields.items() if value is not None or name not in optional}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, populate_by_name=True)


class RouterEntry(_Closed):
    """``softmax`` of the similarities over ``temperature``, or ``top-1``: nothing where the best is below ``unknown``.

    With ``metric`` mahalanobis prompts are measured by hidden states after ``depth`` blocks of the base
    (``methods.architecture.prototypes``), and a prompt is unknown outside the ``quantile`` of a task's own.
    """

    mode: Literal["softmax", "top-1"]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    unknown: float | None = None
    metric: Literal["mahalanobis"] | None = None
    depth: Annotated[int, Field(ge=0)] | None = None
    shrinkage: Annotated[float, Field(gt=0, le=1)] | None = None
    quantile: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given(handler(self), "metric", "depth", "shrinkage", "quantile")


class ExpertEntry(_Closed):
    """One LoRA. ``targets``: full names of the linear layers that it changes; ``prompts``: how many its prototype is of.

    ``gate_sum``: what its gates and the shared expert's sum to, where that is not 1.
    """

    task: Annotated[str, Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[int | float, Field(gt=0)]
    targets: Annotated[list[str], Field(min_length=1)]
    prompts: Annotated[int, Field(ge=1)] | None = None
    gate_sum: Annotated[float, Field(gt=0)] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given(handler(self), "prompts", "gate_sum")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by, gates apart."""
        return self.alpha * (self.gate_sum or 1) / self.rank


class Document(_Closed):
    """``experts.json``."""

    schema_: Literal["meristem/experts/v1"] = Field(default="meristem/experts/v1", alias="schema")
    method: str
    router: RouterEntry
    experts: Annotated[list[ExpertEntry], Field(min_length=1)]
    shared: ExpertEntry | None = None
    gates: GateKind | None = None

    def body(self) -> bytes:
        fields = _given(self.model_dump(by_alias=True), "shared", "gates")
        return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()

    def tensors(self) -> set[str]:
        """The names that ``experts.safetensors`` holds."""
        owners: dict[int | None, ExpertEntry] = dict(enumerate(self.experts))
        if self.shared is not None:
            owners[None] = self.shared
        found = {
            factor_name(at, module, factor)
            for at, expert in owners.items()
            for module in expert.targets
            for factor in "AB"
        }
        if self.shared is not None and self.gates == "ffn":
            found |= set(ffn_gate_names(self.shared).values())
        for at, expert in enumerate(self.experts):
            found |= {vector_name(at), *gate_names(at, expert, self.gates)}
            if self.router.metric == "mahalanobis":
                found.add(residuals_name(at))
        return found


def parse(where: object, body: bytes, tensors: Iterable[str] | None = None) -> Document:
    """The document in ``body``. Raises ``BadInput`` naming ``where``, also when ``tensors`` are not those it lists."""
    try:
        fields = json.loads(body)
        found = Document.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(f"{where}: {place}: {first['msg'].lower()}; use a Meristem that reads it") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from error
    tasks = [expert.task for expert in found.experts]
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise BadInput(f"{where}: two experts of task {twice!r}; save the version again")
    if (found.shared is None) != (found.gates is None):
        raise BadInput(f"{where}: a shared expert and gates go together; save the version again")
    if (shared := found.shared) is not None:
        for expert in found.experts:
            if (expert.rank, expert.targets) != (shared.rank, shared.targets):
                raise BadInput(
                    f"{where}: task {expert.task!r} and the shared expert differ in rank or layers"
                )
    if tensors is not None and (odd := found.tensors() ^ set(tensors)):
        raise BadInput(f"{where}: tensor {sorted(odd)[0]} is only there or only in {WEIGHTS}; save it again")
    return found


def factor_name(expert: int | None, module: str, factor: str) -> str:
    """Of the shared expert for None."""
    return f"{'shared' if expert is None else f'experts.{expert}'}.{module}.lora_{factor}.weight"


def gate_names(expert: int, entry: ExpertEntry, kind: GateKind | None) -> list[str]:
    if kind is None or kind == "ffn":
        return []
    return [f"gates.{expert}"] if kind == "static" else [f"gates.{expert}.{m}" for m in entry.targets]


def ffn_gate_names(entry: ExpertEntry) -> dict[str, str]:
    """Full name of each FFN that ``entry`` has linear layers of -> the tensor of its gate."""
    found = dict.fromkeys(module.rpartition(".")[0] for module in entry.targets)
    return {ffn: f"gates.{ffn}" for ffn in found}


def vector_name(expert: int) -> str:
    return f"vectors.{expert}"


def residuals_name(expert: int) -> str:
    return f"residuals.{expert}"


def folder_names(document: Document, taken: Iterable[str] = ()) -> list[str]:
    """A folder for each expert, named after its task as far as a file system takes it, and none of ``taken``."""
    used = {name.casefold() for name in taken}
    names: list[str] = []
    for at, expert in enumerate(document.experts):
        name = re.sub(r"[^\w.+-]+", "-", expert.task).strip("-.")[:64] or "expert"
        while name.casefold() in used:
            name = f"{name}-{at}"
        used.add(name.casefold())
        names.append(name)
    return names


def adapter_config(expert: ExpertEntry, shared: ExpertEntry | None = None) -> dict[str, Any]:
    """One expert as PEFT's ``adapter_config.json``, with the ``shared`` one beside it; the base's place is left open."""
    experts = 1 if shared is None else 2
    alpha = experts * expert.alpha * (expert.gate_sum or 1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": experts * expert.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": expert.targets,
        "inference_mode": True,
    }


def adapter_tensors(document: Document, expert: int) -> dict[str, str]:
    """PEFT's name of each tensor of one expert, and its name in ``experts.safetensors``."""
    return {
        peft_name(module, factor): factor_name(expert, module, factor)
        for module in document.experts[expert].targets
        for factor in "AB"
    }


def peft_name(module: str, factor: str) -> str:
    return f"{_PEFT}{module}.lora_{factor}.weight"
