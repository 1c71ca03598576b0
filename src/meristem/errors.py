"""Every error that Meristem raises on purpose, with its exit code.

::

    MeristemError              70  internal error
    ├── BadInput                2  bad usage or bad input: nothing was changed
    │   └── Clash               2  two methods (or a method and a trainer) that cannot work together
    ├── GateFailed              1  a gate failed, or a regression was found
    ├── Inconclusive            3  could not measure enough to say
    ├── StateMoved              4  the state moved under you; look again and repeat
    ├── EnvironmentFailure      5  disk, network or database failed
    ├── TrainingFailed          1  a run stopped itself
    │   └── NonFiniteLoss       1  the loss became NaN or infinite; names step and samples
    ├── Tampered                1  stored bytes, events or pointers do not match their digests
    └── Interrupted           130  stopped by the user; the same command finishes the work

A message is one line: what is wrong, where (``file:line`` for input), and what to do.
"""

from __future__ import annotations

from pathlib import Path


class MeristemError(Exception):
    """Root of the tree. ``exit_code`` is what the command line returns."""

    exit_code = 70


class BadInput(MeristemError):
    """Bad usage or bad input, refused before any compute is spent."""

    exit_code = 2

    @classmethod
    def at(cls, path: str | Path, line: int | None, problem: str) -> BadInput:
        """``BadInput`` whose message starts with ``path:line:`` (or ``path:``)."""
        where = f"{path}:{line}" if line is not None else f"{path}"
        return cls(f"{where}: {problem}")


class Clash(BadInput):
    """Methods that cannot be combined, or a method that cannot work with this trainer."""


class GateFailed(MeristemError):
    exit_code = 1


class Inconclusive(MeristemError):
    exit_code = 3


class StateMoved(MeristemError):
    exit_code = 4


class EnvironmentFailure(MeristemError):
    exit_code = 5


class TrainingFailed(MeristemError):
    exit_code = 1


class NonFiniteLoss(TrainingFailed):
    """The training loss is NaN or infinite.

    ``step`` is the optimizer step (0-based) that was being computed; ``ids`` are the sample ids of the
    micro-batch behind it.
    """

    def __init__(self, value: float, step: int, ids: list[str]):
        self.value, self.step, self.ids = value, step, ids
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        super().__init__(
            f"loss is {value} at step {step} (samples: {shown or 'no ids'}); "
            "the last complete checkpoint is kept: mend the samples or lower the learning rate"
        )


class Tampered(MeristemError):
    exit_code = 1


class Interrupted(MeristemError):
    exit_code = 130
