"""The live display of a session: a line for each run in progress, and the time that is left."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .records import Results, Spec, counted
from .study import Study
from .team import Outcome, describe

_REFRESH = 0.2  # seconds between two looks of a line


class Display:
    """What happens in a session.

    Args:
        study: what is run.
        results: what is done.
        console: where to show it; one that is no terminal gets a line for each finished run.
        jobs: runs at once.
        part: (i, n): only the i-th of n slices.
        purpose: ``"tuning"`` leaves out the runs of the report.
    """

    def __init__(
        self, study: Study, results: Results, console: Console, jobs: int, part: tuple[int, int], purpose: str
    ) -> None:
        self.console, self.jobs = console, jobs
        self._left = study.left(results, purpose, part)
        self._total, self._done = sum(self._left.values()), 0
        self._costs: dict[tuple[str, str], list[float]] = defaultdict(list)
        for record in results.records():
            self._costs[record.spec.problem, record.spec.method].append(record.points[-1].seconds)
        self._began: dict[Spec, float] = {}
        self._first: dict[Spec, float] = {}
        self._shares: dict[Spec, float] = {}
        self._shown: dict[Spec, float] = {}
        self._tasks: dict[Spec, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._whole = self._progress.add_task("starting", total=max(1, self._total))

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, spec: Spec) -> None:
        """A run begins."""
        self._began[spec] = time.monotonic()
        self._tasks[spec] = self._progress.add_task(describe(spec), total=1.0)

    def tell(self, spec: Spec, share: float, average: float) -> None:
        """A run goes on."""
        if spec not in self._first:  # what a checkpoint brought took no time now
            self._first[spec], self._began[spec] = share, time.monotonic()
        self._shares[spec] = share
        if time.monotonic() - self._shown.get(spec, 0.0) < _REFRESH:
            return
        self._shown[spec] = time.monotonic()
        text = f"{describe(spec)}{' · trial' * (spec.purpose == 'tuning')} · loss {average:.4g}"
        self._progress.update(self._tasks[spec], completed=share, description=text)
        done = self._done + sum(self._shares.values())
        self._progress.update(self._whole, completed=done, description=f"all, {span(self.remaining())} left")

    def others(self, runs: int) -> None:
        """Only what other processes do is left."""
        self._progress.update(self._whole, description=f"waiting for {counted(runs, 'runs')} of other processes")

    def end(self, outcome: Outcome) -> None:
        """A run has ended."""
        spec = outcome.spec
        took = time.monotonic() - self._began.pop(spec)
        first, share = self._first.pop(spec, 1.0), self._shares.pop(spec, 1.0)
        self._progress.remove_task(self._tasks.pop(spec))
        if outcome.status == "elsewhere":
            return
        if outcome.status == "finished" and share > first:
            self._costs[spec.problem, spec.method].append(took / (share - first))
        self._done += 1
        self._left[spec.problem, spec.method] = max(0, self._left.get((spec.problem, spec.method), 0) - 1)
        text = f"[{self._done}/{max(self._total, self._done)}] {describe(spec)}{_trial(spec)}: "
        text += (
            f"failed, {outcome.reason}" if outcome.status == "failed" else f"{outcome.status}, loss {outcome.loss:.4g}"
        )
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def remaining(self) -> float | None:
        """Seconds that are left, as far as finished and running runs tell; none where nothing does."""
        known = {place: statistics.median(costs) for place, costs in self._costs.items() if costs}
        now = time.monotonic()
        for spec, share in self._shares.items():
            place, moved = (spec.problem, spec.method), share - self._first[spec]
            if place not in known and moved > 0:
                known[place] = (now - self._began[spec]) / moved
        if not known:
            return None
        by_problem: dict[str, list[float]] = defaultdict(list)
        for (name, _), cost in known.items():
            by_problem[name].append(cost)
        total = 0.0
        for place, runs in self._left.items():
            alike = by_problem.get(place[0]) or list(known.values())
            total += runs * known.get(place, statistics.mean(alike))
        for spec, share in self._shares.items():
            total -= share * known.get((spec.problem, spec.method), 0.0)
        return max(0.0, total) / self.jobs


def _trial(spec: Spec) -> str:
    if spec.purpose != "tuning":
        return ""
    return f" · trial {', '.join(f'{name} {value}' for name, value in spec.settings.items())}"


def span(seconds: float | None) -> str:
    """Such as ``"3 min"``."""
    if seconds is None:
        return "–"
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
