"""Paired timing: two sides in turns, one process, and the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Side = Callable[[], float]
"""Does the work once and returns what it took: seconds, or bytes."""


@dataclass(frozen=True)
class Setting:
    """What holds for all cases of a run.

    Args:
        device: where tensors lie.
        quick: tiny shapes, to see that everything works.
        repetitions: pairs.
        peers: a folder with packages that are not installed.
    """

    device: torch.device
    quick: bool
    repetitions: int
    peers: Path | None

    def size(self, full: int, tiny: int) -> int:
        """A size: the real one, or that of a quick run."""
        return tiny if self.quick else full


@dataclass(frozen=True)
class Target:
    """What is asked of a ratio; ``None`` asks nothing, and the ratio is told for comparison.

    Args:
        limit: of the ratio.
        faster: the ratio is theirs over ours, and the limit its least value; else ours over theirs, and its largest.
    """

    limit: float | None
    faster: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        """The ratio of one pair."""
        return theirs / ours if self.faster else ours / theirs

    def met(self, ratio: float) -> bool | None:
        """Whether a ratio is good enough; ``None`` where nothing is asked."""
        if self.limit is None:
            return None
        return ratio >= self.limit if self.faster else ratio <= self.limit

    def __str__(self) -> str:
        if self.limit is None:
            return "–"
        return f"{'≥' if self.faster else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Contest:
    """The two sides of a case, ready to run.

    Attributes:
        ours: curvlib's side.
        theirs: the other side.
        difference: the relative difference of what both compute.
        tolerance: the largest difference that rounding explains.
        turns: how often the two sides alternate in one repetition.
        warm_up: turns of both that are not counted.
        unit: of what the sides return: ``"ms"`` for seconds, ``"MB"`` for bytes.
    """

    ours: Side
    theirs: Side
    difference: Callable[[], float]
    tolerance: float
    turns: int = 1
    warm_up: int = 2
    unit: str = "ms"


@dataclass(frozen=True)
class Measured:
    """What came out of a contest.

    Attributes:
        difference: see :class:`Contest`.
        tolerance: see :class:`Contest`.
        ratios: of every repetition.
        ours: median of a turn, in seconds or bytes.
        theirs: likewise.
        unit: see :class:`Contest`.
    """

    difference: float
    tolerance: float
    ratios: tuple[float, ...]
    ours: float
    theirs: float
    unit: str

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)


class Differs(ArithmeticError):
    """Both sides do not compute the same thing, so that their times cannot be compared."""


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes, the device's included."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(contest: Contest, target: Target, repetitions: int) -> Measured:
    """Check that both sides agree, and time them in turns.

    Raises:
        Differs: with the difference and the tolerance.
    """
    difference = contest.difference()
    if not difference <= contest.tolerance:
        raise Differs(f"both sides differ by {difference:.1e}, tolerance {contest.tolerance:.1e}")
    for _ in range(contest.warm_up):
        contest.ours(), contest.theirs()
    pairs = []
    for repetition in range(repetitions):
        ours, theirs = 0.0, 0.0
        for turn in range(contest.turns):
            if (repetition + turn) % 2:  # nobody always goes first
                theirs += contest.theirs()
                ours += contest.ours()
            else:
                ours += contest.ours()
                theirs += contest.theirs()
        pairs.append((ours / contest.turns, theirs / contest.turns))
    return Measured(
        difference,
        contest.tolerance,
        tuple(target.ratio(*pair) for pair in pairs),
        statistics.median(ours for ours, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        contest.unit,
    )
