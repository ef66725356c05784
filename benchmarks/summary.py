"""What tables show of each entry of a section, and everything as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import scaling
from .answers import breakdown, finals, hit, paired, reference, to_target
from .intervals import UNKNOWN, Interval, median_interval
from .methods import title_of
from .page import Cell
from .records import Record, counted
from .scaling import Longer
from .sections import Entry, Quantity, Section, settings_key, settings_text, told
from .study import Chosen


@dataclass(frozen=True)
class Row:
    """One entry of a section; medians over seeds with their intervals.

    Attributes:
        section: what it belongs to.
        entry: the runs.
        finals: for every quantity of the section.
        steps: to the target, with misses as infinite.
        seconds: to the target.
        longer: how much more time tuned Adam would need to where this ends.
        longer_steps: the same in steps.
        step_seconds: of a step.
        relative: step time over tuned Adam's with the same seed.
        memory: bytes of optimizer state.
        peak: bytes of the process or GPU at most; 0 where it was not measured.
    """

    section: Section
    entry: Entry
    finals: tuple[Interval, ...]
    steps: Interval
    seconds: Interval
    longer: Longer
    longer_steps: Longer
    step_seconds: Interval
    relative: Interval
    memory: int
    peak: int


def summarize(section: Section) -> list[Row]:
    """One row for every entry, in the order of the section."""
    adam = reference(section)
    return [_row(section, entry, adam) for entry in section.entries]


def _row(section: Section, entry: Entry, adam: Entry | None) -> Row:
    steps, seconds = to_target(entry, section.problem)
    # A metric follows no power law: where tuning looks at one, the held-out loss is extrapolated instead.
    loss = section.judged if section.judged.name != "metric" else section.quantities[1]
    waits = [scaling.longer(adam, entry, loss, one) if adam else scaling.UNKNOWN for one in ("seconds", "step")]
    return Row(
        section=section,
        entry=entry,
        finals=tuple(finals(entry, quantity) for quantity in section.quantities),
        steps=steps,
        seconds=seconds,
        longer=waits[0],
        longer_steps=waits[1],
        step_seconds=median_interval([one.step_seconds for one in entry.records if not math.isnan(one.step_seconds)]),
        relative=paired(entry, adam) if adam else UNKNOWN,
        memory=max(record.memory for record in entry.records),
        peak=max(record.peak for record in entry.records),
    )


@dataclass(frozen=True)
class Column:
    """What a column shows.

    Args:
        heading: above it.
        meaning: in words.
        cell: of a row.
        detailed: whether a terminal shows the details of its cells as well.
        words: whether it holds text.
    """

    heading: str
    meaning: str
    cell: Callable[[Row], Cell]
    detailed: bool = False
    words: bool = False


def columns(section: Section) -> list[Column]:
    """The columns that have something to say about a section."""
    found = [
        Column("Method", "the optimizer, with the settings that tell it from others", _name, words=True),
        Column("Runs", "seeds, and how many of them diverged", _runs, True),
    ]
    for place, quantity in enumerate(section.quantities):
        found.append(_final(section, place, quantity))
    if section.goal:
        found += [
            Column("Steps to target", section.goal, lambda row: interval_cell(row.steps, "{:.0f}")),
            Column(
                "Time to target", f"{section.goal}; training time", lambda row: interval_cell(row.seconds, time_text)
            ),
        ]
    if reference(section) is not None:
        found += [
            Column("Adam would need", "tuned Adam's training time to where this ends, over this method's", _longer),
            Column("Step / Adam's", "paired by seed", lambda row: interval_cell(row.relative, "{:.2f}")),
        ]
    found += [
        Column("Step", "median time of a step", lambda row: interval_cell(row.step_seconds, time_text)),
        Column("State", "the optimizer's own memory", lambda row: Cell(bytes_text(row.memory), order=row.memory)),
    ]
    if any(record.peak for entry in section.entries for record in entry.records):
        found.append(Column("Peak", "peak memory of the process, or of the GPU", lambda row: _peak(row.peak)))
    return found


def _name(row: Row) -> Cell:
    return Cell(row.entry.title, order=row.entry.title)


def _runs(row: Row) -> Cell:
    count, diverged = len(row.entry.records), row.entry.diverged
    return Cell(str(count), f"{diverged} diverged" if diverged else "", count - diverged)


def _final(section: Section, place: int, quantity: Quantity) -> Column:
    title = quantity.title[0].upper() + quantity.title[1:]
    meaning = f"at the end; {quantity.better} is better"
    return Column(title, meaning, lambda row: _final_cell(row.finals[place]), quantity == section.judged)


def _final_cell(value: Interval) -> Cell:
    return interval_cell(value, lambda one: "diverged" if math.isinf(one) else f"{one:#.4g}")


@dataclass(frozen=True)
class Used:
    """With which settings a method ran, and how they were chosen.

    Args:
        title: of the method.
        settings: in words.
        how: in words; empty where nothing tells.
        entry: the runs; none where tuning found no settings to run with.
    """

    title: str
    settings: str
    how: str
    entry: Entry | None = None


def used(section: Section, chosen: Sequence[Chosen]) -> list[Used]:
    """The settings of every entry, and what tuning says of them; then the methods that it has no settings for."""
    place = section.records[0].spec.problem
    lost = {title_of(one.method): how_chosen(one) for one in chosen if one.problem == place and one.settings is None}
    found = [_used(entry, chosen) for entry in section.entries]
    return [*found, *(Used(title, "–", how) for title, how in lost.items())]


def _used(entry: Entry, chosen: Sequence[Chosen]) -> Used:
    spec = entry.records[0].spec
    mine = (
        one for one in chosen if (one.problem, one.method) == (spec.problem, spec.method) and one.settings is not None
    )
    fitting = (one for one in mine if set(_pairs(one.settings)) <= set(_pairs(spec.settings)))
    found = next(fitting, None)
    return Used(entry.title, settings_text(told(spec)) or "defaults", "" if found is None else how_chosen(found), entry)


def _pairs(settings: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(name, settings_text({name: value})) for name, value in (settings or {}).items()]


def how_chosen(one: Chosen) -> str:
    """Such as ``"best of 12 trials; lr at their end"``."""
    if one.missing:
        return "the search is not over"
    trials = counted(one.trials, "trials")
    if one.settings is None:
        return f"none of {trials} finished"
    if not one.settings:
        return "nothing to choose"
    ends = f"; {' and '.join(one.open)} at the end of what was tried" if one.open else ""
    return f"best of {trials}{ends}"


def _longer(row: Row) -> Cell:
    steps = f"in steps {row.longer_steps.text}" if not math.isnan(row.longer_steps.factor) else ""
    return Cell(row.longer.text, steps, row.longer.factor)


def _peak(count: int) -> Cell:
    return Cell(bytes_text(count), order=count) if count else Cell("–")


def interval_cell(value: Interval, form: str | Callable[[float], str]) -> Cell:
    """A median, its interval under it where it is more than a point, and what it is sorted by."""
    if not value.known:
        return Cell("–")
    middle, low, high = (_number(one, form) for one in (value.middle, value.low, value.high))
    return Cell(middle, "" if value.low == value.high else f"{low} to {high}", value.middle)


def _number(value: float, form: str | Callable[[float], str]) -> str:
    if callable(form):
        return form(value)
    return form.format(value) if math.isfinite(value) else "∞"


def time_text(seconds: float) -> str:
    """A duration for people; infinite for what was missed."""
    if math.isinf(seconds):
        return "∞"
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (180.0, 1.0, "s"), (10800.0, 1 / 60, "min")):
        if abs(seconds) < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def bytes_text(count: float) -> str:
    """A size for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def summary_csv(rows: Iterable[Row]) -> str:
    """Every row with full precision: medians and the ends of their intervals."""
    names = ("train", "test", "metric", "steps_to_target", "seconds_to_target", "step_seconds", "step_over_adam")
    spread = [f"{name}_{part}" for name in names for part in ("median", "low", "high")]
    waits = ("adam_needs_seconds", "adam_needs_seconds_how", "adam_needs_steps", "adam_needs_steps_how")
    head = (
        "problem",
        "budget",
        "method",
        "settings",
        "runs",
        "diverged",
        *spread,
        *waits,
        "state_bytes",
        "peak_bytes",
        "parts",
    )
    return _csv(head, (_values(row) for row in rows))


def _values(row: Row) -> list[object]:
    spec = row.entry.records[0].spec
    values = [*row.finals, *[UNKNOWN] * (3 - len(row.finals)), row.steps, row.seconds, row.step_seconds, row.relative]
    spread = [end for value in values for end in (value.middle, value.low, value.high)]
    waits = (row.longer.factor, row.longer.how, row.longer_steps.factor, row.longer_steps.how)
    start = (
        spec.problem,
        spec.budget,
        spec.method,
        settings_key(spec),
        len(row.entry.records),
        row.entry.diverged,
    )
    parts = " ".join(f"{name}={seconds!r};" for name, seconds in breakdown(row.entry).items())
    return [*start, *spread, *waits, row.memory, row.peak, parts]


def runs_csv(uses: Sequence[tuple[str, Section]]) -> str:
    """One line for every run."""
    head = (
        "use",
        "problem",
        "budget",
        "method",
        "settings",
        "seed",
        "status",
        "steps",
        "seconds",
        "train",
        "test",
        "metric",
    )
    more = ("steps_to_target", "seconds_to_target", "step_seconds", "state_bytes", "peak_bytes", "note", "key")
    return _csv((*head, *more), (_run(use, section, record) for use, section, record in _all(uses)))


def _run(use: str, section: Section, record: Record) -> list[object]:
    spec, last = record.spec, record.points[-1]
    reached = hit(record, section.problem) if section.problem is not None and section.goal else (math.nan, math.nan)
    ends = (record.status, last.step, last.seconds, last.train, last.test, last.metric)
    costs = (record.step_seconds, record.memory, record.peak, record.note, spec.key)
    return [use, spec.problem, spec.budget, spec.method, settings_key(spec), spec.seed, *ends, *reached, *costs]


def curves_csv(uses: Sequence[tuple[str, Section]]) -> str:
    """One line for every evaluation of every run."""
    head = ("key", "use", "problem", "budget", "method", "seed", "step", "seconds", "train", "test", "metric")
    lines = (
        (*_place(use, record), point.step, point.seconds, point.train, point.test, point.metric)
        for use, _, record in _all(uses)
        for point in record.points
    )
    return _csv(head, lines)


def _place(use: str, record: Record) -> tuple[object, ...]:
    return record.spec.key, use, record.spec.problem, record.spec.budget, record.spec.method, record.spec.seed


def _all(uses: Sequence[tuple[str, Section]]) -> Iterable[tuple[str, Section, Record]]:
    return ((use, section, record) for use, section in uses for record in section.records)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue()
