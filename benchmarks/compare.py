"""Two results folders side by side: what the same runs came to, such as by two versions of the code."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .methods import title_of
from .records import Record, RecordError, Results

_HEADINGS = ("Problem", "Method", "Runs", "Equal", "Train loss", "Held-out loss", "Step time", "Memory")


def compare(before: Path, after: Path, console: Console) -> None:
    """Print a row for every method on every problem: medians before and after, over the runs that both folders hold.

    Runs are paired by what was run: settings, seed and budget. "Equal" are those whose numbers agree to the last digit.

    Raises:
        RecordError: where a folder holds no runs, or none that the other holds, too.
    """
    folders = [{record.spec.key: record for record in _records(folder)} for folder in (before, after)]
    pairs: dict[tuple[str, str], list[tuple[Record, Record]]] = defaultdict(list)
    for key, old in folders[0].items():
        if key in folders[1]:
            pairs[old.spec.problem, old.spec.method].append((old, folders[1][key]))
    if not pairs:
        raise RecordError(
            f"{before} and {after} have no run in common: they must agree in problem, method, settings, seed and budget"
        )
    table = Table(
        title=f"{_versions(folders[0])} in {before}, {_versions(folders[1])} in {after}", title_justify="left"
    )
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right", no_wrap=console.width >= 130)
    for (problem, method), same in pairs.items():
        equal = sum(old.reproducible() == new.reproducible() for old, new in same)
        table.add_row(
            problem,
            title_of(method),
            str(len(same)),
            str(equal),
            _change([(old.points[-1].train, new.points[-1].train) for old, new in same]),
            _change([(old.points[-1].test, new.points[-1].test) for old, new in same]),
            f"× {statistics.median(new.step_seconds / old.step_seconds for old, new in same):.2f}",
            f"× {statistics.median(new.memory / max(1, old.memory) for old, new in same):.2f}",
        )
    console.print(table)
    alone = [len(set(mine) - set(other)) for mine, other in (folders, folders[::-1])]
    if any(alone):
        console.print(f"Only in {before}: {alone[0]} runs; only in {after}: {alone[1]}.", highlight=False, markup=False)


def _records(folder: Path) -> list[Record]:
    found = Results(folder).records()
    if not found:
        raise RecordError(f"{folder} holds no finished runs (expected {folder}/records.jsonl)")
    return found


def _versions(records: dict[str, Record]) -> str:
    return ", ".join(sorted({str(record.environment.get("commit", "unknown")) for record in records.values()}))


def _change(pairs: list[tuple[float, float]]) -> str:
    before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
    return f"{before:.4g} → {after:.4g}"
