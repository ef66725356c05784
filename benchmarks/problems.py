"""Problems: a model, data, a loss, a target and a budget, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlib.labels import Likelihood

from . import data
from .data import Data, Split
from .records import Point


@dataclass(frozen=True)
class Metric:
    """What people quote besides the loss."""

    name: str
    better: Literal["lower", "higher"]
    of: Callable[[Tensor, Split], Tensor]


@dataclass(frozen=True)
class Target:
    """What counts as reached: a running average of batch losses, a held-out loss or a held-out metric."""

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
        target: training loss (running average over batches, weight 0.9) that counts as reached.
        points: evaluations an epoch.
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
    seconds: float | None = None
    tunable: str = "train"


def autoencoder(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them, but for the code (the narrowest layer) and the output, which are linear."""
    layers: list[nn.Module] = []
    code = min(widths)
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        if outputs == code:
            layers.pop()
    return nn.Sequential(*layers[:-1])


def small_cnn() -> nn.Sequential:
    """Two 3×3 convolutions with 16 and 32 channels, each followed by ReLU and pooling, and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def reconstruction(outputs: Tensor, batch: Split) -> Tensor:
    """Binary cross-entropy with logits, summed over pixels, mean over examples."""
    return F.binary_cross_entropy_with_logits(outputs, batch.inputs, reduction="sum") / len(batch)


def classification(outputs: Tensor, batch: Split) -> Tensor:
    """Cross-entropy, mean over examples."""
    return F.cross_entropy(outputs, batch.labels)


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, split: Split) -> tuple[float, float]:
    """The mean loss over a split, in chunks of 1,000."""
    training = model.training
    model.eval()
    total = 0.0
    for inputs, labels in zip(split.inputs.split(1000), split.labels.split(1000), strict=True):
        chunk = Split(inputs, labels)
        total += float(problem.loss(model(inputs), chunk)) * len(chunk)
    model.train(training)
    return total / len(split), float("nan")


def steps_of(problem: Problem, data: Data, epochs: int) -> int:
    """The number of steps in a budget."""
    return epochs * (len(data.train) // problem.batch_size)


def batches(problem: Problem, split: Split, seed: int, start: int, stop: int) -> Iterator[Split]:
    """Batches number ``start`` to ``stop`` of a problem's size; see :func:`shuffled`."""
    return shuffled(split, problem.batch_size, seed, start, stop)


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


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "digits-autoencoder",
            "Autoencoder on digits",
            "scikit-learn's handwritten digits; 64-128-64-32-8-32-64-128-64",
            lambda _: autoencoder(64, 128, 64, 32, 8, 32, 64, 128, 64),
            data.digits,
            reconstruction,
            "bernoulli",
            batch_size=128,
            epochs=40,
            target=Target("train", 20.0),
        ),
        Problem(
            "digits-cnn",
            "Small CNN on digits",
            "scikit-learn's handwritten digits; two convolutions and a linear layer",
            lambda _: small_cnn(),
            data.digits,
            classification,
            "categorical",
            batch_size=128,
            epochs=15,
            target=Target("train", 0.1),
        ),
        Problem(
            "mnist-autoencoder",
            "Autoencoder on MNIST",
            "Hinton & Salakhutdinov 2006, as in the MBF, TNT and K-BFGS papers; 784-1000-500-250-30-250-500-1000-784",
            lambda _: autoencoder(784, 1000, 500, 250, 30, 250, 500, 1000, 784),
            data.mnist,
            reconstruction,
            "bernoulli",
            batch_size=1000,
            epochs=20,
            target=Target("train", 70.0),
        ),
    )
}
