"""One run: a problem trained by a method from a seed, resumable at any step, with a clock that stops for all else."""

from __future__ import annotations

import inspect
import io
import math
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import curvlib

from .clock import REST, Clock, Peak
from .data import Data, Split
from .environment import commit, environment
from .methods import memory, method, module_of
from .naming import problem as problem_named
from .problems import Problem, batches, evaluate, steps_of
from .records import Point, Record, RecordError, Results, Spec, write_whole

Progress = Callable[[float, float], None]
Watch = Callable[[Point], bool]
SMOOTHING = 0.9
CHECKPOINT_SECONDS = 10.0
_FIRST = 10_000  # examples whose mean loss a run starts from


@dataclass
class Run:
    """A run in progress; everything but model, optimizer and clock.

    Attributes:
        step: steps taken.
        average: the running average of batch losses.
        points: evaluations so far.
        peak: most bytes held so far.
        commits: code versions that took part.
    """

    step: int = 0
    average: float = math.nan
    points: list[Point] = field(default_factory=list)
    peak: int = 0
    commits: list[str] = field(default_factory=list)


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

    def spent(self, step: int) -> float:
        """The share of the budget that is used up."""
        steps = self.steps
        return step / steps if steps is not None else min(1.0, self.clock.seconds / (self.spec.seconds or math.inf))


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


def execute(
    spec: Spec,
    data: Data,
    results: Results,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Record | None:
    """Run, or go on where a checkpoint stands; a finished run is only read.

    Args:
        spec: what to run.
        data: its data.
        results: where records and checkpoints are kept.
        progress: called after every step with the share of the budget that is used up and the running average; it may
            raise KeyboardInterrupt to stop the run.
        device: where to train.
        watch: called at every evaluation; says whether the run is to be pruned.

    Returns:
        The record; none where another process is busy with this run.

    Raises:
        KeyboardInterrupt: after saving a checkpoint, if a step was taken.
        RecordError: where a file of this run is damaged or cannot be written.
    """
    if (done := results.known(spec)) is not None:
        return done
    lock = results.claim(spec)
    if lock is None:
        return None
    try:
        done = results.known(spec)  # another process may have finished it meanwhile
        if done is None:
            done = _run(spec, data, results, progress, device, watch)
        return done
    finally:
        results.leave(spec, lock)


def _run(
    spec: Spec, data: Data, results: Results, progress: Progress | None, device: str, watch: Watch | None
) -> Record:
    problem, chosen = problem_named(spec.problem), method(spec.method)
    settings = dict(spec.settings)
    warms = settings.pop("warm_start", False)
    _seed(spec.seed)
    model = problem.build(data).to(device)
    optimizer = chosen.optimizer(model, settings)
    bench = Bench(spec, problem, _moved(data, device), model, optimizer, Clock(device), device)
    checkpoint = results.checkpoint(spec)
    run = _load(checkpoint, bench)
    if commit() not in run.commits:
        run.commits.append(commit())
    if run.step == 0 and warms:
        warm_start(problem, model, optimizer, bench.data.train, spec.seed)
    peak, before = Peak(device), run.peak
    with held_interrupts() as interrupted:

        def save() -> None:
            run.peak = max(before, peak.read())
            write_whole(checkpoint, _content(run, bench))

        status = _train(run, bench, save, progress, interrupted, watch)
        notes = [data.note] if data.note else []
        if len(run.commits) > 1:
            notes.append(f"Stopped and resumed under several code versions: {', '.join(run.commits)}.")
        record = Record(
            spec,
            status,
            tuple(run.points),
            statistics.median(bench.clock.times),
            memory(optimizer),
            environment(device, module_of(spec.method)),
            bench.clock.parts,
            max(before, peak.read()),
            " ".join(notes),
        )
        results.add(record)
        results.known(spec)
    return record


def _train(
    run: Run,
    bench: Bench,
    save: Callable[[], None],
    progress: Progress | None,
    interrupted: Callable[[], bool],
    watch: Watch | None,
) -> str:
    problem, data, clock, steps = bench.problem, bench.data, bench.clock, bench.steps
    every = max(1, steps_of(problem, data, 1) // problem.points)
    saved = time.monotonic()
    if run.step == 0:
        run.average, _ = evaluate(bench.model, problem, data.train.first(_FIRST))
        run.points.append(Point(0, 0.0, run.average, *evaluate(bench.model, problem, data.test)))
    arriving = batches(problem, data.train, bench.spec.seed, run.step, steps or 1 << 62)
    while (spent := bench.spent(run.step)) < 1:
        _pace(bench, spent)
        loss = _step(bench, arriving)
        run.step += 1
        run.average = SMOOTHING * run.average + (1 - SMOOTHING) * loss if run.step > 1 else loss
        diverged, over = not math.isfinite(loss), bench.spent(run.step) >= 1
        if diverged or over or run.step % every == 0:
            judged = (math.nan, math.nan) if diverged else evaluate(bench.model, problem, data.test)
            run.points.append(Point(run.step, clock.seconds, run.average, *judged))
            if not (diverged or over) and watch is not None and watch(run.points[-1]):
                return "pruned"
        if diverged:
            return "diverged"
        try:
            if progress is not None:
                progress(bench.spent(run.step), run.average)
            if interrupted():
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            save()
            raise
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    return "finished"


def _step(bench: Bench, arriving: Iterator[Split]) -> float:
    """One training step, timed; the loss, or NaN where gradients are no longer finite."""
    problem, model, optimizer, clock = bench.problem, bench.model, bench.optimizer, bench.clock

    def gradients() -> Tensor:
        """What a method may want to see once more after its step."""
        with clock.phase(REST):
            optimizer.zero_grad()
        with clock.phase("forward and backward"), torch.enable_grad():
            outputs = model(batch.inputs)
            loss = problem.loss(outputs, batch)
            retain = False
            if isinstance(optimizer, curvlib.CurvatureOptimizer):
                optimizer.observe(outputs, problem.likelihood, loss=loss)
                retain = optimizer.needs_graph
            loss.backward(retain_graph=retain)
        return loss.detach()

    with clock.step():
        batch = next(arriving)
        try:
            if _wants_closure(type(optimizer)):
                with clock.phase("precondition and apply"):
                    loss = torch.as_tensor(optimizer.step(gradients))  # type: ignore[arg-type]
            else:
                loss = gradients()
                with clock.phase("precondition and apply"):
                    optimizer.step()
            return float(loss)
        except (curvlib.NonFiniteGradient, torch.linalg.LinAlgError):
            return math.nan


def _pace(bench: Bench, spent: float) -> None:
    """Step sizes after a share of the budget."""
    if bench.problem.decay is not None:
        for group in bench.optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * bench.problem.decay(spent)


def _wants_closure(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether a step evaluates the model by itself: ours may do so again, and such as L-BFGS cannot do without."""
    if issubclass(kind, curvlib.CurvatureOptimizer):
        return True
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def warm_start(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, train: Split, seed: int) -> None:
    """The MBF authors' pass over the data with labels sampled from the model."""
    if not isinstance(optimizer, curvlib.CurvatureOptimizer):
        raise TypeError(f"{type(optimizer).__name__} has no warm start")
    generator = torch.Generator(train.inputs.device).manual_seed(seed)

    def loss(batch: Split) -> Tensor:
        outputs = model(batch.inputs)
        optimizer.observe(outputs, problem.likelihood)  # for methods that draw labels of their own
        drawn = curvlib.sample_labels(outputs, problem.likelihood, generator)
        if problem.likelihood == "categorical":
            return problem.loss(outputs, Split(batch.inputs, drawn))
        return problem.loss(outputs, Split(drawn, batch.labels))

    each = len(train) // problem.batch_size
    optimizer.warm_start(batches(problem, train, seed, 0, each), loss)


def _moved(data: Data, device: str) -> Data:
    if device == "cpu":
        return data
    splits = [Split(one.inputs.to(device), one.labels.to(device)) for one in (data.train, data.test)]
    return replace(data, train=splits[0], test=splits[1])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


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


def _content(run: Run, bench: Bench) -> bytes:
    clock = bench.clock
    content: dict[str, Any] = {
        "run": {**vars(run), "points": [asdict(point) for point in run.points]},
        "clock": {"seconds": clock.seconds, "parts": clock.parts, "times": clock.times},
        "model": bench.model.state_dict(),
        "optimizer": bench.optimizer.state_dict(),
        "random": _random_states(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _load(file: Path, bench: Bench) -> Run:
    if not file.is_file():
        return Run()
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
        bench.model.load_state_dict(content["model"])
        bench.optimizer.load_state_dict(content["optimizer"])
        vars(bench.clock).update(content["clock"])
        _restore(content["random"])
        points = [Point(**point) for point in content["run"].pop("points")]
        return Run(**content["run"], points=points)
    except Exception as error:  # damaged bytes make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{file} does not fit this run ({reason}); remove it, and the run starts anew") from error
