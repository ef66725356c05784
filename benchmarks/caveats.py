"""What a reader must know of a section before its numbers are believed, in one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .methods import MethodError, method
from .naming import UnknownName
from .records import counted
from .sections import Entry, Section
from .space import OUTSIDE


def caveats(section: Section) -> list[str]:
    """Data that are not the official ones, warnings, unequal or shared machines, and settings that nobody chose."""
    return [*_data(section), *_warned(section), *_machines(section), *_untuned(section)]


def _data(section: Section) -> Iterator[str]:
    records = section.records
    for text, count in Counter(record.note for record in records if record.note).items():
        yield (
            text if count == len(records) else f"{text} So in {count} of {len(records)} runs, which stand side by side."
        )


def _warned(section: Section) -> Iterator[str]:
    whose: dict[str, dict[str, None]] = {}
    for entry in section.entries:
        for text in (text for record in entry.records for text in record.warnings):
            whose.setdefault(text, {})[entry.title] = None
    for text, titles in whose.items():
        yield f"{', '.join(titles)}: {text}"


def _machines(section: Section) -> Iterator[str]:
    found: dict[str, Counter[str]] = {}
    for record in section.records:
        for name, value in _flat(record.environment):
            found.setdefault(name, Counter())[str(value)] += 1
    unequal = {name: values for name, values in found.items() if len(values) > 1}
    if unequal:
        told = (f"{name} {_listed(values)}" for name, values in unequal.items())
        yield f"Runs of different environments stand side by side: {'; '.join(told)}."
    most = max((int(jobs) for jobs in found.get("jobs", ())), default=1)
    if most > 1:
        yield f"Up to {most} runs shared the machine: steps, losses and memory are as good as ever, times are not."


def _flat(environment: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in environment.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _listed(values: Counter[str]) -> str:
    return ", ".join(f"{value} ({counted(count, 'runs')})" for value, count in sorted(values.items()))


def _untuned(section: Section) -> Iterator[str]:
    titles = [entry.title for entry in section.entries if _is_untuned(entry)]
    if titles:
        yield (
            f"Untuned defaults: nothing that a search would choose was chosen here of {', '.join(titles)}; "
            "`python -m benchmarks tune` does so, with as many trials for every method."
        )


def _is_untuned(entry: Entry) -> bool:
    return not {*_searched(entry.method)} & {*entry.records[0].spec.settings}


def _searched(name: str) -> Sequence[str]:
    try:
        return list(method(name).space)
    except (UnknownName, MethodError):  # not installed here
        return list(OUTSIDE)
