"""Looks: a colour and a line style for every method of a report, so that no two can be taken for each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import dist

from matplotlib.colors import to_hex, to_rgb

from .methods import METHODS, named

Dash = str | tuple[int, tuple[float, ...]]
Look = tuple[str, Dash]

_ALIKE = 0.15  # between red, green and blue of 0 to 1: colours that are closer cannot be told apart in a thin line
_DASHES: Sequence[Dash] = ("-", "--", ":", "-.")
# Optimizers from elsewhere have line styles that no method of the library has.
_OUTSIDE: Sequence[Look] = [
    (colour, dash)
    for dash in ((0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (9, 2)), (0, (2, 2, 6, 2)))
    for colour in ("#7F7F7F", "#1B9E77", "#7570B3", "#A6761D", "#E7298A", "#1F78B4", "#66A61E", "#B2182B", "#4D4D4D")
]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of every method of a report: its own, unless another one has its colour.

    While there are colours, no two are alike; then line styles tell methods of one colour apart.
    """
    roster = list(METHODS)
    order = sorted(set(names), key=lambda name: (roster.index(name) if name in METHODS else len(roster), name))
    found: dict[str, Look] = {}
    for name in order:
        if (own := named(name)) is not None and _is_free(own.colour, found):
            found[name] = own.colour, own.dash
    for name in order:
        if name not in found:
            wishes = list(_wishes(name))
            free = (look for look in wishes if _is_free(look[0], found))
            unlike = (look for look in wishes if look not in found.values())
            found[name] = next(free, None) or next(unlike, wishes[0])
    return {name: found[name] for name in order}


def _is_free(colour: str, found: Mapping[str, Look]) -> bool:
    return all(dist(to_rgb(colour), to_rgb(taken)) > _ALIKE for taken, _ in found.values())


def _wishes(name: str) -> Iterator[Look]:
    """Looks that a method may have, the best first: its line style in any colour, those of outside ones, any."""
    everybody = [one.colour for one in METHODS.values()]
    if (own := named(name)) is not None:
        yield from ((colour, own.dash) for colour in (own.colour, *(colour for colour, _ in _OUTSIDE), *everybody))
    yield from _OUTSIDE
    yield from ((colour, dash) for dash in (_OUTSIDE[0][1], *_DASHES) for colour in everybody)


def variant(look: Look, number: int, count: int) -> Look:
    """The look of a method's n-th entry: the method's own, then paler and in other line styles."""
    if number == 0:
        return look
    paler = 0.6 * number / count
    red, green, blue = (paler + (1 - paler) * one for one in to_rgb(look[0]))
    return to_hex((red, green, blue)), _DASHES[number % len(_DASHES)]
