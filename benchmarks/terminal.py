"""What a terminal shows: tables that are as narrow as it is, split rather than cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .caveats import caveats
from .records import Record
from .sections import Section, sections
from .study import Chosen
from .summary import Column, Row, columns, summarize, used

_EDGES = 3  # characters beside the text of a column
_WORDY = 16  # the least width of a column of text


@dataclass(frozen=True)
class Strip:
    """A column of a table.

    Args:
        heading: above it; it may be broken into lines.
        cells: plain text.
        words: whether these may be broken into lines, too.
        left: where they stand.
    """

    heading: str
    cells: Sequence[str]
    words: bool = False
    left: bool = False

    @property
    def least(self) -> int:
        """The width in which nothing is broken that must not be."""
        longest = max(map(len, self.cells), default=0)
        return max(_longest_word(self.heading), min(longest, _WORDY) if self.words else longest)

    @property
    def most(self) -> int:
        """The width in which nothing is broken."""
        return max(map(len, (self.heading, *self.cells)))


def show(records: Sequence[Record], console: Console, title: str, chosen: Sequence[Chosen] = ()) -> None:
    """Print the tables of every section, and what a reader must know of it.

    Args:
        records: finished runs.
        console: where to.
        title: above the tables.
        chosen: what tuning came to.
    """
    console.print(title, style="bold", highlight=False, markup=False)
    for section in sections(records):
        aim = f" (target: {section.goal})" if section.goal else ""
        say(f"{section.heading}{aim}", console, "table.title")
        rows = summarize(section)
        show_table([_strip(column, rows) for column in columns(section)], console)
        show_table(_settings(section, chosen), console)
        for text in caveats(section):
            say(f"Note: {text}", console, "yellow")


def say(text: str, console: Console, style: str = "") -> None:
    """Print a text as it is, broken between words."""
    console.print(Text(text, style=style), highlight=False)


def _strip(column: Column, rows: Sequence[Row]) -> Strip:
    cells = [column.cell(row) for row in rows]
    shown = [f"{one.text} ({one.detail})" if column.detailed and one.detail else one.text for one in cells]
    return Strip(column.heading, shown, words=column.words, left=column.words)


def _settings(section: Section, chosen: Sequence[Chosen]) -> list[Strip]:
    told = used(section, chosen)
    strips = [Strip("Method", [one.title for one in told], words=True, left=True)]
    strips.append(Strip("Settings", [one.settings for one in told], words=True, left=True))
    return [*strips, Strip("Chosen", [one.how for one in told], words=True, left=True)] if chosen else strips


def show_table(strips: Sequence[Strip], console: Console) -> None:
    """Print a table, as several that begin with the same column where one is too wide."""
    first, *others = strips
    room = console.width - 1
    widest = max(strip.least for strip in others) + _EDGES
    name = min(first.most, max(room // 3, _longest_word(*first.cells)), max(8, room - widest - _EDGES))
    room -= name + _EDGES
    while others:
        count, taken = 1, others[0].least + _EDGES
        while count < len(others) and taken + others[count].least + _EDGES <= room:
            taken += others[count].least + _EDGES
            count += 1
        _print([(first, name), *_stretched(others[:count], room - taken)], console)
        others = others[count:]


def _stretched(strips: Sequence[Strip], spare: int) -> list[tuple[Strip, int]]:
    """Columns with their widths: what is left of the room goes to those of text."""
    widths = []
    for place, strip in enumerate(strips):
        hungry = sum(other.words for other in strips[place:])
        more = min(strip.most - strip.least, spare // hungry) if strip.words else 0
        spare -= more
        widths.append((strip, strip.least + more))
    return widths


def _print(strips: Sequence[tuple[Strip, int]], console: Console) -> None:
    table = Table()
    for strip, width in strips:
        table.add_column(Text(strip.heading), justify="left" if strip.left else "right", width=width, overflow="fold")
    for cells in zip(*(strip.cells for strip, _ in strips), strict=True):
        table.add_row(*map(Text, cells))
    console.print(table)


def _longest_word(*texts: str) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)
