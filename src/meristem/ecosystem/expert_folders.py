"""The experts of a version, each as a plain PEFT folder that any server loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from meristem import experts_format
from meristem.ecosystem.folders import (
    ADAPTER_CONFIG,
    EXPERTS_CONFIG,
    WEIGHTS,
    with_base,
    write_weights,
)
from meristem.ecosystem.records import Content
from meristem.errors import BadInput
from meristem.store.pack_format import Location
from meristem.store.store import Store

FloatArray = NDArray[np.float32]


def checkout(store: Store, content: Content, folder: Path, base_folder: Path) -> list[str]:
    """Write each expert of ``content`` as a PEFT folder of its own below ``folder``; returns their names.

    None where gates look at tokens, or experts pass through an activation: no plain LoRA is equal to such an expert.
    """
    document = experts_format.parse(
        EXPERTS_CONFIG, store.read_blob(content.files[EXPERTS_CONFIG]), content.tensors
    )
    names = experts_format.folder_names(
        document, {"base", "meristem.json", *content.files, *WEIGHTS.values()}
    )
    if document.gates not in (None, "static"):
        return []
    places = store.locations(set(content.tensors.values()))
    for at, name in enumerate(names):
        (folder / name).mkdir()
        config = json.dumps(experts_format.adapter_config(document.experts[at], document.shared))
        (folder / name / ADAPTER_CONFIG).write_bytes(with_base(config.encode(), base_folder))
        path = folder / name / WEIGHTS["adapter"]
        if document.shared is not None:
            whole = blended(document, at, lambda tensor: _float32(store, places[content.tensors[tensor]]))
            save_file(whole, path, metadata={"format": "pt"})
            continue
        own = experts_format.adapter_tensors(document, at)
        alone = Content(
            kind="adapter",
            base=content.base,
            tensors={peft: content.tensors[ours] for peft, ours in own.items()},
            files={},
        )
        write_weights(store, alone, path, None)
    return names


def blended(
    document: experts_format.Document, expert: int, read: Callable[[str], FloatArray]
) -> dict[str, FloatArray]:
    """One expert and the shared one as a plain LoRA of twice the rank, by PEFT's names: exactly what a layer adds.

    A = [A_0; A_t] and B = [g_s (s_0/s_t) B_0, g_t B_t], [g_s, g_t] the softmax of the expert's static gate in the layer.
    ``read`` gives a tensor of ``experts.safetensors`` in float32. ``BadInput`` for gates that look at tokens.
    """
    entry, shared = document.experts[expert], document.shared
    assert shared is not None
    if document.gates != "static":
        raise BadInput(
            "gates that look at each token are no LoRA: there is no exact adapter of such an expert"
        )
    logits = read(f"gates.{expert}").astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    ratio = shared.scale / entry.scale
    found: dict[str, FloatArray] = {}
    for (g_s, g_t), module in zip(shares, entry.targets, strict=True):
        down, up = ([read(experts_format.factor_name(at, module, f)) for at in (None, expert)] for f in "AB")
        found[experts_format.peft_name(module, "A")] = np.concatenate(down)
        both = np.concatenate([g_s * ratio * up[0], g_t * up[1]], 1)
        found[experts_format.peft_name(module, "B")] = both.astype(np.float32)
    return found


def _float32(store: Store, place: Location) -> FloatArray:
    """A stored tensor, every byte checked against its digest."""
    data, dtype = store.packs.read(place), place.dtype
    if dtype == "BF16":  # the upper half of a float32
        found = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        found = np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype or ""])
    return found.astype(np.float32).reshape(place.shape)
