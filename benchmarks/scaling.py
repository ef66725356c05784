"""How much longer tuned Adam would need: inside its curve by interpolation, beyond it by the power law fitted to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .sections import Entry, Quantity, band

_REACH = 10.0  # times the measured curve, beyond which a fit is not believed
_SETTLED = 0.1  # the share of the curve that is left out of the fit
_POWERS = np.geomspace(0.02, 8, 400)
_FEWEST = 8


@dataclass(frozen=True)
class PowerLaw:
    """``L(D) = a D^-b + c``.

    Args:
        a: scale.
        b: power.
        c: what more training does not remove.
        error: root mean square of the relative errors of the fit.
    """

    a: float
    b: float
    c: float
    error: float

    def place(self, value: float) -> float:
        """The D at which the law has a value; infinite where it never has."""
        return float((self.a / (value - self.c)) ** (1 / self.b)) if value > self.c else math.inf


def fit(places: np.ndarray, values: np.ndarray) -> PowerLaw | None:
    """Least relative squares with a > 0 and c >= 0; ``None`` for a curve that is too short or does not fall.

    The scale and the rest are linear for a given power, which is searched over a grid and then between its neighbours.
    """
    if len(places) < _FEWEST or (places <= 0).any() or (values <= 0).any() or values.min() == values.max():
        return None
    unit = float(places[-1])
    best = _laws(places / unit, values, _POWERS)
    for width in (0.03, 3e-3, 3e-4, 3e-5, 3e-6):
        closer = _laws(places / unit, values, best.b * np.geomspace(1 - width, 1 + width, 41))
        best = min(best, closer, key=lambda law: law.error)
    return PowerLaw(best.a * unit**best.b, best.b, best.c, best.error) if best.a > 0 else None


def _laws(places: np.ndarray, values: np.ndarray, powers: np.ndarray) -> PowerLaw:
    """The best of the laws with given powers."""
    shape = places[None] ** -powers[:, None] / values  # relative to the values, whose own column is 1 / values
    rest = np.broadcast_to(1 / values, shape.shape)
    aa, ac, cc, a1, c1 = (
        (x * y).sum(1) for x, y in ((shape, shape), (shape, rest), (rest, rest), (shape, 1), (rest, 1))
    )
    determinant = aa * cc - ac**2
    safe = np.where(determinant > 0, determinant, 1.0)
    a, c = (cc * a1 - ac * c1) / safe, (aa * c1 - ac * a1) / safe
    bound = (determinant <= 0) | (c < 0)
    a, c = np.where(bound, a1 / aa, a), np.where(bound, 0.0, c)
    errors = np.sqrt(((a[:, None] * shape + c[:, None] * rest - 1) ** 2).mean(1))
    errors = np.where(a > 0, errors, np.inf)
    one = int(errors.argmin())
    return PowerLaw(float(a[one]), float(powers[one]), float(c[one]), float(errors[one]))


@dataclass(frozen=True)
class Longer:
    """Adam's time or steps to where a method ends, over the method's.

    Args:
        factor: of them; NaN where there is nothing to say.
        how: ``"measured"`` inside Adam's curve, ``"fit"`` beyond it, ``"more than"`` where the fit does not reach.
    """

    factor: float
    how: Literal["measured", "fit", "more than"]

    @property
    def text(self) -> str:
        """For tables."""
        if math.isnan(self.factor):
            return "–"
        return f"{'> ' if self.how == 'more than' else ''}{self.factor:.2g}×{' (fit)' if self.how == 'fit' else ''}"


UNKNOWN = Longer(math.nan, "measured")


def longer(adam: Entry, other: Entry, quantity: Quantity, against: str) -> Longer:
    """How much longer tuned Adam would need to where another entry ends, by medians over seeds.

    Args:
        adam: the reference, tuned as well as the other.
        other: to be compared.
        quantity: a loss.
        against: ``"step"`` or ``"seconds"``.
    """
    places, _, values, _ = band(adam.records, quantity, against, 400)
    ends, _, theirs, _ = band(other.records, quantity, against, 400)
    values = np.minimum.accumulate(values)
    reached = float(theirs[-1])
    if not math.isfinite(reached) or not np.isfinite(values).any() or ends[-1] <= 0:
        return UNKNOWN
    return at(places, values, reached, float(ends[-1]))


def at(places: np.ndarray, values: np.ndarray, reached: float, spent: float) -> Longer:
    """Where a falling curve has the value ``reached``, over ``spent``."""
    if reached >= values[-1]:
        after = int(np.argmax(values <= reached))
        if after == 0:
            return Longer(0.0, "measured")
        share = (values[after - 1] - reached) / (values[after - 1] - values[after])
        place = (
            places[after - 1] + share * (places[after] - places[after - 1]) if math.isfinite(share) else places[after]
        )
        return Longer(float(place) / spent, "measured")
    settled = (places >= _SETTLED * places[-1]) & np.isfinite(values)
    law = fit(places[settled], values[settled])
    end = float(places[-1])
    if law is None:
        return Longer(end / spent, "more than")
    place = law.place(reached)
    if place > _REACH * end:
        return Longer(_REACH * end / spent, "more than")
    return Longer(max(place, end) / spent, "fit")
