"""How records are grouped: sections of what can be compared, entries of a method and settings, runs that differ in seed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .looks import Dash, Look, looks, variant
from .methods import METHODS, title_of
from .naming import UnknownName, problem
from .problems import PROBLEMS, Problem
from .records import BUDGETS, Point, Record, Spec, counted

Name = Literal["train", "test", "metric"]


@dataclass(frozen=True)
class Quantity:
    """What an evaluation measures.

    Args:
        name: of the field of a point.
        title: for axes and tables.
        better: which direction is better.
    """

    name: Name
    title: str
    better: Literal["lower", "higher"] = "lower"

    @property
    def worst(self) -> float:
        """What a run that diverged counts as."""
        return math.inf if self.better == "lower" else -math.inf

    def of(self, point: Point) -> float:
        """The value of an evaluation; the worst there is where it is NaN."""
        value = float(getattr(point, self.name))
        return self.worst if math.isnan(value) else value

    def final(self, record: Record) -> float:
        """The last value of a run; the worst there is of one that diverged, or was pruned."""
        return self.of(record.points[-1]) if record.status == "finished" else self.worst


@dataclass(frozen=True)
class Entry:
    """Runs that differ in nothing but the seed.

    Args:
        method: its name.
        title: with the settings that tell it from other entries of the method.
        colour: in every figure.
        dash: line style.
        records: the runs, by seed.
    """

    method: str
    title: str
    colour: str
    dash: Dash
    records: tuple[Record, ...]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(record.status == "diverged" for record in self.records)

    def by_seed(self) -> dict[int, Record]:
        """Seed -> run."""
        return {record.spec.seed: record for record in self.records}


@dataclass(frozen=True)
class Section:
    """All that can be compared: runs on one problem, of one budget for every method.

    Args:
        name: of its files.
        title: of the problem, with the budget where methods have several.
        budget: in words; whose it is where methods differ in it.
        problem: its definition, ``None`` where this version does not know it.
        entries: in the order of the method table, then of names.
        quantities: what was measured, in the order of columns.
    """

    name: str
    title: str
    budget: str
    problem: Problem | None
    entries: tuple[Entry, ...]
    quantities: tuple[Quantity, ...]

    @property
    def heading(self) -> str:
        """The title with the budget, once."""
        return self.title if self.title.endswith(self.budget) else f"{self.title}, {self.budget}"

    @property
    def judged(self) -> Quantity:
        """The quantity that tuning looks at."""
        wanted = self.problem.tunable if self.problem is not None else "train"
        return next((one for one in self.quantities if one.name == wanted), self.quantities[0])

    @property
    def goal(self) -> str:
        """The target in words; empty without one."""
        if self.problem is None:
            return ""
        target = self.problem.target
        quantity = next((one for one in self.quantities if one.name == target.of), Quantity(target.of, target.of))
        return f"{quantity.title} {'≤' if quantity.better == 'lower' else '≥'} {target.value:g}"

    @property
    def records(self) -> list[Record]:
        """All runs."""
        return [record for entry in self.entries for record in entry.records]


def sections(records: Sequence[Record], beside: Sequence[Record] = ()) -> list[Section]:
    """Group records; a record that is given twice counts once, and one without any evaluation is left out.

    Args:
        records: to be grouped.
        beside: others on the same page, where a method must have the same colour.
    """
    problems: dict[str, list[Record]] = {}
    for record in {record.spec.key: record for record in records if record.points}.values():
        problems.setdefault(record.spec.problem, []).append(record)
    seen = looks(record.spec.method for record in (*records, *beside))
    made = []
    for name in sorted(problems, key=lambda name: _place(PROBLEMS, name)):
        parts = _comparable(problems[name])
        made += [_section(name, limit, parts[limit], len(parts) > 1, seen) for limit in sorted(parts, key=_natural)]
    return made


def _comparable(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Budget in words -> runs of a problem: all of them, unless a method has several budgets, which are not mixed."""
    limits: dict[str, dict[str, None]] = {}  # method -> its budgets
    for record in records:
        limits.setdefault(record.spec.method, {})[record.spec.budget] = None
    parts: dict[str, list[Record]] = {}
    if any(len(mine) > 1 for mine in limits.values()):
        for record in records:
            parts.setdefault(record.spec.budget, []).append(record)
        return parts
    whose: dict[str, list[str]] = {}
    for method in sorted(limits, key=lambda method: _place(METHODS, method)):
        whose.setdefault(next(iter(limits[method])), []).append(title_of(method))
    told = (f"{limit} ({', '.join(titles)})" if len(whose) > 1 else limit for limit, titles in whose.items())
    return {", ".join(told): list(records)}


def mixed(records: Iterable[Record]) -> tuple[str, str] | None:
    """(problem, method) whose runs differ in settings or budget, so that they are no seeds of one thing; or none."""
    first: dict[tuple[str, str], Spec] = {}
    for record in records:
        spec = record.spec
        other = first.setdefault((spec.problem, spec.method), spec)
        if (settings_key(spec), spec.budget) != (settings_key(other), other.budget):
            return spec.problem, spec.method
    return None


def told(spec: Spec) -> dict[str, Any]:
    """Settings, and the schedule that they go with."""
    if spec.schedule is None:
        return dict(spec.settings)
    factor, every = spec.schedule["factor"], counted(spec.schedule["every"], spec.length[1])
    return {**spec.settings, "schedule": f"× {factor:g} every {every}"}


def settings_key(spec: Spec) -> str:
    """Settings as text: equal for settings that were read from a file and those that were not."""
    return json.dumps(told(spec), sort_keys=True, default=str)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name}={_plain(value)}" for name, value in settings.items())


def band(records: Sequence[Record], quantity: Quantity, against: str, points: int = 80) -> np.ndarray:
    """Curves over seeds, ``[4, points]``: places, least, median and largest values.

    Runs are interpolated on the part of the axis that all of them cover; one that diverged is worst from there on.
    """
    places = [np.array([getattr(point, against) for point in record.points], float) for record in records]
    values = [np.array([quantity.of(point) for point in record.points]) for record in records]
    whole = [place[-1] for place, record in zip(places, records, strict=True) if record.status == "finished"]
    grid = np.linspace(0.0, min(whole) if whole else max(place[-1] for place in places), points)
    lines = np.stack([_line(grid, place, value, quantity) for place, value in zip(places, values, strict=True)])
    return np.stack([grid, lines.min(0), np.median(lines, 0), lines.max(0)])


def _line(grid: np.ndarray, place: np.ndarray, value: np.ndarray, quantity: Quantity) -> np.ndarray:
    # Infinite values are not interpolated: what lies next to one, or after the end of a run, is worst.
    sound = np.isfinite(value)
    if not sound.any():
        return np.full_like(grid, quantity.worst)
    line = np.interp(grid, place[sound], value[sound])
    beside = np.interp(grid, place, (~sound).astype(float)) > 0
    return np.where(beside | (grid > place[-1] * (1 + 1e-12)), quantity.worst, line)


def _section(name: str, limit: str, records: Sequence[Record], several: bool, seen: Mapping[str, Look]) -> Section:
    known = _known(name)
    title = known.title if known is not None else name
    return Section(
        name=re.sub(r"[^\w.-]+", "-", f"{name}-{limit}" if several else name),
        title=f"{title}, {limit}" if several else title,
        budget=limit,
        problem=known,
        entries=_entries(records, seen),
        quantities=_quantities(known, records),
    )


def _known(name: str) -> Problem | None:
    try:
        return problem(name)
    except (UnknownName, ImportError):
        return None


def _quantities(known: Problem | None, records: Sequence[Record]) -> tuple[Quantity, ...]:
    losses = (Quantity("train", "training loss"), Quantity("test", "held-out loss"))
    if all(math.isnan(point.metric) for record in records for point in record.points):
        return losses
    metric = known.metric if known is not None else None
    return (
        *losses,
        Quantity("metric", metric.name, metric.better) if metric else Quantity("metric", "metric", "higher"),
    )


def _entries(records: Sequence[Record], seen: Mapping[str, Look]) -> tuple[Entry, ...]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.spec.method, settings_key(record.spec)), []).append(record)
    made = []
    for method in sorted({method for method, _ in groups}, key=lambda one: _place(METHODS, one)):
        variants = [groups[place] for place in sorted(groups) if place[0] == method]
        differing = _differing([told(run[0].spec) for run in variants])
        for number, runs in enumerate(variants):
            mine = {name: value for name, value in told(runs[0].spec).items() if name in differing}
            title = title_of(method) + (f" ({settings_text(mine) or 'defaults'})" if differing else "")
            look = variant(seen[method], number, len(variants))
            made.append(Entry(method, title, *look, tuple(sorted(runs, key=lambda record: record.spec.seed))))
    return tuple(made)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({json.dumps(one.get(name), default=str) for one in settings}) > 1]


def _place(table: Mapping[str, Any], name: str) -> tuple[int, str]:
    return (list(table).index(name), "") if name in table else (len(table), name)


def _natural(text: str) -> tuple[str, float]:
    amount, _, unit = text.partition(" ")
    known = [name for name in BUDGETS if unit in (name, name.removesuffix("s"))]
    return (known[0], float(amount)) if known else (text, 0.0)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
