"""What a terminal shows of a study."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .records import Record
from .sections import sections
from .summary import Column, Row, columns, summarize


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
