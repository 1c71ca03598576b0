"""How scores of each unit are written for people. Inside, a higher score is always better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """``sign`` -1: people read the quantity the other way round (bits per byte: fewer is better)."""

    unit: str | None
    words: str  # what a score is
    short: str  # after a number: "%", "bits/byte"
    sign: int = 1

    @property
    def is_share(self) -> bool:
        return self.unit is None

    def score(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.is_share else f"{self.sign * value:.4f}"

    def plain(self, value: float) -> str:
        """For a terminal: a share as a number from 0 to 1, another quantity with its unit."""
        return f"{value:.3f}" if self.is_share else f"{self.sign * value:.4f} {self.short}"

    def difference(self, value: float) -> str:
        """Signed, with a real minus sign, without the unit: points for shares."""
        shown = f"{100 * value:+.1f}" if self.is_share else f"{self.sign * value:+.4f}"
        return shown.replace("-", "−")

    @property
    def difference_unit(self) -> str:
        return "points" if self.is_share else self.short


_SCALES = {
    None: Scale(None, "share of items right; higher is better", "%"),
    "bits_per_byte": Scale("bits_per_byte", "bits per byte of text; lower is better", "bits per byte", -1),
    "nats": Scale("nats", "log-probability margin in nats; higher is better", "nats"),
}


def scale(unit: str | None) -> Scale:
    return _SCALES.get(unit) or Scale(unit, f"score in {unit}; higher is better", str(unit))
