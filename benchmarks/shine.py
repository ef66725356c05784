"""Hypergradients from the forward's estimate: how near they come to the exact ones, and what they cost.

    python -m benchmarks.shine

The first table: two small deep equilibrium layers, a contraction, z = tanh(W z + U x) with rows of W no longer than 0.9, and
a residual one, z = LayerNorm(relu(z + W₂ relu(W₁ z + U x))), trained on the handwritten digits with exact hypergradients,
once per seed; then on one batch every backward against a dense solve: cosine and relative error of the gradient of the
layer's parameters, and the time of the backward pass over that of the iterative exact one, paired.

The second: the strength of the ℓ2 regularisation of softmax regression on half of the digits' training set (HOAG's problem),
by descent on the hypergradient of the loss on the other half; every method from the same start and with the same tolerances.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from curvlib.implicit import DeepEquilibrium, Implicit, Objective, hypergradient
from curvlib.quasi_newton import LbfgsInverse
from curvlib.solving import Broyden, Lbfgs, lbfgs

from .data import Data, digits
from .records import environment, write_whole

FORWARD = Broyden(iterations=60, memory=60, tolerance=1e-5)
ADJOINT = Broyden(iterations=100, memory=100, tolerance=1e-5, relative=True)

BACKWARDS: Mapping[str, tuple[Implicit, bool]] = {
    "exact": (Implicit(FORWARD, "exact", adjoint=ADJOINT), False),
    "SHINE, fallback 1.8": (Implicit(FORWARD, "shine", adjoint=ADJOINT), False),
    "SHINE": (Implicit(FORWARD, "shine", None, adjoint=ADJOINT), False),
    "SHINE, refined by 5": (Implicit(FORWARD, "shine", None, 5, ADJOINT), False),
    "SHINE, OPA": (Implicit(FORWARD, "shine", None, adjoint=ADJOINT), True),
    "SHINE, adjoint Broyden": (Implicit(replace(FORWARD, update="adjoint"), "shine", None, adjoint=ADJOINT), False),
    "SHINE, adjoint Broyden, OPA": (Implicit(replace(FORWARD, update="adjoint"), "shine", None, adjoint=ADJOINT), True),
    "Jacobian-free": (Implicit(FORWARD, "jacobian-free", adjoint=ADJOINT), False),
    "Jacobian-free, refined by 5": (Implicit(FORWARD, "jacobian-free", refine=5, adjoint=ADJOINT), False),
}
"""Settings, and whether the forward solve is told the loss."""

BILEVEL: Mapping[str, tuple[Literal["exact", "shine", "jacobian-free"], bool, int]] = {
    "exact (CG)": ("exact", False, 0),
    "SHINE": ("shine", False, 0),
    "SHINE, OPA": ("shine", True, 0),
    "SHINE, refined by 5": ("shine", False, 5),
    "Jacobian-free": ("jacobian-free", False, 0),
}
"""Backward, outer-problem awareness, steps of refinement."""


class Contraction(nn.Module):
    """tanh(W z + U x), of ``size`` entries, where Σ_j |W_ij| <= 0.9 (El Ghaoui et al. 2021)."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.inject, self.again = nn.Linear(inputs, size), nn.Linear(size, size, bias=False)
        nn.init.normal_(self.again.weight, std=0.4 / size**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Compute the next z, ``[n, size]``."""
        weight = self.again.weight
        bounded = weight / (weight.abs().sum(1, keepdim=True) / 0.9).clamp_min(1.0)
        return torch.tanh(F.linear(z, bounded) + self.inject(x))


class Residual(nn.Module):
    """LayerNorm(relu(z + W₂ relu(W₁ z + U x))), of ``size`` entries."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.inject, self.up = nn.Linear(inputs, size), nn.Linear(size, size, bias=False)
        self.down, self.norm = nn.Linear(size, size, bias=False), nn.LayerNorm(size)
        for weight in (self.up.weight, self.down.weight):
            nn.init.normal_(weight, std=0.3 / size**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Compute the next z, ``[n, size]``."""
        return self.norm(F.relu(z + self.down(F.relu(self.up(z) + self.inject(x)))))


CELLS: Mapping[str, type[Contraction] | type[Residual]] = {"contraction": Contraction, "residual": Residual}


class Classifier(nn.Module):
    """A deep equilibrium layer and a linear one."""

    def __init__(self, cell: str, settings: Implicit, size: int = 64) -> None:
        super().__init__()
        self.body = DeepEquilibrium(CELLS[cell](64, size), settings, start=lambda x: x.new_zeros(len(x), size))
        self.head = nn.Linear(size, 10)

    def loss(self, inputs: Tensor, labels: Tensor, aware: bool) -> Tensor:
        """Cross entropy; with ``aware`` the forward solve is told its gradient."""

        def outer(z: Tensor) -> Tensor:
            with torch.enable_grad():
                argument = z.detach().requires_grad_()
                loss = F.cross_entropy(self.head(argument), labels)
                return torch.autograd.grad(loss, argument)[0]

        return F.cross_entropy(self.head(self.body(inputs, outer if aware else None)), labels)


def explicit(model: Classifier, inputs: Tensor, labels: Tensor) -> Tensor:
    """Solve for the gradient of the layer's parameters, flat, by a dense solve with every sample's I - J, in float64."""
    root = model.body.root
    assert root is not None
    z = root.solution.detach().requires_grad_()
    image = model.body.layer(z, inputs)
    (slope,) = torch.autograd.grad(F.cross_entropy(model.head(image), labels), image, retain_graph=True)
    rows = [torch.autograd.grad(image[:, i].sum(), z, retain_graph=True)[0] for i in range(z.shape[1])]
    system = torch.eye(z.shape[1], dtype=torch.float64) - torch.stack(rows, 2).double()
    v = torch.linalg.solve(system, slope.double().unsqueeze(2)).squeeze(2).float()
    return torch.cat([one.reshape(-1) for one in torch.autograd.grad(image, list(model.body.parameters()), v)])


def equilibrium(cell: str, seed: int, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """Backward -> cosine, relative error, ratios of times to the exact backward's, iterations."""
    torch.manual_seed(seed)
    data = digits().train
    model = Classifier(cell, BACKWARDS["exact"][0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(data), (64,), generator=generator)
        optimizer.zero_grad()
        model.loss(data.inputs[rows], data.labels[rows], False).backward()
        optimizer.step()
    rows = torch.randint(0, len(data), (64,), generator=generator)
    inputs, labels = data.inputs[rows], data.labels[rows]

    def run(name: str) -> tuple[Tensor, float, float]:
        model.body.settings, aware = BACKWARDS[name]
        model.zero_grad()
        began = time.perf_counter()
        loss = model.loss(inputs, labels, aware)
        middle = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        # the head's gradient does not pass through the equilibrium
        flat = torch.cat([one.grad.reshape(-1) for one in model.body.parameters() if one.grad is not None])
        return flat, middle - began, ended - middle

    results = {}
    for name in BACKWARDS:
        found = run(name)[0]
        expected = explicit(model, inputs, labels)  # where this forward solve ended
        root = model.body.root
        assert root is not None
        pairs = [(run("exact")[1:], run(name)[1:]) for _ in range(repeats)]
        exact, mine = (torch.tensor(one) for one in zip(*pairs, strict=True))
        ratios = mine.median(0).values / exact.median(0).values
        results[name] = {
            "cosine": float(F.cosine_similarity(found, expected, dim=0)),
            "relative_error": float((found - expected).norm() / expected.norm()),
            "forward_time": float(ratios[0]),
            "backward_time": float(ratios[1]),
            "whole_time": float(mine.sum(1).median() / exact.sum(1).median()),
            "exact_backward_ms": 1e3 * float(exact.median(0).values[1]),
            "iterations": float(root.iterations.double().mean()),
            "converged": float(root.converged.double().mean()),
        }
    return results


def objectives(data: Data) -> tuple[Any, Any, Any, int]:
    """(inner, outer, loss on the test set, size), of weights and the logarithm of the regularisation, in float64."""
    inputs = torch.cat([data.train.inputs.double(), torch.ones(len(data.train), 1, dtype=torch.float64)], 1)
    tests = torch.cat([data.test.inputs.double(), torch.ones(len(data.test), 1, dtype=torch.float64)], 1)
    fit, held = slice(0, None, 2), slice(1, None, 2)
    size = inputs.shape[1] * 10

    def of(rows: Tensor, labels: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(rows @ w.reshape(-1, 10), labels)

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return of(inputs[fit], data.train.labels[fit], w) + theta.exp() * (w @ w) / 2

    def outer(w: Tensor, theta: Tensor) -> Tensor:
        return of(inputs[held], data.train.labels[held], w)

    return inner, outer, lambda w: of(tests, data.test.labels, w), size


def _at(objective: Objective, theta: Tensor, w: Tensor) -> Tensor:
    return objective(w, theta)


def _slope(objective: Objective, theta: Tensor, w: Tensor) -> Tensor:
    with torch.enable_grad():
        argument = w.detach().requires_grad_()
        return torch.autograd.grad(objective(argument, theta), argument)[0]


def bilevel(name: str, iterations: int, start: float) -> dict[str, list[float]]:
    """Losses, regularisation, seconds and errors of the hypergradient over the outer iterations of a method."""
    backward, aware, refine = BILEVEL[name]
    inner, outer, test, size = objectives(digits())
    theta = torch.tensor(start, dtype=torch.float64)
    w, estimate = torch.zeros(size, dtype=torch.float64), LbfgsInverse(60)
    keys = ("theta", "validation", "test", "seconds", "backward_seconds", "relative_error", "inner_iterations")
    trace: dict[str, list[float]] = {key: [] for key in keys}
    rate: float | None = None
    spent = 0.0
    for iteration in range(iterations):
        tolerance = max(1e-4 * 0.78**iteration, 1e-8)

        began = time.perf_counter()
        how = Lbfgs(2000, 60, tolerance)
        wanted = partial(_slope, outer, theta) if aware else None
        solved = lbfgs(partial(_at, inner, theta), w, how, inverse=estimate, outer=wanted)
        middle = time.perf_counter()
        found = hypergradient(
            inner, outer, theta, solved.solution, estimate, backward=backward, refine=refine, tolerance=tolerance
        )
        ended = time.perf_counter()
        w, spent = solved.solution, spent + ended - began
        exact = hypergradient(inner, outer, theta, w, backward="exact", tolerance=1e-10)
        entries = (
            float(theta),
            float(outer(w, theta)),
            float(test(w)),
            spent,
            ended - middle,
            float((found.value - exact.value).abs() / exact.value.abs()),
            float(solved.iterations),
        )
        for key, entry in zip(keys, entries, strict=True):
            trace[key].append(entry)
        # the first step has length 1, as HOAG's; no step is longer
        rate = rate or 1 / max(float(found.value.abs()), 1e-12)
        theta = theta - (rate * found.value).clamp(-1, 1)
    return trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``shine.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shine"), help="folder for the numbers")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the deep equilibrium layer")
    parser.add_argument("--steps", type=int, default=200, help="steps of training before it is measured")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of timed passes")
    parser.add_argument("--iterations", type=int, default=30, help="outer iterations of the bilevel problem")
    options = parser.parse_args(arguments)
    console = Console()
    if min(options.seeds, options.steps, options.repeats, options.iterations) < 1:
        console.print("error: --seeds, --steps, --repeats, --iterations must be whole numbers from 1", style="red")
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        console.print(f"error: --out {options.out}: {problem.strerror}", style="red", highlight=False, markup=False)
        return 2
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="conjugate gradients ended|L-BFGS ended|.*samples did not reach")
    layers = {
        cell: [equilibrium(cell, seed, options.steps, options.repeats) for seed in range(options.seeds)]
        for cell in CELLS
    }
    heads = ("cosine", "least", "relative error", "backward, × exact", "whole, × exact", "converged")
    for cell, measured in layers.items():
        table = Table("backward", *heads, title=f"{cell}: medians of {options.seeds} seeds")
        for name in BACKWARDS:
            of = {key: [one[name][key] for one in measured] for key in measured[0][name]}
            middle = {key: statistics.median(values) for key, values in of.items()}
            table.add_row(
                name,
                f"{middle['cosine']:.4f}",
                f"{min(of['cosine']):.4f}",
                f"{middle['relative_error']:.3f}",
                f"{middle['backward_time']:.2f}",
                f"{middle['whole_time']:.2f}",
                f"{middle['converged']:.2f}",
            )
        console.print(table)
    traces = {name: bilevel(name, options.iterations, 0.0) for name in BILEVEL}
    table = Table("bilevel", "validation", "test", "log λ", "seconds", "in backwards", "median error of hypergradient")
    for name, trace in traces.items():
        table.add_row(
            name,
            f"{trace['validation'][-1]:.4f}",
            f"{trace['test'][-1]:.4f}",
            f"{trace['theta'][-1]:.2f}",
            f"{trace['seconds'][-1]:.2f}",
            f"{sum(trace['backward_seconds']):.3f}",
            f"{statistics.median(trace['relative_error']):.3f}",
        )
    console.print(table)
    content = {
        "equilibrium": layers,
        "bilevel": traces,
        "options": {key: getattr(options, key) for key in ("seeds", "steps", "repeats", "iterations")},
        "environment": {**environment(), "precision": "float32; bilevel float64"},
    }
    write_whole(options.out / "shine.json", json.dumps(content, indent=1).encode())
    console.print(f"Numbers: {(options.out / 'shine.json').resolve()}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
