"""One run: a problem trained by a method from a seed, resumable at any step, with a clock that stops for all else."""

from __future__ import annotations

import inspect
import math
import random
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

import curvlib

from .bench import Bench, Run, content, load
from .clock import REST, Clock, Peak
from .data import Data, Split
from .environment import commit, environment
from .methods import memory, method, module_of
from .naming import problem as problem_named
from .problems import Problem, batches, evaluate, penalised, steps_of
from .records import Point, Record, Results, Spec, write_whole

Progress = Callable[[float, float], None]
Watch = Callable[[Point], bool]
SMOOTHING = 0.9
CHECKPOINT_SECONDS = 10.0
_FIRST = 10_000  # examples whose mean loss a run starts from


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
    jobs: int = 1,
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
        jobs: how many runs share the machine; it is recorded.

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
            done = _run(spec, data, results, progress, device, watch, jobs)
        return done
    finally:
        results.leave(spec, lock)


def _run(
    spec: Spec, data: Data, results: Results, progress: Progress | None, device: str, watch: Watch | None, jobs: int
) -> Record:
    problem, chosen = problem_named(spec.problem), method(spec.method)
    settings = dict(spec.settings)
    warms = settings.pop("warm_start", False)
    checkpoint = results.checkpoint(spec)
    heard = list[str]()
    _seed(spec.seed)
    with gathered_warnings(heard):
        model = problem.build(data).to(device)
        optimizer = chosen.optimizer(model, settings)
        bench = Bench(spec, problem, data.to(device), model, optimizer, Clock(device), device)
        run = load(checkpoint, bench)
        for text in run.warnings:
            _gather(heard, text)
        run.warnings = heard
        if commit() not in run.commits:
            run.commits.append(commit())
        if run.step == 0 and warms:
            warm_start(problem, model, optimizer, bench.data.train, spec.seed)
        peak, before = Peak(device), run.peak

        def save() -> None:
            run.peak = max(before, peak.read())
            write_whole(checkpoint, content(run, bench))

        with held_interrupts() as interrupted:
            status = _train(run, bench, save, progress, interrupted, watch)
            several = f"Stopped and resumed under several code versions: {', '.join(run.commits)}."
            record = Record(
                spec,
                status,
                tuple(run.points),
                statistics.median(bench.clock.times),
                memory(optimizer),
                environment(device, module_of(spec.method), jobs),
                bench.clock.parts,
                max(before, peak.read()),
                data.note,
                [*heard, several] if len(run.commits) > 1 else heard,
            )
            results.add(record)
            results.known(spec)
    return record


@contextmanager
def gathered_warnings(texts: list[str]) -> Iterator[None]:
    """Gather what is warned of, each text once, instead of showing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # also what an earlier run has heard
        warnings.showwarning = lambda message, *_: _gather(texts, " ".join(str(message).split()))
        yield


def _gather(texts: list[str], text: str) -> None:
    """Add a text, unless another one says as much and more."""
    if not any(text in other for other in texts):
        texts[:] = [*(other for other in texts if other not in text), text]


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
        start, _ = evaluate(bench.model, problem, data.train.first(_FIRST))
        with torch.no_grad():
            run.average = float(penalised(torch.tensor(start, dtype=torch.float64), problem, bench.model))
        run.points.append(Point(0, 0.0, run.average, *evaluate(bench.model, problem, bench.judge)))
    arriving = batches(problem, data.train, bench.spec.seed, run.step, steps or 1 << 62)
    while (spent := bench.spent(run.step)) < 1:
        _pace(bench, spent)
        loss = _step(bench, arriving)
        run.step += 1
        run.average = SMOOTHING * run.average + (1 - SMOOTHING) * loss if run.step > 1 else loss
        diverged, over = not math.isfinite(loss), bench.spent(run.step) >= 1
        if diverged or over or run.step % every == 0:
            judged = (math.nan, math.nan) if diverged else evaluate(bench.model, problem, bench.judge)
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
            loss = penalised(problem.loss(outputs, batch), problem, model)
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
    if (decay := bench.decay) is not None:
        for group in bench.optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * decay(spent)


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


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
