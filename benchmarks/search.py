"""Searches: which settings to try next, as functions of what was tried, so that reading records resumes a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .records import Point, Record
from .space import Choice, Range, Space

Settings = dict[str, Any]
Propose = Callable[[Space, Sequence["Trial"], int], list[Settings]]
Watch = Callable[[Point], bool]


class SearchError(ValueError):
    """A search that cannot be made."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: the values of the space's dimensions.
        score: less is better; infinite after divergence.
        pruned: whether a search gave it up.
        curve: step -> score on the way, where that is known.
    """

    settings: Mapping[str, Any]
    score: float
    pruned: bool = False
    curve: Mapping[int, float] | None = None


def best(trials: Sequence[Trial]) -> Trial | None:
    """The first of the best; none where all diverged or were given up."""
    finished = [trial for trial in trials if not trial.pruned and math.isfinite(trial.score)]
    return min(finished, key=lambda trial: trial.score, default=None)


# -- grid -------------------------------------------------------------------------------------------------------------

Place = tuple[int, ...]


def grid(space: Space, tried: Sequence[Trial], trials: int) -> list[Settings]:
    """The untried place of the grid that is nearest to the best so far, the middle first.

    One rule does three things: a best value at the end of what was tried is followed until it is interior, every dimension
    is looked at (in their order, so let the step size come first), and what is left of the budget is spent near the best.
    """
    if len(tried) >= trials:
        return []
    seen = {place_of(space, trial.settings) for trial in tried}
    leader = best(tried)
    centre = (0,) * len(space) if leader is None else place_of(space, leader.settings)
    for place in _rings(centre, _reach(space, trials)):
        if place not in seen and (settings := _at(space, place)) is not None:
            return [settings]
    return []


def open_ends(space: Space, tried: Sequence[Trial]) -> list[str]:
    """The dimensions in which a neighbour of the best value on the grid was not tried."""
    leader = best(tried)
    if leader is None:
        return list(space)
    centre, seen = place_of(space, leader.settings), {place_of(space, trial.settings) for trial in tried}
    ends = []
    for number, name in enumerate(space):
        beside = [tuple(at + step * (i == number) for i, at in enumerate(centre)) for step in (1, -1)]
        if any(place not in seen and _at(space, place) is not None for place in beside):
            ends.append(name)
    return ends


def extremes(space: Space, tried: Sequence[Trial]) -> list[str]:
    """The ranges of which the best value is the least or the largest that was tried."""
    leader = best(tried)
    if leader is None:
        return list(space)
    values = {name: [trial.settings[name] for trial in tried] for name, one in space.items() if isinstance(one, Range)}
    return [name for name, mine in values.items() if leader.settings[name] in (min(mine), max(mine))]


def place_of(space: Space, settings: Mapping[str, Any]) -> Place:
    """Where settings of a grid lie on it."""
    return tuple(_index(dimension, settings[name]) for name, dimension in space.items())


def _index(dimension: Range | Choice, value: Any) -> int:
    if isinstance(dimension, Choice):
        return dimension.values.index(tuple(value) if isinstance(value, list) else value) - len(dimension.values) // 2
    if dimension.scale == "linear":
        return round(4 * ((value - dimension.low) / (dimension.high - dimension.low) - 0.5))
    return round(2 * math.log10(value)) - round(math.log10(dimension.low * dimension.high))


def _at(space: Space, place: Place) -> Settings | None:
    values = {name: dimension.grid(at) for (name, dimension), at in zip(space.items(), place, strict=True)}
    return None if None in values.values() else values


def _reach(space: Space, trials: int) -> int:
    """How far from the best an untried place can be."""
    return trials + sum(len(one.values) if isinstance(one, Choice) else 4 for one in space.values())


def _rings(centre: Place, reach: int) -> Iterator[Place]:
    """Places by their distance, counted in steps along the axes."""
    yield centre
    for distance in range(1, reach + 1):
        for steps in _steps(len(centre), distance):
            yield tuple(at + step for at, step in zip(centre, steps, strict=True))


def _steps(dimensions: int, distance: int) -> Iterator[Place]:
    if dimensions == 1:
        yield from [(distance,), (-distance,)] if distance else [(0,)]
        return
    for first in range(distance, -1, -1):
        for rest in _steps(dimensions - 1, distance - first):
            yield (first, *rest)
            if first:
                yield (-first, *rest)


# -- quasi-random -----------------------------------------------------------------------------------------------------


def quasi_random(space: Space, tried: Sequence[Trial], trials: int) -> list[Settings]:
    """The points of a scrambled Sobol sequence, the same for every method; each prefix fills the space evenly."""
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(trials).tolist()
    drawn = [{name: one.at(share) for (name, one), share in zip(space.items(), point, strict=True)} for point in points]
    return drawn[len(tried) :]


# -- Optuna -----------------------------------------------------------------------------------------------------------


def optuna_tpe(space: Space, tried: Sequence[Trial], trials: int) -> list[Settings]:
    """What Optuna's tree of Parzen estimators proposes next."""
    if len(tried) >= trials:
        return []
    study = _optuna_study(space, tried)
    asked = study.ask(_distributions(space))
    return [{name: _rounded(one, asked.params[name]) for name, one in space.items()}]


def optuna_watch(space: Space, tried: Sequence[Trial], score: Callable[[Point], float]) -> Watch:
    """Says at every evaluation whether Optuna's median rule gives a run up, given the curves of earlier ones."""
    trial = _optuna_study(space, tried).ask()

    def watch(point: Point) -> bool:
        trial.report(score(point), point.step)
        return bool(trial.should_prune())

    return watch


def _optuna_study(space: Space, tried: Sequence[Trial]) -> Any:
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(seed=len(tried))  # a function of what was tried, however often it was stopped
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner())
    distributions = _distributions(space)
    for trial in tried:
        state = optuna.trial.TrialState.PRUNED if trial.pruned else optuna.trial.TrialState.COMPLETE
        params = {name: tuple(value) if isinstance(value, list) else value for name, value in trial.settings.items()}
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=trial.score,
                params=params,
                distributions=distributions,
                intermediate_values=dict(trial.curve or {}),
            )
        )
    return study


def _distributions(space: Space) -> dict[str, Any]:
    kinds = _optuna().distributions
    return {
        name: kinds.CategoricalDistribution(one.values)
        if isinstance(one, Choice)
        else kinds.FloatDistribution(one.low, one.high, log=one.scale == "log")
        for name, one in space.items()
    }


def _rounded(dimension: Range | Choice, value: Any) -> Any:
    if isinstance(dimension, Choice):
        return value
    return min(max(float(f"{value:.3g}"), dimension.low), dimension.high)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SearchError(
            "search = 'optuna' needs Optuna, which is not installed: pip install 'curvlib[tune]', or take search = 'grid' or "
            "'random'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _once_without_choice(propose: Propose) -> Propose:
    """A space without dimensions has one place: the defaults, which are tried once."""

    def search(space: Space, tried: Sequence[Trial], trials: int) -> list[Settings]:
        if not space:
            return [] if tried else [{}]
        return propose(space, tried, trials)

    return search


SEARCHES: dict[str, Propose] = {
    name: _once_without_choice(propose)
    for name, propose in (("grid", grid), ("random", quasi_random), ("optuna", optuna_tpe))
}

ENDS: dict[str, Callable[[Space, Sequence[Trial]], list[str]]] = {
    "grid": open_ends,
    "random": extremes,
    "optuna": extremes,
}
"""Of every search: the settings whose best value may not be the best there is, since none beyond it was tried."""


# -- scores -----------------------------------------------------------------------------------------------------------


def score_of(tunable: str, better: str) -> Callable[[Point], float]:
    """From an evaluation to what a search minimises.

    Args:
        tunable: ``"train"``, ``"test"`` or ``"metric"``.
        better: ``"lower"`` or ``"higher"``, of the metric.
    """
    sign = -1.0 if tunable == "metric" and better == "higher" else 1.0

    def score(point: Point) -> float:
        value = sign * float(getattr(point, tunable))
        return math.inf if math.isnan(value) else value

    return score


def trial_of(settings: Mapping[str, Any], records: Sequence[Record], score: Callable[[Point], float]) -> Trial:
    """What the runs of all tuning seeds say of some settings: their median, and the worst of their fates."""
    ends = sorted(math.inf if one.status == "diverged" else score(one.points[-1]) for one in records)
    half = len(ends) // 2
    middle = ends[half] if len(ends) % 2 else (ends[half - 1] + ends[half]) / 2
    curve = {point.step: score(point) for point in records[0].points[1:]} if len(records) == 1 else None
    return Trial(settings, middle, any(one.status == "pruned" for one in records), curve)
