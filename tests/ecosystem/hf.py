"""Hugging Face and PEFT folders with a few numbers in them, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=(4, 3)).astype(np.float32) for name in ("a.weight", "b.weight", "c.weight")
    }


def full(
    folder: Path, tensors: dict[str, np.ndarray] | None = None, *, metadata: dict[str, str] | None = None
) -> Path:
    """A plain model in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or weights(), folder / "model.safetensors", metadata=metadata)
    return _described(folder)


def sharded(folder: Path) -> Path:
    """The model of ``full`` in two shards with their index."""
    folder.mkdir(parents=True)
    tensors = weights()
    shards = {
        "model-00001-of-00002.safetensors": ["b.weight"],
        "model-00002-of-00002.safetensors": ["a.weight", "c.weight"],
    }
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    places = {key: name for name, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return _described(folder)


def adapter(
    folder: Path, *, targets: list[str] | None = None, base: str = "/somewhere/base", seed: int = 1
) -> Path:
    """A PEFT adapter as ``save_pretrained`` writes it."""
    folder.mkdir(parents=True)
    save_file(
        {"lora_A": weights(seed)["a.weight"], "lora_B": weights(seed)["b.weight"]},
        folder / "adapter_model.safetensors",
    )
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": targets or ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("made by somebody, at some time")
    return folder


def _described(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    (folder / "README.md").write_text("not part of the model")
    (folder / "training_args.bin").write_bytes(b"pickled")
    return folder
