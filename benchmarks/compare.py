"""Two results folders side by side: what the same runs came to, such as by two versions of the code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .answers import ratios
from .folders import held
from .intervals import Interval
from .records import Record, RecordError, counted
from .sections import Quantity, Section, sections
from .summary import interval_cell
from .terminal import Strip, say, show_table

_LOSSES = (Quantity("train", "training loss"), Quantity("test", "held-out loss"))
_PURPOSES = {"report": "", "tuning": ", trials of tuning"}

Pair = tuple[Record, Record]


def compare(before: Path, after: Path, console: Console) -> None:
    """Print tables with a row for every method, over the runs that both folders hold; trials of tuning have their own.

    Runs are paired by what was run: settings, seed and budget. "Equal" are those whose numbers agree to the last digit.

    Raises:
        RecordError: where a folder holds no runs, or none that the other holds, too.
    """
    folders = [held(folder) for folder in (before, after)]
    old, new = ({record.spec.key: record for record in records} for records in folders)
    pairs = {key: (old[key], new[key]) for key in old if key in new}
    if not pairs:
        raise RecordError(
            f"{before} and {after} have no run in common: they must agree in problem, method, settings, seed and budget"
        )
    say(f"{_versions(folders[1])} in {after} over {_versions(folders[0])} in {before}", console, "bold")
    for purpose, addition in _PURPOSES.items():
        for section in sections([one for one, _ in pairs.values() if one.spec.purpose == purpose]):
            say(f"{section.heading}{addition}", console, "table.title")
            show_table(compared(section, pairs), console)
    say("Medians of ratios, the second folder over the first, with 95 % intervals.", console)
    alone = [len(mine) - len(pairs) for mine in (old, new)]
    if any(alone):
        say(f"Only in {before}: {counted(alone[0], 'runs')}; only in {after}: {alone[1]}.", console)


def compared(section: Section, pairs: dict[str, Pair]) -> list[Strip]:
    """Ratios of the second to the first, of final losses, step time and memory, as columns of a table."""
    mine = [[pairs[record.spec.key] for record in entry.records] for entry in section.entries]
    spreads = {
        one.title: [ratios((one.final(new), one.final(old)) for old, new in same) for same in mine] for one in _LOSSES
    }
    spreads["step time"] = [ratios((new.step_seconds, old.step_seconds) for old, new in same) for same in mine]
    spreads["memory"] = [ratios((new.memory, old.memory) for old, new in same) for same in mine]
    equal = [sum(old.reproducible() == new.reproducible() for old, new in same) for same in mine]
    return [
        Strip("Method", [entry.title for entry in section.entries], words=True, left=True),
        Strip("Runs", [str(len(same)) for same in mine]),
        Strip("Equal", list(map(str, equal))),
        *(Strip(title.capitalize(), list(map(_spread, values))) for title, values in spreads.items()),
    ]


def _spread(value: Interval) -> str:
    cell = interval_cell(value, "{:.3f}")
    return f"× {cell.text}" + (f" ({cell.detail})" if cell.detail else "")


def _versions(records: Sequence[Record]) -> str:
    return ", ".join(sorted({str(record.environment.get("commit", "unknown")) for record in records}))
