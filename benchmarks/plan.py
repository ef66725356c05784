"""How long runs train, and how their step sizes fall: said of a whole study, of a problem, of a method, or of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .naming import nearest
from .records import BUDGETS

T = TypeVar("T")
Scope = str | tuple[str, str]
"""What a budget is said of: a problem, the label of a method, or (problem, label)."""


class StudyError(ValueError):
    """A study that cannot be made; names the key, its value, and what is allowed."""


@dataclass(frozen=True)
class Budget:
    """How long a run trains: one of these."""

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise StudyError(f"budget must have one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}")
        for name, value in given.items():
            check_number(f"budget.{name}", value, whole=name != "seconds")


@dataclass(frozen=True)
class Schedule:
    """Step sizes that are multiplied by a factor again and again.

    Args:
        factor: such as 0.1; 1 keeps them constant.
        every: how much training lies between two of these, in the unit of the run's budget: epochs, steps or seconds.
    """

    factor: float
    every: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(f"schedule.{name}", value, whole=False)

    def after(self, spent: float) -> float:
        """What step sizes are multiplied by after so much training."""
        return float(self.factor ** math.floor(spent / self.every + 1e-9))  # 60 epochs are shares of 200, rounded


def closest(everywhere: T | None, table: Mapping[Scope, T], problem: str, label: str) -> T | None:
    """What holds for a method on a problem: what is said of both, else of the method, of the problem, of everything."""
    said = (table[place] for place in ((problem, label), label, problem) if place in table)
    return next(said, everywhere)


def known_keys(where: str, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse what nobody asked for, with the nearest key."""
    for name in given:
        if name not in allowed:
            place = f"in {where}" if where else "of a study"
            raise StudyError(f"unknown key {name!r} {place}{nearest(name, allowed)} there are {', '.join(allowed)}")


def known_places(where: str, given: Mapping[Scope, Any], problems: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse what is said of problems and methods that the study has not."""
    for place in given:
        if isinstance(place, str):
            known_keys(where, {place: None}, [*problems, *labels])
        else:
            known_keys(where, {place[0]: None}, problems)
            known_keys(f"{where}.{place[0]}", {place[1]: None}, labels)


def check_number(name: str, value: Any, whole: bool = True) -> None:
    """Refuse what is no finite number above zero."""
    is_number = isinstance(value, int) if whole else isinstance(value, int | float)
    if isinstance(value, bool) or not is_number or not 0 < value < math.inf:
        wanted = "whole number from 1" if whole else "finite number above 0"
        raise StudyError(f"{name} must be a {wanted}, got {value!r}")


def check_seeds(name: str, seeds: Sequence[Any]) -> None:
    """Refuse what are no different seeds."""
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise StudyError(f"{name} must be different whole numbers from 0, got {list(seeds)!r}")


def check_table(name: str, value: Any, example: str) -> Mapping[str, Any]:
    """Refuse what is no table."""
    if not isinstance(value, Mapping):
        raise StudyError(f"{name} must be a table such as {example}, got {value!r}")
    return value
