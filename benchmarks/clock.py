"""The clock of a run: it stops for everything but training, and says what the time went into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from curvlib import phases

from .records import PARTS

REST = PARTS[-1]
Mark = float | torch.cuda.Event


class Clock:
    """Training time and its parts.

    On a GPU the ends of a step are synchronised, and what lies between is timed by events on its stream, so that measuring
    does not slow it down. What no phase claims is ``"rest"``, so that the parts add up.

    Args:
        device: where training is.

    Attributes:
        seconds: of training so far.
        parts: the same by :data:`~benchmarks.records.PARTS`.
        times: seconds of every step so far.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.seconds = 0.0
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.times: list[float] = []
        self._cuda = device.startswith("cuda")
        self._stack = [REST]
        self._marks: list[tuple[str, Mark]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one step; one that fails does not count."""
        self._stack, self._marks = [REST], []
        self._synchronise()
        start = time.perf_counter()
        self._mark()
        with phases.heard(self._hear):
            yield
        self._mark()
        self._synchronise()
        took = time.perf_counter() - start
        self._count(took)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the loop's own."""
        self._hear(name)
        try:
            yield
        finally:
            self._hear(None)

    def _hear(self, name: str | None) -> None:
        self._mark()
        if name is None:
            self._stack.pop()
        else:
            self._stack.append(name)

    def _mark(self) -> None:
        """Note when what stood on top of the stack ended, or the step began."""
        now: Mark
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._stack[-1], now))

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _count(self, took: float) -> None:
        known = 0.0
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            passed = _between(begin, end)
            if name in self.parts and name != REST:
                self.parts[name] += passed
                known += passed
        self.parts[REST] += took - known
        self.seconds += took
        self.times.append(took)


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    return float(end) - float(begin)  # type: ignore[arg-type]


class Peak:
    """The most memory that is held from its making on: of the GPU, else of the process where the system can say.

    Args:
        device: where training is.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # then it is that of the process since its start
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> int:
        """Bytes so far."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            import resource  # not everywhere

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
