"""Meristem: continual learning for large language models, run as a governed release process.

Nothing heavy is imported until it is used: ``import meristem`` loads neither torch nor SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meristem._version import __version__

if TYPE_CHECKING:
    from meristem import methods
    from meristem.evaluation.comparison import compare
    from meristem.evaluation.live import ForgettingCallback
    from meristem.training.continual import continual
    from meristem.workspace import Workspace

__all__ = ["ForgettingCallback", "Workspace", "__version__", "compare", "continual", "methods"]

_HOME = {
    "ForgettingCallback": ("meristem.evaluation.live", "ForgettingCallback"),
    "Workspace": ("meristem.workspace", "Workspace"),
    "compare": ("meristem.evaluation.comparison", "compare"),
    "continual": ("meristem.training.continual", "continual"),
    "methods": ("meristem.methods", None),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'meristem' has no attribute {name!r}")
    module, attribute = _HOME[name]
    loaded = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted(__all__)
