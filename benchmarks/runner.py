"""One run: a problem trained by a method from a seed, resumable at any step, with a clock that stops for evaluations."""

from __future__ import annotations

import io
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvlib

from .data import Data, Split
from .methods import METHODS, memory
from .problems import PROBLEMS, Problem, evaluate
from .records import Point, Record, RecordError, Spec, environment, write_whole

Progress = Callable[[int, int, float], None]
SMOOTHING = 0.9
_CHECKPOINT_SECONDS = 10.0


@dataclass
class Run:
    """A run in progress; everything but model and optimizer.

    Attributes:
        step: steps taken.
        seconds: training time so far.
        average: the running average of batch losses.
        points: evaluations so far.
        times: seconds of every step so far.
    """

    step: int = 0
    seconds: float = 0.0
    average: float = math.nan
    points: list[Point] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def results_file(folder: Path, spec: Spec) -> Path:
    """Where the record of a run lies."""
    return folder / "runs" / f"{spec.key}.json"


def checkpoint_file(folder: Path, spec: Spec) -> Path:
    """Where an unfinished run is kept."""
    return folder / "runs" / f"{spec.key}.checkpoint"


def steps_of(problem: Problem, data: Data, epochs: int) -> int:
    """The number of steps in a budget."""
    return epochs * (len(data.train) // problem.batch_size)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of a step, so that only whole steps are saved; a second Ctrl-C does not wait.

    Yields a function that says whether a Ctrl-C waits. One that nobody heeded is raised at the end. Where this is not the
    main thread, or Ctrl-C already has another handler than Python's own, nothing is held.
    """
    waiting = False

    def hold(*_: object) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    standard = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not standard:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: waiting
    finally:
        signal.signal(signal.SIGINT, standard)
    if waiting:
        raise KeyboardInterrupt


def execute(spec: Spec, data: Data, folder: Path, progress: Progress | None = None) -> Record:
    """Run, or go on where a checkpoint stands; a finished run is only read.

    Args:
        spec: what to run.
        data: its data.
        folder: of the study.
        progress: called after every step with (step, steps, running average).

    Raises:
        KeyboardInterrupt: after saving a checkpoint, if a step was taken.
        RecordError: where the record or checkpoint of this run is damaged.
    """
    finished = results_file(folder, spec)
    if finished.is_file():
        return Record.load(finished)
    problem, method = PROBLEMS[spec.problem], METHODS[spec.method]
    steps = steps_of(problem, data, spec.epochs or problem.epochs)
    settings = dict(spec.settings)
    warms = settings.pop("warm_start", False)
    torch.manual_seed(spec.seed)
    model = problem.build()
    optimizer = method.optimizer(model, settings)
    checkpoint = checkpoint_file(folder, spec)
    run = _load(checkpoint, model, optimizer)
    if run.step == 0 and warms:
        warm_start(problem, model, optimizer, data.train, spec.seed)
    with held_interrupts() as interrupted:
        status = _train(run, problem, model, optimizer, data, steps, spec, checkpoint, progress, interrupted)
        record = Record(spec, status, tuple(run.points), statistics.median(run.times), memory(optimizer), environment())
        record.save(finished)
        checkpoint.unlink(missing_ok=True)
    return record


def _train(
    run: Run,
    problem: Problem,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    steps: int,
    spec: Spec,
    checkpoint: Path,
    progress: Progress | None,
    interrupted: Callable[[], bool],
) -> str:
    every = max(1, steps // ((spec.epochs or problem.epochs) * problem.points))
    saved = time.monotonic()
    if run.step == 0:
        first = evaluate(model, problem, data.train)
        run.average = first
        run.points.append(Point(0, 0.0, first, evaluate(model, problem, data.test)))
    for batch in batches(data.train, problem.batch_size, spec.seed, run.step, steps):
        start = time.perf_counter()
        loss = _step(problem, model, optimizer, batch)
        took = time.perf_counter() - start
        run.step += 1
        run.seconds += took
        run.times.append(took)
        run.average = SMOOTHING * run.average + (1 - SMOOTHING) * loss if run.step > 1 else loss
        diverged = not math.isfinite(loss)
        if diverged or run.step % every == 0 or run.step == steps:
            test = math.nan if diverged else evaluate(model, problem, data.test)
            run.points.append(Point(run.step, run.seconds, run.average, test))
        if diverged:
            return "diverged"
        try:
            if progress is not None:
                progress(run.step, steps, run.average)
            if interrupted():
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            _save(checkpoint, run, model, optimizer)
            raise
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(checkpoint, run, model, optimizer)
            saved = time.monotonic()
    return "finished"


def _step(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Split) -> float:
    """One training step; the loss, or NaN where gradients are no longer finite."""

    def closure() -> float:
        """What a method may want to see once more after its step."""
        optimizer.zero_grad()
        outputs = model(batch.inputs)
        loss = problem.loss(outputs, batch)
        retain = False
        if isinstance(optimizer, curvlib.CurvatureOptimizer):
            optimizer.observe(outputs, problem.likelihood, loss=loss)
            retain = optimizer.needs_graph
        loss.backward(retain_graph=retain)
        return loss.item()

    try:
        return float(optimizer.step(closure))
    except curvlib.NonFiniteGradient:
        return math.nan


def batches(split: Split, size: int, seed: int, start: int, stop: int) -> Iterator[Split]:
    """Batches number ``start`` to ``stop``: every epoch in an order of its own, a function of seed and epoch alone."""
    each = len(split) // size
    order: Tensor | None = None
    for number in range(start, stop):
        epoch, place = divmod(number, each)
        if order is None or place == 0:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(len(split), generator=generator)
        chosen = order[place * size : (place + 1) * size]
        yield Split(split.inputs[chosen], split.labels[chosen])


def warm_start(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, train: Split, seed: int) -> None:
    """The MBF authors' pass over the data with labels sampled from the model."""
    if not isinstance(optimizer, curvlib.CurvatureOptimizer):
        raise TypeError(f"{type(optimizer).__name__} has no warm start")
    generator = torch.Generator().manual_seed(seed)

    def loss(batch: Split) -> Tensor:
        outputs = model(batch.inputs)
        drawn = curvlib.sample_labels(outputs, problem.likelihood, generator)
        if problem.likelihood == "categorical":
            return problem.loss(outputs, Split(batch.inputs, drawn))
        return problem.loss(outputs, Split(drawn, batch.labels))

    optimizer.warm_start(batches(train, problem.batch_size, seed, 0, len(train) // problem.batch_size), loss)


def _save(file: Path, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    content: dict[str, Any] = {
        "run": {**vars(run), "points": [vars(point) for point in run.points]},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(file, buffer.getvalue())


def _load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Run:
    if not file.is_file():
        return Run()
    try:
        content = torch.load(file, weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        points = [Point(**point) for point in content["run"].pop("points")]
        return Run(**content["run"], points=points)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{file} does not fit this run ({reason}); remove it, and the run starts anew") from error
