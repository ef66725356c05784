"""What blocks per neuron cost as matrices, and as a window of the last gradients: one layer 784 -> 1000, batches of 1,000.

    python -m benchmarks.window --out results/window

Whole optimizer steps over the forward and backward pass of the same layer, paired, with MBF's blocks ``"output"``; and bytes.
``--matrices`` also measures the stored matrices, whose first refresh solves 1,000 systems of 785 (5 GB, about a minute).
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
from torch import nn
from torch.nn import functional as F

import curvlib

from .records import environment, write_whole


def measure(window: int | None, iterations: int) -> dict[str, float]:
    """Medians of steps over medians of passes, the time of the first step over a pass, and megabytes."""
    torch.manual_seed(0)
    model = nn.Linear(784, 1000)
    # Inverses of the matrices are solved at the first step only, so that later ones show what applying them costs.
    optimizer = curvlib.MBF(model, linear_blocks="output", window=window, refresh_every=10**6)
    inputs, targets = torch.rand(1000, 784), torch.rand(1000, 1000)
    passes, steps = [], []
    for _ in range(iterations + 1):
        optimizer.zero_grad()
        began = time.perf_counter()
        F.mse_loss(torch.tanh(model(inputs)), targets).backward()
        between = time.perf_counter()
        optimizer.step()
        passes.append(between - began)
        steps.append(time.perf_counter() - between)
    one = statistics.median(passes[1:])
    memory = optimizer.memory()
    size = sum(value for role, value in memory.items() if role not in ("workspace", "momentum", "grafting"))
    return {
        "step": statistics.median(steps[1:]) / one,
        "first": steps[0] / one,
        "megabytes": size / 1e6,
        "pass_ms": 1e3 * one,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``window.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.window", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/window"), help="folder for the numbers")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32, 64], help="lengths")
    parser.add_argument("--matrices", action="store_true", help="also the stored matrices")
    parser.add_argument("--iterations", type=int, default=20, help="timed iterations of each")
    options = parser.parse_args(arguments)
    console = Console()
    if min(*options.windows, options.iterations) < 1:
        console.print("error: --windows and --iterations must be whole numbers from 1", style="red", highlight=False)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        console.print(f"error: --out {options.out}: {problem.strerror}", style="red", highlight=False, markup=False)
        return 2
    torch.set_num_threads(1)
    lengths: list[int | None] = [*options.windows, *([None] if options.matrices else [])]
    found = {("matrices" if length is None else str(length)): measure(length, options.iterations) for length in lengths}
    table = Table(
        "Window", "step / pass", "first step / pass", "MB", title="784 -> 1000, blocks per neuron, one thread"
    )
    for name, one in found.items():
        table.add_row(name, f"{one['step']:.2f}", f"{one['first']:.1f}", f"{one['megabytes']:,.0f}")
    console.print(table)
    content = {"costs": found, "iterations": options.iterations, "environment": environment()}
    write_whole(options.out / "window.json", json.dumps(content, indent=1).encode())
    console.print(f"Numbers: {(options.out / 'window.json').resolve()}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
