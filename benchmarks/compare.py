"""Two results folders side by side: what the same runs came to, such as by two versions of the code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .answers import ratios
from .intervals import Interval
from .records import Record, RecordError, Results
from .sections import Quantity, sections
from .summary import interval_cell

_HEADINGS = ("Problem", "Method", "Runs", "Equal", "Train loss", "Held-out loss", "Step time", "Memory")
_LOSSES = (Quantity("train", "training loss"), Quantity("test", "held-out loss"))


def compare(before: Path, after: Path, console: Console) -> None:
    """Print a row for every method on every problem, over the runs that both folders hold.

    Runs are paired by what was run: settings, seed and budget. "Equal" are those whose numbers agree to the last digit.

    Raises:
        RecordError: where a folder holds no runs, or none that the other holds, too.
    """
    folders = [_records(folder) for folder in (before, after)]
    keys = [{record.spec.key for record in records} for records in folders]
    if not keys[0] & keys[1]:
        raise RecordError(
            f"{before} and {after} have no run in common: they must agree in problem, method, settings, seed and budget"
        )
    table = compared(*folders)
    table.title = f"{_versions(folders[1])} in {after} over {_versions(folders[0])} in {before}"
    console.print(table)
    alone = [len(mine - other) for mine, other in (keys, keys[::-1])]
    if any(alone):
        text = f"Only in {before}: {alone[0]} runs; only in {after}: {alone[1]}."
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def compared(first: Sequence[Record], second: Sequence[Record]) -> Table:
    """Ratios of the second to the first, of final losses, step time and memory: medians of pairs with 95 % intervals."""
    others = {record.spec.key: record for record in second}
    pairs = {one.spec.key: (one, others[one.spec.key]) for one in first if one.spec.key in others}
    table = Table(title="Second over first", title_justify="left", caption="Medians of ratios with 95 % intervals.")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
    for section in sections([one for one, _ in pairs.values()]):
        for entry in section.entries:
            same = [pairs[record.spec.key] for record in entry.records]
            found = {
                **{one.title: ratios((one.final(new), one.final(old)) for old, new in same) for one in _LOSSES},
                "step": ratios((new.step_seconds, old.step_seconds) for old, new in same),
                "memory": ratios((new.memory, old.memory) for old, new in same),
            }
            equal = sum(old.reproducible() == new.reproducible() for old, new in same)
            names = (Text(section.title), Text(entry.title), str(len(same)), str(equal))
            table.add_row(*names, *_spreads(found))
    return table


def _spreads(found: Mapping[str, Interval]) -> list[str]:
    cells = [interval_cell(value, "{:.3f}") for value in found.values()]
    return [f"× {cell.text}" + (f" ({cell.detail})" if cell.detail else "") for cell in cells]


def _records(folder: Path) -> list[Record]:
    found = Results(folder).records()
    if not found:
        raise RecordError(f"{folder} holds no finished runs (expected {folder}/records.jsonl)")
    return found


def _versions(records: Sequence[Record]) -> str:
    return ", ".join(sorted({str(record.environment.get("commit", "unknown")) for record in records}))
