"""Properties: a name, a sentence that should hold, and a check of it on drawn examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

Example = TypeVar("Example")


class PropertyFailed(AssertionError):
    """A property does not hold; says which, of what, and on which example.

    Attributes:
        property: the name of the property.
        example: in words.
    """

    def __init__(self, property: str, message: str, example: str) -> None:
        self.property, self.example = property, example
        super().__init__(message)


class Broken(AssertionError):
    """What a check raises: in words, what was found instead."""


@dataclass(frozen=True)
class Property(Generic[Example]):
    """One thing that every correct structure does.

    Args:
        name: in a word or two.
        says: what should hold.
        suspect: what is usually wrong where it does not.
        check: raises :class:`Broken` where an example does not have it.
    """

    name: str
    says: str
    suspect: str
    check: Callable[[Example], None]


def hold(
    what: str,
    properties: Iterable[Property[Example]],
    examples: st.SearchStrategy[Example],
    count: int,
) -> None:
    """Check properties on drawn examples, one property after the other; the first that fails is shrunk and told.

    Args:
        what: the name of what is tested.
        properties: in the order in which they build on each other.
        examples: where examples come from; they say in words what they are.
        count: how many for each property.

    Raises:
        PropertyFailed: naming the property and the smallest example found.
    """
    for one in properties:
        last: list[Example] = []
        try:
            _runner(one.check, examples, count, last)()
        except hypothesis.errors.Flaky:
            found = "the same example held once and failed once: the structure keeps something that no state holds"
            raise _failed(what, one, found, last) from None
        except Broken as found:
            raise _failed(what, one, str(found), last) from found.__cause__


def _runner(
    check: Callable[[Example], None], examples: st.SearchStrategy[Example], count: int, last: list[Example]
) -> Callable[[], None]:
    """A hypothesis test of one check, which leaves the example that it tried last in a list."""

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(examples)
    def run(example: Example) -> None:
        last[:] = [example]
        try:
            check(example)
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {error}") from error

    return run


def _failed(what: str, one: Property[Any], found: str, last: list[Any]) -> PropertyFailed:
    example = str(last[0]) if last else "no example"
    return PropertyFailed(
        one.name,
        f"{what} does not have the property {one.name!r}.\n"
        f"  What should hold: {one.says}.\n"
        f"  Found: {found}.\n"
        f"  Example: {example}.\n"
        f"  Usual suspect: {one.suspect}.",
        example,
    )


def equal(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Compare operand by operand, by the norm of what is wanted.

    Args:
        found: ``[n, ...]``.
        wanted: ``[n, ...]``.
        tolerance: largest ‖found - wanted‖ / ‖wanted‖; 0 asks for equal bits.
        what: for the error.

    Raises:
        Broken: with the worst operand and its error.
    """
    if found.shape != wanted.shape:
        raise Broken(f"{what} has shape {list(found.shape)} instead of {list(wanted.shape)}")
    if not bool(torch.isfinite(found).all()):
        raise Broken(f"{what} is not finite")
    if found.numel() == 0:
        return
    errors = (found.double() - wanted.double()).flatten(1).norm(dim=1)
    sizes = wanted.double().flatten(1).norm(dim=1)
    relative = torch.where(sizes > 0, errors / sizes.clamp_min(torch.finfo(torch.float64).tiny), errors)
    worst = int(relative.argmax())
    if float(relative[worst]) > tolerance:
        raise Broken(f"{what} of operand {worst} is off by {float(relative[worst]):.2g}, allowed are {tolerance:.1g}")
