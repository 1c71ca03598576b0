"""Method state as an asset of the version it came with: tensors in packs, JSON as a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meristem.config import Recipe
from meristem.ecosystem.records import Asset
from meristem.methods import clashes
from meristem.methods.registry import available, load
from meristem.store.canonical import canonical, parse
from meristem.store.packs import Blob
from meristem.store.store import Store

if TYPE_CHECKING:
    import torch

    from meristem.methods.base import MethodState

_JSON = "state.json"


def encode(name: str, states: dict[str, MethodState]) -> tuple[Asset, list[Blob]]:
    """The asset and blobs that hold ``{method name: state}``; tensors are named ``method/tensor``."""
    tensors = {
        f"{method}/{key}": _blob(tensor)
        for method, state in sorted(states.items())
        for key, tensor in sorted(state["tensors"].items())
    }
    body = Blob.file(canonical({method: state["json"] for method, state in states.items()}))
    asset = Asset(
        kind="method-state",
        name=name,
        files={_JSON: body.digest},
        tensors={key: blob.digest for key, blob in tensors.items()},
        facts={"methods": sorted(states)},
    )
    return asset, [*tensors.values(), body]


def decode(store: Store, asset: Asset) -> dict[str, MethodState]:
    """The states of ``asset``, every byte checked against its digest."""
    described: dict[str, dict[str, Any]] = parse(store.read_blob(asset.files[_JSON]))
    states: dict[str, MethodState] = {
        method: {"tensors": {}, "json": body} for method, body in described.items()
    }
    locations = store.locations(set(asset.tensors.values()))
    for key, digest in asset.tensors.items():
        method, _, name = key.partition("/")
        location = locations[digest]
        states[method]["tensors"][name] = _tensor(
            store.packs.read(location), location.dtype or "", location.shape
        )
    return states


def still_fitting(states: Mapping[str, MethodState], recipe: Recipe, adapter: bool) -> dict[str, MethodState]:
    """Of the ``states`` of a version those that an update with ``recipe`` can go on with, or carry over.

    Others describe weights that it does not train: it has a fresh adapter, because a method asks for one or the
    version has none (``adapter``), or a method changes the adapter's shape. Such a method's own state stays.
    """
    methods = [load(method.name) for method in recipe.methods]
    fresh = any(method.fresh_adapter for method in methods) or (recipe.weights == "lora" and not adapter)
    reshaped = any(clashes.trains_other_weights(method) for method in methods)
    own = {method.name for method in methods}
    return {
        name: state
        for name, state in states.items()
        if not (fresh or (reshaped and name not in own)) or not _of_weights(name)
    }


def _of_weights(name: str) -> bool:
    """False too for a method that is no longer installed: what it remembers is kept."""
    return name in available() and load(name).weight_state


def _blob(tensor: torch.Tensor) -> Blob:
    import torch

    flat = tensor.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Blob.tensor(_names()[flat.dtype], tuple(flat.shape), data)


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch_dtype(dtype)).reshape(shape)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for the ``name`` that safetensors has for it."""
    found: torch.dtype = {name: kind for kind, name in _names().items()}[name]
    return found


def _names() -> dict[Any, str]:
    import torch

    return {
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
