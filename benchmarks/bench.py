"""What a run works on, and how it is kept while it is not finished."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .clock import Clock
from .data import Data, Split
from .plan import Schedule
from .problems import Problem, steps_of
from .records import Point, RecordError, Spec


@dataclass
class Run:
    """A run in progress; everything but model, optimizer and clock.

    Attributes:
        step: steps taken.
        average: the running average of batch losses.
        points: evaluations so far.
        peak: most bytes held so far.
        commits: code versions that took part.
        warnings: what was warned of.
    """

    step: int = 0
    average: float = math.nan
    points: list[Point] = field(default_factory=list)
    peak: int = 0
    commits: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What a run works on."""

    spec: Spec
    problem: Problem
    data: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: Clock
    device: str

    @property
    def steps(self) -> int | None:
        """How many steps the budget has; a budget of seconds has none."""
        if self.spec.epochs is not None:
            return steps_of(self.problem, self.data, self.spec.epochs)
        return self.spec.steps

    @property
    def judge(self) -> Split:
        """What is held out to judge this run."""
        return self.data.judge(self.spec.purpose)

    @property
    def decay(self) -> Callable[[float], float] | None:
        """From the share of the budget that is spent to a factor of the step size: the run's own, else the problem's."""
        if self.spec.schedule is None:
            return self.problem.decay
        schedule, (amount, _) = Schedule(**self.spec.schedule), self.spec.length
        return lambda share: schedule.after(share * amount)

    def spent(self, step: int) -> float:
        """The share of the budget that is used up."""
        steps = self.steps
        return step / steps if steps is not None else min(1.0, self.clock.seconds / (self.spec.seconds or math.inf))


def _random_states() -> dict[str, Any]:
    """Of every generator that an optimizer or a layer may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def content(run: Run, bench: Bench) -> bytes:
    """All that a run needs to go on, as bytes."""
    clock = bench.clock
    kept: dict[str, Any] = {
        "run": {**vars(run), "points": [asdict(point) for point in run.points]},
        "clock": {"seconds": clock.seconds, "parts": clock.parts, "times": clock.times},
        "model": bench.model.state_dict(),
        "optimizer": bench.optimizer.state_dict(),
        "random": _random_states(),
    }
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


def load(file: Path, bench: Bench) -> Run:
    """Go on where a file of :func:`content` stands, or begin.

    Raises:
        RecordError: where it is damaged, or of something else.
    """
    if not file.is_file():
        return Run()
    try:
        kept = torch.load(file, weights_only=True, map_location="cpu")
        bench.model.load_state_dict(kept["model"])
        bench.optimizer.load_state_dict(kept["optimizer"])
        vars(bench.clock).update(kept["clock"])
        _restore(kept["random"])
        points = [Point(**point) for point in kept["run"].pop("points")]
        return Run(**kept["run"], points=points)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{file} does not fit this run ({reason}); remove it, and the run starts anew") from error
