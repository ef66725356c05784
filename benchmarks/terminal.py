"""The answer in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .problems import PROBLEMS
from .records import Record
from .summary import HEADINGS, cells, summarize


def show(records: Sequence[Record], console: Console, title: str) -> None:
    """Print the tables of a study."""
    console.print(title, style="bold", highlight=False, markup=False)
    rows = summarize(records)
    for name in dict.fromkeys(row.problem for row in rows):
        table = Table(title=f"{PROBLEMS[name].title}", title_justify="left")
        for heading in HEADINGS:
            table.add_column(
                heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=console.width >= 130
            )
        for row in rows:
            if row.problem == name:
                table.add_row(*cells(row))
        console.print(table)
