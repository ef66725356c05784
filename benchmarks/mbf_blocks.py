"""Why MBF's linear groupings behave so differently: what their blocks do to the momentum between two refreshes.

    python -m benchmarks.mbf_blocks --data DIR

trains the MNIST autoencoder with MBF as published (row-major blocks, warm start) and keeps, beside it, the statistics of the
true output and input blocks, all averaged over the layer, on the same schedule. At the last step before a refresh it
compares, layer by layer, what each inverse makes of the momentum. `docs/mbf.md` reads the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import curvlib
from curvlib.moments import accumulate
from curvlib.optimizers.mbf import LINEAR_BLOCKS, PUBLISHED

from .data import DataError
from .problems import PROBLEMS, batches
from .runner import warm_start

GROUPINGS = ("row-major", "output-averaged", "input-averaged")
_REFRESH, _STATISTICS, _BETA = PUBLISHED["refresh_every"], PUBLISHED["statistics_every"], 0.9


@dataclass(frozen=True)
class Measured:
    """One grouping on one layer, at the end of a refresh period.

    Attributes:
        step: when.
        layer: (outputs, inputs with bias).
        grouping: its name.
        rank: effective rank of F, (Σλ)² / Σλ².
        size: of F.
        mean: mean eigenvalue of F.
        unseen: share of the momentum's energy along eigenvectors of F whose eigenvalue is below the damping.
        gain: ‖(F + λI)^-1 m‖ / ‖m‖.
        plain: the gain of the layer's mean curvature alone, 1 / (mean + λ).
        cosine: between (F + λI)^-1 m and m.
    """

    step: int
    layer: tuple[int, int]
    grouping: str
    rank: float
    size: int
    mean: float
    unseen: float
    gain: float
    plain: float
    cosine: float


def measure(folder: Path | None, steps: Sequence[int], seed: int = 0) -> Iterator[Measured]:
    """Train, and yield what is measured at each of ``steps`` (counted from 0)."""
    problem = PROBLEMS["mnist-autoencoder"]
    data = problem.load(folder)
    train = data.train
    torch.manual_seed(seed)
    model = problem.build(data)
    optimizer = curvlib.MBF(model, **PUBLISHED)
    warm_start(problem, model, optimizer, train, seed)
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    layouts = {
        (layer, name): curvlib.Partition(LINEAR_BLOCKS[name]).layout(
            {"o": layer.out_features, "i": layer.in_features}, ("i",)
        )
        for layer in layers
        for name in GROUPINGS
    }
    live = {key: torch.zeros(1, *[layout.regions[0].factors[0].size] * 2) for key, layout in layouts.items()}
    frozen = {key: value.clone() for key, value in live.items()}
    momentum = {layer: torch.zeros(1, layer.out_features, layer.in_features + 1) for layer in layers}
    for step, batch in enumerate(batches(problem, train, seed, 0, max(steps) + 1)):
        optimizer.zero_grad()
        problem.loss(model(batch.inputs), batch).backward()
        for layer in layers:
            assert layer.weight.grad is not None
            assert layer.bias.grad is not None
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)[None]
            momentum[layer] = 0.9 * momentum[layer] + gradient
            for name in GROUPINGS:
                layout = layouts[layer, name]
                if step % _STATISTICS == 0:
                    keep = _BETA if step else 0.0
                    accumulate(live[layer, name], layout.block(gradient)[0], 0, keep, 1 - keep)
                if step % _REFRESH == 0:
                    frozen[layer, name].copy_(live[layer, name])
                if step in steps:
                    block = layout.block(momentum[layer])[0][0].double()
                    yield _measured(step, layer, name, frozen[layer, name][0].double(), block)
        optimizer.step()


def _measured(step: int, layer: nn.Linear, name: str, factor: Tensor, momentum: Tensor) -> Measured:
    damping = PUBLISHED["damping"]
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(0)
    along = momentum @ vectors
    direction = along / (values + damping)
    energy = along.pow(2).sum(0)
    mean = values.mean().item()
    return Measured(
        step,
        (layer.out_features, layer.in_features + 1),
        name,
        (values.sum() ** 2 / values.pow(2).sum()).item(),
        len(values),
        mean,
        (energy[values < damping].sum() / energy.sum()).item(),
        (direction.norm() / along.norm()).item(),
        1 / (mean + damping),
        ((direction * along).sum() / (direction.norm() * along.norm())).item(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mbf_blocks", description=__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the IDX files of MNIST (default: download)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[74, 149], metavar="N", help="when to measure, from 0")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        "step", "layer", "blocks", "effective rank", "mean eigenvalue", "unseen", "gain", "1/(mean+λ)", "cosine"
    )
    try:
        for one in measure(options.data, options.steps):
            table.add_row(
                str(one.step),
                f"{one.layer[0]}×{one.layer[1]}",
                one.grouping,
                f"{one.rank:.1f} of {one.size}",
                f"{one.mean:.1e}",
                f"{one.unseen:.2f}",
                f"{one.gain:.0f}",
                f"{one.plain:.0f}",
                f"{one.cosine:.2f}",
            )
    except DataError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
