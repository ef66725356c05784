"""The table, for the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..records import write_whole
from .case import Case
from .timing import Measured, Target

COLUMNS = ("case", "against", "ours", "theirs", "ratio", "lowest – highest", "asked", "met")


@dataclass(frozen=True)
class Row:
    """One case and what became of it.

    Attributes:
        case: the case.
        target: what was asked.
        measured: what was found; ``None`` where nothing was timed.
        note: why not.
    """

    case: Case
    target: Target
    measured: Measured | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether what was asked is met; ``None`` where it was not timed, or nothing is asked."""
        return None if self.measured is None else self.target.met(self.measured.ratio)

    def cells(self) -> tuple[str, ...]:
        """A cell for every one of :data:`COLUMNS`."""
        what = f"{self.case.what} ({self.case.name})"
        if self.measured is None:
            return what, self.case.against, "", "", self.note, "", str(self.target), ""
        one = self.measured
        spread = f"{min(one.ratios):.2f} – {max(one.ratios):.2f}"
        ratio = f"{one.ratio:.2f} × {'faster' if self.target.faster else ''}".strip()
        verdict = {True: "yes", False: "no", None: ""}[self.met]
        sides = (_shown(side, one.unit) for side in (one.ours, one.theirs))
        return what, self.case.against, *sides, ratio, spread, str(self.target), verdict

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.case.name,
            "what": self.case.what,
            "against": self.case.against,
            "target": asdict(self.target),
            "measured": None if self.measured is None else {**asdict(self.measured), "ratio": self.measured.ratio},
            "met": self.met,
            "note": self.note,
        }


def _shown(value: float, unit: str) -> str:
    return f"{1e3 * value:.3g} ms" if unit == "ms" else f"{value / 1e6:,.1f} MB"


def on_screen(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal."""
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*row.cells())
    return table


def write(rows: Sequence[Row], about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``table.md`` and ``speed.json``; returns both."""
    lines = [
        "# Speed",
        "",
        "Medians of paired repetitions in one process; `python -m benchmarks speed` says what each case is. A ratio is ours",
        "over theirs, and with “faster” theirs over ours.",
        "",
        *(f"* {name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in about.items()),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in rows),
        "",
    ]
    content = {"about": about, "cases": [row.record() for row in rows]}
    files = {folder / "table.md": "\n".join(lines), folder / "speed.json": json.dumps(content, indent=1)}
    for file, text in files.items():
        write_whole(file, text.encode())
    return list(files)
