"""Spaces: the values among which a search chooses the settings of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Range:
    """A number between two others.

    Args:
        low: the least that a random search draws.
        high: the largest.
        scale: ``"log"`` or ``"linear"``. On a log scale a grid has 1 and 3 of every power of ten, starts in the middle and
            goes on beyond both ends where the best value lies there; on a linear one it has quarters, and ends.
    """

    low: float
    high: float
    scale: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.scale == "log" and self.low <= 0):
            raise ValueError(f"low must be less than high{', and positive' * (self.scale == 'log')}, got {self}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}, {self.scale}"

    def at(self, share: float) -> float:
        """The value at a share of the way, three digits of it."""
        if self.scale == "linear":
            value = self.low + share * (self.high - self.low)
        else:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        return float(f"{value:.3g}")

    def grid(self, place: int) -> float | None:
        """The value so many places from the middle of the grid; none where the grid has ended."""
        if self.scale == "linear":
            return self.at(0.5 + place / 4) if abs(place) <= 2 else None
        middle = round(math.log10(self.low * self.high))
        power, three = divmod(middle + place, 2)
        return float(f"{3 if three else 1}e{power}")


@dataclass(frozen=True)
class Choice:
    """One of some values, in an order in which neighbours are alike."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a list of values must not be empty")

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))

    def at(self, share: float) -> Any:
        """The value at a share of the way."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def grid(self, place: int) -> Any | None:
        """The value so many places from the middle; none beyond the ends."""
        index = len(self.values) // 2 + place
        return self.values[index] if 0 <= index < len(self.values) else None


Dimension = Range | Choice
Space = Mapping[str, Dimension]


def dimension(value: Any) -> Dimension:
    """A dimension as a study file has it: a list of values, or a table of ``low``, ``high`` and perhaps ``scale``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, Range | Choice):
        return value
    if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "scale"}:
        low, high, scale = value["low"], value["high"], value.get("scale", "log")
        if scale in ("log", "linear") and all(_number(one) for one in (low, high)):
            return Range(float(low), float(high), scale)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return Choice(tuple(tuple(one) if isinstance(one, list) else one for one in value))
    raise ValueError(
        f"must be a list of values or {{ low = 1e-4, high = 1e-1, scale = 'log' or 'linear' }}, got {value!r}"
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_LR = Range(1e-4, 1e-1)
_SMALL = Range(1e-5, 1e-2)
_LARGE = Range(1e-3, 1.0)
_EPS = Choice((1e-8, 1e-4, 1e-2))

OUTSIDE: Space = {"lr": _LR}
"""Where the optimizers of other packages are searched, unless a study says otherwise."""

# Step sizes live on the grid of the MBF, TNT and K-BFGS papers; so does damping, where a paper tunes it or ours needs it.
SPACES: Mapping[str, Space] = {
    "mbf": {"lr": _LR, "damping": Range(1e-1, 10.0)},  # relative to the mean eigenvalue of a layer
    "mbf-samples": {"lr": _LR, "damping": Range(1e-1, 10.0)},
    "mbf-input": {"lr": _LR, "damping": Range(1e-1, 10.0)},
    "mbf-window": {"lr": _LR, "damping": Range(1e-1, 10.0)},
    "mbf-published": {"lr": Range(1e-7, 1e-3), "damping": _SMALL},
    "kfac": {"lr": _LARGE, "damping": Range(1e-3, 1.0), "kl_clip": Range(1e-3, 1.0)},
    "ekfac": {"lr": _LARGE, "damping": Range(1e-3, 1.0), "kl_clip": Range(1e-3, 1.0)},
    "eva": {"lr": _LARGE, "damping": Range(1e-3, 1.0), "kl_clip": Range(1e-4, 1e-1)},
    "shampoo": {"lr": _LR, "damping": Range(1e-8, 1e-4)},  # relative to the largest eigenvalue
    "one-sided": {"lr": _LR, "damping": Range(1e-8, 1e-4)},
    "kl-shampoo": {"lr": _LR, "damping": Range(1e-5, 1e-1)},
    "soap": {"lr": _LR},
    "tnt": {"lr": _SMALL, "damping": Range(1e-2, 1.0)},
    "tkfac": {"lr": _LARGE, "damping": _LARGE},
    "ngd": {"lr": Range(1e-4, 1e-1), "damping": _LARGE},
    "foof": {"lr": _LARGE, "damping": Range(1e-2, 10.0)},
    "muon": {"lr": _LR},
    "lion": {"lr": _SMALL},
    "sophia": {"lr": _LR, "rho": Range(1e-3, 1.0)},
    "sophia-h": {"lr": _LR, "gamma": Range(1e-3, 1.0)},
    "adafactor": {"lr": _LARGE},
    "kbfgs": {"lr": Range(1e-2, 10.0), "damping": Range(1e-2, 0.9)},  # below 1
    "kbfgs-l": {"lr": Range(1e-2, 10.0), "damping": Range(1e-2, 0.9)},
    "singd": {"lr": _LR, "damping": Range(1e-4, 1e-1)},
    "psgd": {"lr": _LR},
    "adahessian": {"lr": Range(1e-2, 1.0), "eps": Range(1e-5, 1e-2)},
    "layerwise-sgd": {"largest": Range(1e-2, 10.0), "damping": Range(1e-4, 1e-1)},
    "layerwise-adamw": {"largest": Range(1e-3, 1e-1), "damping": Range(1e-4, 1e-1)},
    "rmsprop": {"lr": _LR},
    "adagrad": {"lr": _LARGE},
    "full-adagrad": {"lr": _LARGE, "damping": Range(1e-3, 1.0)},
    "adam": {"lr": _LR, "eps": _EPS},
    "sgd": {"lr": _LARGE},
}
