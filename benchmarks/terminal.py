"""What a terminal shows of a study: its tables, and the comparison of two results folders."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .answers import ratios
from .intervals import Interval
from .records import Record, RecordError
from .sections import Quantity, sections
from .summary import Column, Row, columns, interval_cell, summarize


def show(records: Sequence[Record], console: Console, title: str) -> None:
    """Print a table for every problem and budget.

    Args:
        records: finished runs.
        console: where to.
        title: above the tables.
    """
    console.print(title, style="bold", highlight=False, markup=False)
    for section in sections(records):
        shown = columns(section)
        aim = f" (target: {section.goal})" if section.goal else ""
        heading = Text(f"{section.title}, {section.budget}{aim}", style="table.title")
        made = Table(title=heading, title_justify="left")
        for column in shown:
            # Headings may be broken into lines, so that medians and intervals need not be.
            made.add_column(column.heading, justify="left" if column is shown[0] else "right", no_wrap=column.detailed)
        for row in summarize(section):
            made.add_row(*(Text(_text(column, row)) for column in shown))
        console.print(made)
        for text in section.notes():
            console.print(f"Data: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _text(column: Column, row: Row) -> str:
    cell = column.cell(row)
    return f"{cell.text} ({cell.detail})" if column.detailed and cell.detail else cell.text


def compare(first: Sequence[Record], second: Sequence[Record]) -> Table:
    """Ratios of the second to the first, paired by problem, method, settings, budget and seed: below 1 the second is better.

    Args:
        first: records of one folder.
        second: records of another.

    Raises:
        RecordError: where no run is in both.
    """
    others = {record.spec.key: record for record in second}
    pairs = {one.spec.key: (one, others[one.spec.key]) for one in first if one.spec.key in others and one.points}
    if not pairs:
        raise RecordError("no run is in both folders: pairs need the same problem, method, settings, budget and seed")
    alone = len({one.spec.key for one in first} ^ set(others))
    made = Table(
        *("Problem", "Method", "Pairs", "Training loss", "Held-out loss", "Step time"),
        title="Second over first: medians of ratios with 95 % intervals",
        title_justify="left",
        caption=f"In one folder only: {alone}." if alone else None,
    )
    for column in made.columns[2:]:
        column.justify = "right"
    for section in sections([mine for mine, _ in pairs.values()]):
        for entry in section.entries:
            mine = [pairs[record.spec.key] for record in entry.records]
            losses = [ratios((one.final(b), one.final(a)) for a, b in mine) for one in _LOSSES]
            times = ratios((b.step_seconds, a.step_seconds) for a, b in mine)
            made.add_row(Text(section.title), Text(entry.title), str(len(mine)), *map(_spread, (*losses, times)))
    return made


_LOSSES = (Quantity("train", "training loss"), Quantity("test", "held-out loss"))


def _spread(value: Interval) -> str:
    cell = interval_cell(value, "{:.3f}")
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text
