"""What a study answers, from its records: who reaches targets how fast, what tuning buys, where the time of a step goes."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import curvlib

from .intervals import UNKNOWN, Interval, median_interval
from .methods import origin
from .problems import Problem
from .records import Record
from .sections import Entry, Quantity, Section

_REFERENCES = (curvlib.Adam, curvlib.AdamW, curvlib.MomentumAdam, torch.optim.Adam)
SLOWEST = 4.0  # ratios beyond it do not count in the score of a performance profile


def hit(record: Record, problem: Problem) -> tuple[float, float]:
    """(steps, seconds) at the first evaluation that reaches the problem's target; infinite for a miss."""
    for point in record.points:
        if problem.target.reached(point, problem):
            return point.step, point.seconds
    return math.inf, math.inf


def to_target(entry: Entry, problem: Problem | None) -> tuple[Interval, Interval]:
    """(steps, seconds) to the target: medians over seeds in which misses take part as infinite; unknown without a target."""
    if problem is None:
        return UNKNOWN, UNKNOWN
    hits = [hit(record, problem) for record in entry.records]
    return median_interval([steps for steps, _ in hits]), median_interval([seconds for _, seconds in hits])


def paired(first: Entry, second: Entry) -> Interval:
    """Step time of the first over the second's with the same seed."""
    theirs = {seed: run.step_seconds for seed, run in second.by_seed().items()}
    pairs = [(run.step_seconds, theirs.get(seed, math.nan)) for seed, run in first.by_seed().items()]
    return ratios(pairs)


def ratios(pairs: Iterable[tuple[float, float]]) -> Interval:
    """Of the first over the second; pairs that were not measured are left out."""
    return median_interval([ratio(*pair) for pair in pairs if not any(map(math.isnan, pair))])


def ratio(first: float, second: float) -> float:
    """The first over the second, with the limits that make sense of zero and of infinite values: equal ones give 1."""
    if first == second:
        return 1.0
    if second == 0 or math.isinf(first):
        return math.inf
    return first / second


def reference(section: Section) -> Entry | None:
    """Tuned Adam, whatever it is called here: of several, the entry with the best median of the judged quantity."""
    judged = section.judged
    sign = 1.0 if judged.better == "lower" else -1.0
    mine = [entry for entry in section.entries if _is_adam(entry.method)]
    return min(mine, key=lambda entry: sign * finals(entry, judged).middle, default=None)


def _is_adam(name: str) -> bool:
    made = origin(name)
    return inspect.isclass(made) and issubclass(made, _REFERENCES)


def finals(entry: Entry, quantity: Quantity) -> Interval:
    """The final value over seeds; a run that diverged is worst."""
    return median_interval([quantity.final(record) for record in entry.records])


@dataclass(frozen=True)
class Profile:
    """A performance profile (Dolan & Moré 2002), scored as in AlgoPerf.

    Args:
        ratios: on every problem the cost over the least cost of any method; infinite where the target is missed.
    """

    ratios: tuple[float, ...]

    def share(self, tau: float) -> float:
        """The share of problems that are solved within ``tau`` times the least cost."""
        return sum(one <= tau for one in self.ratios) / len(self.ratios)

    def score(self, limit: float = SLOWEST) -> float:
        """The mean of :meth:`share` over ``[1, limit]``, in closed form."""
        return sum(max(0.0, limit - one) for one in self.ratios) / ((limit - 1) * len(self.ratios))


def profiles(costs: Mapping[str, Sequence[float]]) -> dict[str, Profile]:
    """Profiles of all methods; a problem that nobody solves counts as missed by everybody.

    Args:
        costs: method -> time or steps to the target on every problem, infinite for a miss, in one order of problems.
    """
    least = [min(column) for column in zip(*costs.values(), strict=True)]
    return {
        name: Profile(
            tuple(
                ratio(cost, best) if math.isfinite(cost) else math.inf for cost, best in zip(mine, least, strict=True)
            )
        )
        for name, mine in costs.items()
        if mine
    }


def costs(found: Iterable[Section], against: str) -> dict[str, list[float]]:
    """Entry title -> median steps or seconds to the target in every section that has one; not run counts as a miss."""
    aimed = [section for section in found if section.goal]
    titles = dict.fromkeys(entry.title for section in aimed for entry in section.entries)
    table = {title: [math.inf] * len(aimed) for title in titles}
    for place, section in enumerate(aimed):
        for entry in section.entries:
            steps, seconds = to_target(entry, section.problem)
            table[entry.title][place] = (steps if against == "step" else seconds).middle
    return table


@dataclass(frozen=True)
class Trial:
    """One choice of settings that was tried in tuning.

    Args:
        settings: of the optimizer.
        value: the median over tuning seeds of the judged quantity.
        runs: number of tuning seeds.
        lost: how many of them diverged or were pruned.
    """

    settings: Mapping[str, Any]
    value: float
    runs: int = 1
    lost: int = 0


def trials(section: Section) -> dict[str, list[Trial]]:
    """Method -> its trials, of a section of tuning records.

    Who tunes can always keep the network that training began with, so that no trial is worse than it.
    """
    judged = section.judged
    keep = min if judged.better == "lower" else max
    found: dict[str, list[Trial]] = {}
    for entry in section.entries:
        lost = sum(record.status != "finished" for record in entry.records)
        ends = [keep(judged.final(record), judged.of(record.points[0])) for record in entry.records]
        trial = Trial(entry.records[0].spec.settings, statistics.median(ends), len(ends), lost)
        found.setdefault(entry.method, []).append(trial)
    return found


@dataclass(frozen=True)
class Best:
    """The best of k trials: its expectation and quartiles."""

    expected: float
    low: float
    high: float


def best_of(values: Sequence[float], better: str = "lower") -> list[Best]:
    """The best of k = 1, ..., n of n trials, over all orders in which they could have been made.

    The i-th best value is the best of k with probability C(n - i, k - 1) / C(n, k): exact, with nothing drawn.
    """
    n, sign = len(values), 1.0 if better == "lower" else -1.0
    ordered = sorted(sign * value for value in values)
    found = []
    for k in range(1, n + 1):
        masses = [math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n + 1)]
        weighted = [mass * value for mass, value in zip(masses, ordered, strict=True) if mass]
        ends = sorted(sign * _quantile(ordered, masses, level) for level in (0.25, 0.75))
        found.append(Best(sign * math.fsum(weighted) if all(map(math.isfinite, weighted)) else sign * math.inf, *ends))
    return found


def _quantile(ordered: Sequence[float], masses: Sequence[float], level: float) -> float:
    total = 0.0
    for value, mass in zip(ordered, masses, strict=True):
        total += mass
        if total >= level - 1e-12:
            return value
    return ordered[-1]


def varied(found: Sequence[Trial]) -> list[str]:
    """Settings that trials vary over numbers: the learning rate and the damping first."""
    names = dict.fromkeys(name for trial in found for name in trial.settings)
    several = [name for name in names if len({trial.settings[name] for trial in found if _number(trial, name)}) > 1]
    return sorted(several, key=lambda name: (name != "lr", name != "damping"))


def sensitivity(found: Sequence[Trial], name: str) -> dict[float, list[float]]:
    """Value of a setting, ascending -> what the trials with it ended at; the other settings vary within."""
    table: dict[float, list[float]] = {}
    for trial in found:
        if _number(trial, name):
            table.setdefault(float(trial.settings[name]), []).append(trial.value)
    return dict(sorted(table.items()))


def _number(trial: Trial, name: str) -> bool:
    value = trial.settings.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool)


def breakdown(entry: Entry) -> dict[str, float]:
    """Part of a step -> mean seconds a step, over all runs; the parts add up to the mean time of a step."""
    steps = sum(record.points[-1].step for record in entry.records)
    names = dict.fromkeys(name for record in entry.records for name in record.parts)
    return {name: sum(record.parts.get(name, 0.0) for record in entry.records) / max(1, steps) for name in names}
