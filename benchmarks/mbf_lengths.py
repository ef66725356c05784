"""Why MBF's row-major grouping trains the MNIST autoencoder where true blocks fail: it is the length of the steps.

    python -m benchmarks.mbf_lengths --data DIR --out results/mbf

Three optimizers with MBF's published settings, one for each grouping of linear layers, see the same gradients; only one of
them moves the weights. The first part asks the laboratory, along the row-major path, what each would have done: with d the
step, g the gradient and E the exact Fisher of the batch, the step overshoots where dᵀEd / gᵀd is above 1, and climbs where
it is above 2 (nothing is drawn where momentum leads uphill). The second part crosses them: each layer's step has the
direction of one grouping and the length of another. `docs/mbf.md` reads both.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import curvlib
from curvlib.analysis import Objective, Operator
from curvlib.analysis.figures import STYLE, as_svg
from curvlib.optimizers.mbf import PUBLISHED

from .data import Data, DataError, Split
from .problems import PROBLEMS, batches
from .records import environment, write_whole
from .runner import SMOOTHING, warm_start

GROUPINGS = ("row-major", "output-averaged", "input-averaged")
CODE = "6"
"""The code layer, 250 to 30, whose gradient is the largest."""

_LOOKS = {"row-major": ("#E69F00", "-"), "output-averaged": ("#B8A200", "--"), "input-averaged": ("#009E73", ":")}
_PROBLEM = PROBLEMS["mnist-autoencoder"]


@dataclass(frozen=True)
class Overshoot:
    """What one grouping's step of the code layer would do.

    Attributes:
        step: from 0.
        grouping: its name.
        length: ‖d‖.
        ratio: dᵀEd / gᵀd; infinite where the step leads uphill at once.
        change: -gᵀd + ½ dᵀEd, what the quadratic model says the loss does.
    """

    step: int
    grouping: str
    length: float
    ratio: float
    change: float


class Twin:
    """MBF with one grouping on a copy of the weights: it is asked for steps, and never keeps them."""

    def __init__(self, model: nn.Module, grouping: str, train: Split, seed: int) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = curvlib.MBF(self.model, **{**PUBLISHED, "linear_blocks": grouping})
        warm_start(_PROBLEM, self.model, self.optimizer, train, seed)

    def step(self, model: nn.Module) -> dict[str, Tensor]:
        """What would be subtracted from the weights of a model with gradients; name -> tensor."""
        given = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                gradient = given[name].grad
                assert gradient is not None
                parameter.copy_(given[name])
                parameter.grad = gradient.clone()
        self.optimizer.step()
        return {name: given[name].detach() - mine.detach() for name, mine in self.model.named_parameters()}


def overshoots(train: Split, steps: int = 100, every: int = 2, seed: int = 0) -> Iterator[Overshoot]:
    """Train with row-major blocks, and yield what every grouping would do to the code layer."""
    torch.manual_seed(seed)
    model = _PROBLEM.build(Data(train, train))
    twins = {grouping: Twin(model, grouping, train, seed) for grouping in GROUPINGS}
    for step, batch in enumerate(batches(_PROBLEM, train, seed, 0, steps)):
        _gradient(model, batch)
        moves = {grouping: twin.step(model) for grouping, twin in twins.items()}
        if step % every == every - 1:
            objective = Objective(model, _loss, batch.inputs, batch.inputs, "bernoulli")
            operator = Operator(objective, of=CODE, batch=len(batch))
            gradient = torch.cat([model.get_parameter(name).grad.flatten() for name in operator.names])  # type: ignore[union-attr]
            stacked = {g: torch.cat([move[name].flatten() for name in operator.names]) for g, move in moves.items()}
            images = operator @ torch.stack(list(stacked.values()), 1)
            for (grouping, d), image in zip(stacked.items(), images.mT, strict=True):
                cost, gain = float(d @ image), float(gradient @ d)
                ratio = cost / gain if gain > 0 else math.inf
                yield Overshoot(step, grouping, float(d.norm()), ratio, cost / 2 - gain)
        _move(model, moves["row-major"])


def crossed(train: Split, directions: str, lengths: str, epochs: int, seed: int = 0) -> list[float]:
    """The running average of the training loss after every epoch; ends with infinity where training diverges."""
    torch.manual_seed(seed)
    model = _PROBLEM.build(Data(train, train))
    twins = {grouping: Twin(model, grouping, train, seed) for grouping in {directions, lengths}}
    each = len(train) // _PROBLEM.batch_size
    losses: list[float] = []
    average = math.nan
    for step, batch in enumerate(batches(_PROBLEM, train, seed, 0, epochs * each)):
        loss = _gradient(model, batch)
        average = loss if step == 0 else SMOOTHING * average + (1 - SMOOTHING) * loss
        if not math.isfinite(loss) or loss > 1e4:
            return [*losses, math.inf]
        moves = {grouping: twin.step(model) for grouping, twin in twins.items()}
        for layer in {name.rpartition(".")[0] for name in moves[directions]}:
            mine = [name for name in moves[directions] if name.rpartition(".")[0] == layer]
            have, want = (torch.cat([moves[g][name].flatten() for name in mine]).norm() for g in (directions, lengths))
            for name in mine:
                moves[directions][name] *= torch.where(have > 0, want / have, 0.0)
        _move(model, moves[directions])
        if (step + 1) % each == 0:
            losses.append(average)
    return losses


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def _gradient(model: nn.Module, batch: Split) -> float:
    model.zero_grad()
    loss = _PROBLEM.loss(model(batch.inputs), batch)
    loss.backward()
    return loss.item()


@torch.no_grad()
def _move(model: nn.Module, move: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.sub_(move[name])


def draw(seen: Sequence[Overshoot], trained: Mapping[tuple[str, str], Sequence[float]]) -> Figure:
    """Overshoot along the row-major path (left), and training with crossed directions and lengths (right)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for grouping in GROUPINGS:
            mine = [one for one in seen if one.grouping == grouping]
            colour, dash = _LOOKS[grouping]
            ratios = [one.ratio if math.isfinite(one.ratio) else math.nan for one in mine]
            left.plot([one.step for one in mine], ratios, color=colour, linestyle=dash, linewidth=1.5, label=grouping)
        left.axhline(2, color="0.4", linewidth=0.8)
        for refresh in range(0, seen[-1].step, PUBLISHED["refresh_every"]):
            left.axvline(refresh, color="0.75", linewidth=0.8, zorder=0)
        left.annotate("climbs above", (0, 2), (3, 3), textcoords="offset points", fontsize=7.5)
        left.set_yscale("log")
        left.set_ylim(1e-3, 30)
        left.set_xlabel("steps with row-major blocks (vertical lines: refreshes)")
        left.set_ylabel("overshoot of the code layer's step")
        left.legend(frameon=False, fontsize=8)
        for (directions, lengths), losses in trained.items():
            colour, dash = _LOOKS[directions][0], "-" if directions == lengths else "--"
            label = f"{directions}" if directions == lengths else f"{directions}, lengths of {lengths}"
            if math.isfinite(losses[-1]):
                right.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=dash, label=label)
        failed = [f"{d}, lengths of {n}" for (d, n), losses in trained.items() if math.isinf(losses[-1])]
        right.annotate(
            "\n".join(["diverged:", *failed]),
            (0.98, 0.72),
            xycoords="axes fraction",
            fontsize=7.5,
            ha="right",
            va="top",
        )
        right.set_xlabel("epochs")
        right.set_ylabel("training loss (running average)")
        right.set_ylim(50, 160)
        right.legend(frameon=False, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write ``lengths.json`` and ``lengths.svg``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mbf_lengths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the IDX files of MNIST (default: download)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/mbf"), metavar="DIR", help="folder for results")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="of the crossed trainings (default 10)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.epochs < 1:
        console.print(
            f"error: --epochs must be a whole number from 1, got {options.epochs}", style="red", highlight=False
        )
        return 2
    try:
        train = _PROBLEM.load(options.data).train
    except DataError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    seen = list(overshoots(train))
    table = Table("Blocks", "median overshoot", "largest", "median length", title="The code layer's step")
    for grouping in GROUPINGS:
        mine = [one for one in seen if one.grouping == grouping]
        ratios, norms = sorted(one.ratio for one in mine), sorted(one.length for one in mine)
        middle = len(mine) // 2
        table.add_row(grouping, *(f"{value:.3g}" for value in (ratios[middle], ratios[-1], norms[middle])))
    console.print(table)
    trained: dict[tuple[str, str], list[float]] = {}
    table = Table("Directions of", "lengths of", "loss after each epoch", title="Crossed")
    for pair in product(GROUPINGS, GROUPINGS):
        if pair[0] == pair[1] or "row-major" in pair:
            losses = trained[pair] = crossed(train, *pair, options.epochs)
            table.add_row(*pair, ", ".join("diverged" if math.isinf(loss) else f"{loss:.1f}" for loss in losses))
    console.print(table)
    content = {
        "overshoots": [asdict(one) for one in seen],
        "crossed": [{"directions": d, "lengths": n, "losses": losses} for (d, n), losses in trained.items()],
        "environment": environment(),
    }
    write_whole(options.out / "lengths.json", json.dumps(content, indent=1).encode())
    write_whole(options.out / "lengths.svg", as_svg(draw(seen, trained)).encode())
    console.print(f"Figure: {(options.out / 'lengths.svg').resolve()}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
