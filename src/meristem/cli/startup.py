"""A quick start: the garbage collector rests while modules are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Import in here; afterwards the collector runs as before, without what is there by then.

    Nearly all that an import makes stays until the end, and the collector would look through it again and again: a
    quarter of the time of a short command. Frozen, it costs nothing at the end of the process either.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if running:
            gc.enable()
