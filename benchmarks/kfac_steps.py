"""KFAC's first steps, and what a step costs: two tables.

    python -m benchmarks.kfac_steps --out results/kfac

The first: a perceptron 64-128-64-10 on the handwritten digits, batches of 128, training loss and accuracy on all data after
20 steps. The second: the MNIST autoencoder's shapes, batches of 1,000 random inputs, mean squared error, statistics at every
step and inverses at every 20th; whole iterations, paired with those of torch.optim.Adam on a twin model, step by step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import curvlib

from .data import digits
from .problems import autoencoder
from .records import environment, write_whole

Build = Callable[[nn.Module], torch.optim.Optimizer]

FIRST: Mapping[str, Mapping[str, Any]] = {
    "KFAC, data": {"labels": "data"},
    "KFAC, sampled": {"labels": "sampled"},
    "KFAC, exact": {"labels": "exact"},
    "KFAC, eigen": {"form": "eigen"},
}
"""With lr 0.1, damping 1e-3, inverses at every step, and neither momentum nor clip."""

COSTS: Mapping[str, Build] = {
    "KFAC": lambda model: curvlib.KFAC(model, 1e-3, refresh_every=20, dense_start=False),
    "KFAC, every second example": lambda model: curvlib.KFAC(
        model, 1e-3, refresh_every=20, dense_start=False, subsample=2
    ),
    "KFAC, labels drawn": lambda model: curvlib.KFAC(
        model, 1e-3, refresh_every=20, dense_start=False, labels="sampled"
    ),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
}


def first_steps(build: Build, seed: int, steps: int = 20) -> tuple[float, float]:
    """(training loss, accuracy) on all digits after some steps."""
    data = digits()
    inputs, labels = (
        torch.cat(both) for both in zip(*((s.inputs, s.labels) for s in (data.train, data.test)), strict=True)
    )
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = build(model)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        rows = order.roll(-128 * step)[:128]
        optimizer.zero_grad()
        logits = model(inputs[rows])
        if isinstance(optimizer, curvlib.CurvatureOptimizer):
            optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = model(inputs)
        right = (logits.argmax(1) == labels).float().mean()
        return float(F.cross_entropy(logits, labels)), float(right)


def cost(build: Build, iterations: int) -> dict[str, float]:
    """Ratios of whole iterations to Adam's, paired: of the sums, and of the medians."""
    inputs = torch.rand(1000, 784)

    def prepared(how: Build) -> Callable[[], float]:
        torch.manual_seed(0)
        model = autoencoder(784, 1000, 500, 250, 30, 250, 500, 1000, 784)
        optimizer = how(model)

        def iteration() -> float:
            began = time.perf_counter()
            optimizer.zero_grad()
            outputs = model(inputs)
            if isinstance(optimizer, curvlib.CurvatureOptimizer):
                optimizer.observe(outputs, "gaussian", scale=2 / 784)
            F.mse_loss(outputs, inputs).backward()
            optimizer.step()
            return time.perf_counter() - began

        return iteration

    mine, reference = prepared(build), prepared(COSTS["Adam"])
    for _ in range(3):
        mine(), reference()
    pairs = [(reference(), mine()) for _ in range(iterations)]
    adam, other = zip(*pairs, strict=True)
    return {
        "mean": sum(other) / sum(adam),
        "median": statistics.median(other) / statistics.median(adam),
        "adam_ms": 1e3 * statistics.median(adam),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``kfac.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kfac_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results/kfac"), help="folder for the numbers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to time with")
    parser.add_argument("--iterations", type=int, default=40, help="timed iterations of each")
    options = parser.parse_args(arguments)
    console = Console()
    if min(*options.threads, options.iterations, 1) < 1:
        console.print("error: --threads and --iterations must be whole numbers from 1", style="red", highlight=False)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        console.print(f"error: --out {options.out}: {problem.strerror}", style="red", highlight=False, markup=False)
        return 2
    shared = dict(lr=0.1, damping=1e-3, momentum=0.0, kl_clip=None, refresh_every=1)
    builds: dict[str, Build] = {"Adam, lr 1e-3": lambda model: torch.optim.Adam(model.parameters(), 1e-3)}
    for name, settings in FIRST.items():
        builds[name] = lambda model, settings=settings: curvlib.KFAC(model, **{**shared, **settings})  # type: ignore[misc]
    table = Table(
        "Optimizer", "seed 0", "seed 1", "seed 2", title="Digits, 64-128-64-10: loss / accuracy after 20 steps"
    )
    first: dict[str, list[tuple[float, float]]] = {}
    for name, build in builds.items():
        first[name] = [first_steps(build, seed) for seed in (0, 1, 2)]
        table.add_row(name, *(f"{loss:.3f} / {right:.2f}" for loss, right in first[name]))
    console.print(table)
    costs: dict[str, dict[str, float]] = {}
    table = Table("Optimizer", "threads", "mean", "median", title="MNIST autoencoder's shapes: an iteration, × Adam's")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, build in COSTS.items():
            measured = costs[f"{name} | {threads}"] = cost(build, options.iterations)
            table.add_row(name, str(threads), f"{measured['mean']:.2f}", f"{measured['median']:.2f}")
    console.print(table)
    content = {"first_steps": first, "costs": costs, "iterations": options.iterations, "environment": environment()}
    write_whole(options.out / "kfac.json", json.dumps(content, indent=1).encode())
    console.print(f"Numbers: {(options.out / 'kfac.json').resolve()}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
