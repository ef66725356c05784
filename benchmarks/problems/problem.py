"""What a problem is: a model, data, a loss, a metric, a target and a budget, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from curvlib.labels import Likelihood

from ..data import Data, Split
from ..records import Point

_EVALUATED = 1000  # examples at once, or four batches


@dataclass(frozen=True)
class Metric:
    """What people quote besides the loss.

    Args:
        name: for tables, such as ``"accuracy"``.
        better: which is better.
        of: from outputs and a batch to the mean over its examples.
    """

    name: str
    better: Literal["lower", "higher"]
    of: Callable[[Tensor, Split], Tensor]


@dataclass(frozen=True)
class Target:
    """What counts as reached.

    Args:
        of: the running average of batch losses (weight 0.9), a held-out loss or a held-out metric.
        value: its value.
    """

    of: Literal["train", "test", "metric"]
    value: float

    def reached(self, point: Point, problem: Problem) -> bool:
        """Whether an evaluation is at the target."""
        if self.of == "metric" and problem.metric is not None and problem.metric.better == "higher":
            return point.metric >= self.value
        return float(getattr(point, self.of)) <= self.value


@dataclass(frozen=True)
class Problem:
    """One training problem.

    Args:
        name: how it is called on the command line.
        title: for tables and figures.
        source: where it comes from.
        build: a fresh model; its initialisation draws from torch's global generator.
        load: its data, from a folder or the default source.
        loss: from the model's outputs and a batch to the mean loss of its examples.
        likelihood: whose labels :func:`curvlib.sample_labels` draws.
        batch_size: examples a step; the last, incomplete batch is dropped.
        epochs: budget.
        target: what counts as reached.
        points: evaluations an epoch.
        metric: what people quote besides the loss.
        penalty: what is added to the training loss, of the model; held-out losses are without it.
        augment: from a batch's inputs and a generator to inputs of the same shape.
        decay: from the share of the budget that is spent to a factor of the step size; none keeps it constant.
        seconds: the published time budget, where there is one.
        tunable: what a search looks at: the training loss (``"train"``), or held-out ``"test"`` loss or ``"metric"``, of
            validation data where there are such.
    """

    name: str
    title: str
    source: str
    build: Callable[[Data], nn.Module]
    load: Callable[[Path | None], Data]
    loss: Callable[[Tensor, Split], Tensor]
    likelihood: Likelihood
    batch_size: int
    epochs: int
    target: Target
    points: int = 1
    metric: Metric | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    decay: Callable[[float], float] | None = None
    seconds: float | None = None
    tunable: Literal["train", "test", "metric"] = "train"


PROBLEMS: dict[str, Problem] = {}


def register(problem: Problem) -> Problem:
    """Make a problem known by its name.

    Raises:
        ValueError: where the name is taken.
    """
    if problem.name in PROBLEMS:
        raise ValueError(f"there is a problem {problem.name!r} already, {PROBLEMS[problem.name].title!r}")
    PROBLEMS[problem.name] = problem
    return problem


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, split: Split) -> tuple[float, float]:
    """The mean loss and metric over a split, in the model's evaluation mode; NaN where there is no metric."""
    training = model.training
    model.eval()
    loss = metric = 0.0
    size = min(_EVALUATED, 4 * problem.batch_size)
    for inputs, labels in zip(split.inputs.split(size), split.labels.split(size), strict=True):
        chunk = Split(inputs, labels)
        outputs = model(inputs)
        loss += float(problem.loss(outputs, chunk)) * len(chunk)
        metric += float(problem.metric.of(outputs, chunk)) * len(chunk) if problem.metric else float("nan")
    model.train(training)
    return loss / len(split), metric / len(split)


def penalised(loss: Tensor, problem: Problem, model: nn.Module) -> Tensor:
    """A mean loss of examples as it is trained on."""
    return loss if problem.penalty is None else loss + problem.penalty(model)


def steps_of(problem: Problem, data: Data, epochs: int) -> int:
    """The number of steps in a budget."""
    return epochs * (len(data.train) // problem.batch_size)


def batches(problem: Problem, split: Split, seed: int, start: int, stop: int) -> Iterator[Split]:
    """Batches number ``start`` to ``stop`` of a problem, augmented: functions of seed and number alone."""
    for number, batch in enumerate(shuffled(split, problem.batch_size, seed, start, stop), start):
        if problem.augment is not None:
            generator = torch.Generator().manual_seed(1_000_003 * number + seed)
            batch = Split(problem.augment(batch.inputs, generator), batch.labels)
        yield batch


def shuffled(split: Split, size: int, seed: int, start: int, stop: int) -> Iterator[Split]:
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
