"""What was trained, as the folder of a version."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from meristem.config import Recipe
from meristem.ecosystem.checkouts import Checkout
from meristem.ecosystem.folders import INDEX, WEIGHTS
from meristem.errors import TrainingFailed
from meristem.store.packs import safetensors_entries
from meristem.training.method_states import torch_dtype


def save(trainer: Any, recipe: Recipe, parent: Checkout, folder: Path) -> Path:
    """The folder in ``folder`` with what ``trainer`` trained from the checkout ``parent``: an adapter or all weights."""
    if recipe.weights == "full":
        save_full(trainer.model, parent.folder, folder / "full")
        return folder / "full"
    adapter = folder / "adapter"
    if writer := next((method for method in trainer.methods if method.content != "adapter"), None):
        writer.save(adapter)
    else:
        trainer.model.save_pretrained(str(adapter), selected_adapters=["default"])  # not stage ca's reference
    if parent.base_folder is not None:
        for path in parent.folder.iterdir():  # the parent's own tokenizer and chat template, if it has them
            if path.suffix != ".safetensors" and not (adapter / path.name).exists():
                shutil.copyfile(path, adapter / path.name)
    return adapter


def save_full(model: Any, parent: Path, folder: Path) -> None:
    """Write ``model``, trained from the checkout ``parent``, to ``folder``; its tensors are rounded in place.

    Each tensor is stored in the dtype that it has in ``parent``, a tied one once. Every other file is the parent's,
    byte for byte: neither the architecture nor the tokenizer was trained. Raises ``TrainingFailed`` for a weight that
    its dtype cannot hold.
    """
    _round(model, {name: kind for name, (kind, *_) in safetensors_entries(parent / WEIGHTS["full"]).items()})
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    model.save_pretrained(str(folder))
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            path.unlink()
    for path in parent.iterdir():
        if path.name != WEIGHTS["full"]:
            shutil.copyfile(path, folder / path.name)


def _round(model: Any, stored: dict[str, str]) -> None:
    """Every tensor to its stored dtype; to the commonest one where the model has another name for it."""
    ((commonest, _),) = Counter(stored.values()).most_common(1)
    values = model.state_dict(keep_vars=True)
    rounded: set[int] = set()  # a tied tensor has two names, of which one is stored
    for name in sorted(values, key=lambda name: name not in stored):
        value = values[name]
        if id(value) in rounded or not value.is_floating_point():
            continue
        value.data = value.data.to(torch_dtype(stored.get(name, commonest)))
        rounded.add(id(value))
        if not bool(value.isfinite().all()):
            raise TrainingFailed(
                f"weights {name} grew beyond what {value.dtype} can hold; lower the learning rate"
            )
