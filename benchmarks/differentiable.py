"""How exact and how fast Taylor and Padé roots are: errors over condition numbers, and time against an eigendecomposition.

    python -m benchmarks.differentiable --out results/differentiable

Matrices of size 64 in float32 with a log-uniform spectrum, against float64 eigh: relative Frobenius errors of the root, of
the inverse root, and of its gradient. Times: forward and backward of the inverse roots of a batch, paired with eigh's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from curvlib import matrix_inverse_sqrt, matrix_sqrt
from curvlib.differentiable import Method

from .records import environment, write_whole

CONDITIONS = (1e1, 1e2, 1e3, 1e4)
METHODS: tuple[Method, ...] = ("taylor", "pade", "eigh")


def matrices(condition: float, count: int, size: int) -> Tensor:
    """A batch in float64."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64, generator=generator))[0]
    return (q * condition ** -torch.linspace(0, 1, size, dtype=torch.float64)) @ q.mT


def errors(method: Method, condition: float, size: int = 64) -> dict[str, float]:
    """Worst relative errors of four matrices: root, inverse root, gradient of a weighted sum of the inverse root."""
    exact = matrices(condition, 4, size).requires_grad_()
    weight = torch.randn(4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low = exact.detach().float().requires_grad_()
    wanted, found = matrix_inverse_sqrt(exact, "eigh"), matrix_inverse_sqrt(low, method)
    (wanted * weight).sum().backward()
    (found * weight.float()).sum().backward()
    assert exact.grad is not None
    assert low.grad is not None

    def error(one: Tensor, other: Tensor) -> float:
        return float(((one.double() - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))).max())

    root = error(matrix_sqrt(low.detach(), method), matrix_sqrt(exact.detach(), "eigh"))
    return {"root": root, "inverse": error(found.detach(), wanted.detach()), "gradient": error(low.grad, exact.grad)}


def ratio(method: Method, count: int, size: int, repeats: int) -> float:
    """Median time of forward and backward over eigh's, paired."""
    matrix = matrices(100.0, count, size).float()

    def once(how: Method) -> float:
        given = matrix.clone().requires_grad_()
        began = time.perf_counter()
        matrix_inverse_sqrt(given, how).sum().backward()
        return time.perf_counter() - began

    for _ in range(2):
        once(method), once("eigh")
    pairs = [(once(method), once("eigh")) for _ in range(repeats)]
    return statistics.median(mine / theirs for mine, theirs in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``differentiable.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.differentiable",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results/differentiable"), help="folder for the numbers")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs")
    options = parser.parse_args(arguments)
    console = Console()
    if options.repeats < 1:
        console.print("error: --repeats must be a whole number from 1", style="red", highlight=False)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        console.print(f"error: --out {options.out}: {problem.strerror}", style="red", highlight=False, markup=False)
        return 2
    torch.set_num_threads(1)
    found = {f"{method} | {condition:g}": errors(method, condition) for method in METHODS for condition in CONDITIONS}
    table = Table("Method", "condition", "root", "inverse root", "gradient", title="Relative errors, n = 64, float32")
    for name, one in found.items():
        table.add_row(*name.split(" | "), *(f"{one[what]:.1e}" for what in ("root", "inverse", "gradient")))
    console.print(table)
    times = {
        f"{method} | {count} x {size}": ratio(method, count, size, options.repeats)
        for method in METHODS[:2]
        for count, size in ((1024, 8), (256, 32), (64, 64), (8, 256))
    }
    table = Table("Method", "batch x size", "× eigh", title="Inverse roots, forward and backward, one thread")
    for name, value in times.items():
        table.add_row(*name.split(" | "), f"{value:.2f}")
    console.print(table)
    content = {"errors": found, "times": times, "repeats": options.repeats, "environment": environment()}
    write_whole(options.out / "differentiable.json", json.dumps(content, indent=1).encode())
    path = (options.out / "differentiable.json").resolve()
    console.print(f"Numbers: {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
