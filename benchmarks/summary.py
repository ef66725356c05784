"""Summaries over seeds: what a table shows of each method on a problem."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .methods import METHODS
from .problems import PROBLEMS
from .records import Record

REFERENCE = "adam"


@dataclass(frozen=True)
class Row:
    """One method on one problem; medians over seeds.

    Attributes:
        problem: its name.
        method: its name.
        seeds: number of runs.
        diverged: how many of them diverged.
        train: (median, least, largest) final training loss, running average over batches.
        test: the same of the held-out loss.
        step_ms: median milliseconds of a step.
        relative: step time over the reference method's with the same seed; NaN without it.
        memory: bytes of optimizer state.
        steps_to_target: median steps to the problem's target, infinite where fewer than half of the runs reach it.
        seconds_to_target: the same in seconds of training.
    """

    problem: str
    method: str
    seeds: int
    diverged: int
    train: tuple[float, float, float]
    test: tuple[float, float, float]
    step_ms: float
    relative: float
    memory: int
    steps_to_target: float
    seconds_to_target: float


def summarize(records: Iterable[Record]) -> list[Row]:
    """One row for every method on every problem, in the order of the tables."""
    by_place: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        by_place.setdefault((record.spec.problem, record.spec.method), []).append(record)
    order = [(problem, method) for problem in PROBLEMS for method in METHODS]
    return [_row(by_place[place], by_place.get((place[0], REFERENCE), ())) for place in order if place in by_place]


def mixed(records: Iterable[Record]) -> tuple[str, str] | None:
    """(problem, method) whose runs differ in settings or budget, so that they are no seeds of one thing; or none."""
    first: dict[tuple[str, str], Record] = {}
    for record in records:
        place = (record.spec.problem, record.spec.method)
        other = first.setdefault(place, record).spec
        if (record.spec.settings, record.spec.budget) != (other.settings, other.budget):
            return place
    return None


def _row(records: Sequence[Record], reference: Sequence[Record]) -> Row:
    problem = PROBLEMS[records[0].spec.problem]
    hits = [reached(record, problem.target) for record in records]
    times = {record.spec.seed: record.step_seconds for record in reference}
    ratios = [one.step_seconds / times[one.spec.seed] for one in records if one.spec.seed in times]
    return Row(
        problem=problem.name,
        method=records[0].spec.method,
        seeds=len(records),
        diverged=sum(record.status == "diverged" for record in records),
        train=_spread([_final(record, "train") for record in records]),
        test=_spread([_final(record, "test") for record in records]),
        step_ms=1e3 * statistics.median(record.step_seconds for record in records),
        relative=statistics.median(ratios) if ratios else math.nan,
        memory=max(record.memory for record in records),
        steps_to_target=statistics.median(step for step, _ in hits),
        seconds_to_target=statistics.median(seconds for _, seconds in hits),
    )


def reached(record: Record, target: float) -> tuple[float, float]:
    """(steps, seconds) at the first evaluation whose training loss is at the target; infinite if there is none."""
    for point in record.points:
        if point.train <= target:
            return point.step, point.seconds
    return math.inf, math.inf


def _final(record: Record, split: str) -> float:
    """The last loss; infinite after divergence, so that it counts as worst."""
    value = float(getattr(record.points[-1], split))
    return math.inf if record.status == "diverged" or math.isnan(value) else value


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


HEADINGS = (
    "Method",
    "Seeds",
    "Train loss",
    "Held-out loss",
    "ms/step",
    "× Adam",
    "Memory",
    "Steps to target",
    "Time to target",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, under :data:`HEADINGS`."""
    seeds = str(row.seeds) + (f" ({row.diverged} diverged)" if row.diverged else "")
    missed = "–"
    return (
        METHODS[row.method].title,
        seeds,
        _range(row.train),
        _range(row.test),
        f"{row.step_ms:.1f}",
        missed if math.isnan(row.relative) else f"{row.relative:.2f}",
        _bytes(row.memory),
        missed if math.isinf(row.steps_to_target) else f"{row.steps_to_target:.0f}",
        missed if math.isinf(row.seconds_to_target) else f"{row.seconds_to_target:.2f} s",
    )


def _range(values: tuple[float, float, float]) -> str:
    middle, low, high = ("∞" if math.isinf(value) else f"{value:.3g}" for value in values)
    return f"{middle} ({low} to {high})"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


_COLUMNS = (
    *("problem", "method", "seeds", "diverged", "train_median", "train_min", "train_max"),
    *("test_median", "test_min", "test_max", "step_ms", "relative_to_adam", "memory_bytes"),
    *("steps_to_target", "seconds_to_target"),
)


def as_csv(rows: Iterable[Row]) -> str:
    """All rows, with full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        ends = (row.step_ms, row.relative, row.memory, row.steps_to_target, row.seconds_to_target)
        writer.writerow((row.problem, row.method, row.seeds, row.diverged, *row.train, *row.test, *ends))
    return buffer.getvalue()
