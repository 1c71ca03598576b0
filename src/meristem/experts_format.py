"""The folder of a version of kind ``experts``: several LoRAs over one base, and what routes an input to them.

::

    experts.json           schema, the method that made it, the router, the experts in the order they were learned
    experts.safetensors    experts.N.MODULE.lora_A.weight (r, d_in), ...lora_B.weight (d_out, r), vectors.N (width)

No ``adapter_config.json`` lies in it: plain PEFT must fail instead of loading one expert as if it were the version.
Read by the store, which knows no torch, and by the methods, which know no store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meristem.errors import BadInput

CONFIG, WEIGHTS = "experts.json", "experts.safetensors"
_PEFT = "base_model.model."


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, populate_by_name=True)


class RouterEntry(_Closed):
    """``softmax`` of the similarities over ``temperature``, or ``top-1``: nothing where the best is below ``unknown``."""

    mode: Literal["softmax", "top-1"]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    unknown: float | None = None


class ExpertEntry(_Closed):
    """One LoRA. ``targets``: full names of the linear layers that it changes."""

    task: Annotated[str, Field(min_length=1)]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[int | float, Field(gt=0)]
    targets: Annotated[list[str], Field(min_length=1)]


class Document(_Closed):
    """``experts.json``."""

    schema_: Literal["meristem/experts/v1"] = Field(default="meristem/experts/v1", alias="schema")
    method: str
    router: RouterEntry
    experts: Annotated[list[ExpertEntry], Field(min_length=1)]

    def body(self) -> bytes:
        return (json.dumps(self.model_dump(by_alias=True), indent=1, ensure_ascii=False) + "\n").encode()

    def tensors(self) -> set[str]:
        """The names that ``experts.safetensors`` holds."""
        factors = {
            factor_name(at, module, factor)
            for at, expert in enumerate(self.experts)
            for module in expert.targets
            for factor in "AB"
        }
        return factors | {vector_name(at) for at in range(len(self.experts))}


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
    if tensors is not None and (odd := found.tensors() ^ set(tensors)):
        raise BadInput(f"{where}: tensor {sorted(odd)[0]} is only there or only in {WEIGHTS}; save it again")
    return found


def factor_name(expert: int, module: str, factor: str) -> str:
    return f"experts.{expert}.{module}.lora_{factor}.weight"


def vector_name(expert: int) -> str:
    return f"vectors.{expert}"


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


def adapter_config(expert: ExpertEntry) -> dict[str, Any]:
    """One expert as PEFT's ``adapter_config.json``; the base's place is left open."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": expert.rank,
        "lora_alpha": expert.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": expert.targets,
        "inference_mode": True,
    }


def adapter_tensors(document: Document, expert: int) -> dict[str, str]:
    """PEFT's name of each tensor of one expert, and its name in ``experts.safetensors``."""
    return {
        f"{_PEFT}{module}.lora_{factor}.weight": factor_name(expert, module, factor)
        for module in document.experts[expert].targets
        for factor in "AB"
    }
