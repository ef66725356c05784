"""LO-FI beside the filter that it approximates: error online and held out, as its memory grows, and what a step costs.

    python -m benchmarks.filtering --out results/filtering

Two streams, seen once, one example at a time, in float32: a regression (a random tanh network of 8 inputs, with noise of
0.1; the student has 8-20-1 units, 201 parameters, R = 0.01) and the handwritten digits (64-16-10, 1,210 parameters, R of
class probabilities). Parameters do not move (γ = 1, q = 0). Every filter takes the prior variance with the least online
error on a stream of its own, of which the best of a grid is chosen; other streams, initialisations and orders are measured.
Online is the mean over the stream of an example's error before it is learned; held out is the error of the last mean.
Regression: the root of the mean squared error, of which 0.1 is noise; digits: the share of wrong classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from curvlib.filtering import ExtendedKalmanFilter, LoFi, Observation

from .data import Split, digits
from .records import environment, write_whole

FILTERS: Mapping[str, Mapping[str, Any]] = {
    **{f"LO-FI, L = {memory}": {"memory": memory} for memory in (0, 1, 2, 5, 10, 20, 50)},
    **{f"LO-FI spherical, L = {memory}": {"memory": memory, "spherical": True} for memory in (1, 5, 10, 20)},
    "full": {},
}
"""What is compared: arguments of LoFi, or none for the dense filter; memory 0 keeps the diagonal only."""

PRIORS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Prior variances that are tried."""

NOISE = 0.1
"""Standard deviation of the regression's noise."""

TUNING = 1000
"""The seed on which priors are chosen."""


@dataclass(frozen=True)
class Stream:
    """A model, and examples to see once.

    Attributes:
        model: freshly initialised.
        train: in the order in which they are seen.
        test: held out.
        observation: the likelihood.
    """

    model: nn.Module
    train: Split
    test: Split
    observation: Observation

    @property
    def classes(self) -> bool:
        """Whether labels are class numbers."""
        return self.observation.likelihood == "categorical"


def regression(seed: int, length: int) -> Stream:
    """A network learns from another one, ``length`` noisy examples."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 1))
    with torch.no_grad():
        for one in teacher.parameters():
            one.normal_(0, 0.7)
        inputs = torch.randn(length + 1000, 8)
        labels = teacher(inputs) + NOISE * torch.randn(len(inputs), 1)
    train, test = Split(inputs[:length], labels[:length]), Split(inputs[length:], labels[length:])
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 1))
    return Stream(model, train, test, Observation(variance=NOISE**2))


def handwritten(seed: int, length: int) -> Stream:
    """The digits in a random order, up to ``length`` of them."""
    data = digits()
    torch.manual_seed(seed)
    order = torch.randperm(len(data.train))[:length]
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    train = Split(data.train.inputs[order], data.train.labels[order])
    return Stream(model, train, data.test, Observation("categorical"))


STREAMS = {"regression": regression, "digits": handwritten}


def errors(stream: Stream, outputs: Tensor, labels: Tensor) -> Tensor:
    """An error for every example: squared, or 1 where the class is wrong."""
    if stream.classes:
        return (outputs.argmax(-1) != labels).float()
    return (outputs - labels).square().flatten()


def learn(stream: Stream, settings: Mapping[str, Any], prior: float) -> dict[str, float]:
    """Errors online and held out, and the median milliseconds of a step."""
    shared: dict[str, Any] = {"prior_variance": prior, "observation": stream.observation}
    model = stream.model
    learner = LoFi(model, **settings, **shared) if settings else ExtendedKalmanFilter(model, **shared)
    online, seconds = [], []
    for inputs, labels in zip(stream.train.inputs.split(1), stream.train.labels.split(1), strict=True):
        with torch.no_grad():
            online.append(errors(stream, model(inputs), labels))
        began = time.perf_counter()
        learner.step(inputs, labels)
        seconds.append(time.perf_counter() - began)
    with torch.no_grad():
        held = errors(stream, model(stream.test.inputs), stream.test.labels).mean()
    power = 1.0 if stream.classes else 0.5
    return {
        "online": float(torch.cat(online).mean() ** power),
        "held_out": float(held**power),
        "step_ms": 1e3 * statistics.median(seconds),
    }


def measure(name: str, settings: Mapping[str, Any], seeds: int, length: int) -> dict[str, Any]:
    """One filter on one stream: the prior that tuning chose, and errors on every seed."""
    build = STREAMS[name]
    tried = {prior: learn(build(TUNING, length), settings, prior)["online"] for prior in PRIORS}
    prior = min(tried, key=lambda one: tried[one])
    runs = [learn(build(seed, length), settings, prior) for seed in range(seeds)]
    result: dict[str, Any] = {"prior_variance": prior, "tried": tried, "runs": runs}
    for key in ("online", "held_out"):
        values = [run[key] for run in runs]
        result[key] = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if seeds > 1 else 0.0}
    result["step_ms"] = statistics.median(run["step_ms"] for run in runs)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``filtering.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.filtering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/filtering"), help="folder for the numbers")
    parser.add_argument("--seeds", type=int, default=5, help="streams that are measured")
    parser.add_argument("--length", type=int, default=1000, help="examples of a stream")
    options = parser.parse_args(arguments)
    console = Console()
    if min(options.seeds, options.length) < 1:
        console.print("error: --seeds and --length must be whole numbers from 1", style="red", highlight=False)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        console.print(f"error: --out {options.out}: {problem.strerror}", style="red", highlight=False, markup=False)
        return 2
    streams: dict[str, dict[str, Any]] = {}
    for stream in STREAMS:
        table = Table(Column("Filter", no_wrap=True), "prior", "online", "held out", "ms a step")
        table.title = f"{stream}: mean ± deviation"
        results = streams[stream] = {}
        for name, settings in FILTERS.items():
            found = results[name] = measure(stream, settings, options.seeds, options.length)
            shown = [f"{found[key]['mean']:.4f} ± {found[key]['deviation']:.4f}" for key in ("online", "held_out")]
            table.add_row(name, f"{found['prior_variance']:g}", *shown, f"{found['step_ms']:.2f}")
        console.print(table)
    content = {
        "streams": streams,
        "seeds": options.seeds,
        "length": options.length,
        "environment": environment(),
    }
    write_whole(options.out / "filtering.json", json.dumps(content, indent=1).encode())
    console.print(
        f"Numbers: {(options.out / 'filtering.json').resolve()}", highlight=False, markup=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
