"""Step sizes of layers from their blocks of the Hessian (Bahamou & Goldfarb 2023).

With d_l the direction of a layer (of a parameter, or a weight and its joined bias) that any method has found, g_l the batch
gradient and H_ll the layer's block of the batch's Hessian::

    α_l = min(largest, EMA(g_lᵀd_l) / (max(0, EMA(d_lᵀ H_ll d_l)) + λ EMA(d_lᵀd_l)))
    w_l <- w_l - lr α_l d_l

α_l minimises the quadratic model of the loss along -d_l; where d_l was zero whenever it was measured, it is the largest. A
product with a block is one backward pass through the gradient's graph, cut down to that layer. The paper's text could not be
had: averages, λ and the bound are what its abstract leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .checks import Number, check_number, check_period, number, period
from .cohort import Group
from .distributed import Exchange
from .ears import TapError
from .engine import Direction
from .models import Model, decide
from .passes import Passes, Slopes


@dataclass(frozen=True)
class Layerwise(Model):
    """A step size for every layer, from the Hessian's diagonal block of that layer, see :mod:`curvlib.layerwise`.

    Needs ``optimizer.observe(loss=loss)`` before ``loss.backward(retain_graph=True)``.

    Args:
        damping: λ.
        beta: β of the averages.
        largest: largest step size.
        every: T: a layer is measured at every T-th step, the layers in turn; all at the first.
    """

    needs: ClassVar[str] = "loss"
    scalars: ClassVar[tuple[str, ...]] = ("slope", "bend", "square")

    damping: Number = 1e-3
    beta: Number = 0.9
    largest: Number = 1.0
    every: int = 10

    def __post_init__(self) -> None:
        check_number("damping", self.damping)
        check_number("beta", self.beta, high=1.0)
        check_number("largest", self.largest, strict=True)
        check_period("every", self.every)


@decide.register(Layerwise)
def _(
    model: Layerwise,
    finished: Iterable[Direction],
    passes: Passes,
    parameters: Sequence[Tensor],
    settings: Sequence[Group],
    gate: Tensor | None,
    exchange: Exchange | None = None,
) -> None:
    if not passes.slopes:
        raise TapError(
            "step sizes of layers need optimizer.observe(loss=loss) before backward, or loss.backward(create_graph=True)"
        )
    scale_steps(model, finished, passes.slopes, settings, gate, exchange)


def scale_steps(
    model: Layerwise,
    finished: Iterable[Direction],
    seen: Sequence[Slopes],
    groups: Sequence[Group],
    gate: Tensor | None = None,
    exchange: Exchange | None = None,
) -> None:
    """Multiply every direction whose rule has this model by the step size of its layer.

    Args:
        model: damping, averages, bound, period.
        finished: this step's directions; changed in place.
        seen: gradients of this step's batches, with their graphs.
        groups: settings: ``loss_factor``, by which what is of the observed losses is divided, ``maximize``.
        gate: 0-d bool, False where nothing is to be averaged; ``None`` is open.
        exchange: the ranks over whose batches the Hessian is the mean.
    """
    turn = 0
    for one in finished:
        cohort = one.cohort
        if cohort.recipe.rule.model != model:
            continue
        pairs: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in cohort.units]
        rows = {parameter: row for row, unit in enumerate(cohort.units) for parameter in unit.operand.parameters}
        for piece in one.pieces:
            pairs[rows[piece.source]].append((piece.source, piece.direction, piece.gradient))
        kept = [cohort.state[name] for name in model.scalars]
        for row, pieces in enumerate(pairs):
            due = cohort.step == 0 or (cohort.step + turn) % period(model.every) == 0
            turn += 1
            if due and pieces:
                group = groups[cohort.units[row].groups[0]]
                factor = -group["loss_factor"] if group["maximize"] else group["loss_factor"]
                beta = number(model.beta) if cohort.step else 0.0
                measured = _measured(pieces, seen, factor)
                measured = measured if exchange is None else exchange.mean([(one, 1.0) for one in measured])
                for value, new in zip(kept, measured, strict=True):
                    average = beta * value[row] + (1 - beta) * new
                    sound = average.isfinite() if gate is None else average.isfinite() & gate
                    value[row] = torch.where(sound, average, value[row])
        slope, bend, square = kept
        bound = bend.clamp_min(0) + number(model.damping) * square
        tiny = torch.finfo(bound.dtype).tiny
        largest = number(model.largest)
        alpha = (slope.clamp_min(0) / bound.clamp_min(tiny)).clamp_max(largest)
        one.stretch(torch.where(square > 0, alpha, largest))


def _measured(pieces: Sequence[tuple[Tensor, Tensor, Tensor]], seen: Sequence[Slopes], factor: float) -> list[Tensor]:
    """(gᵀd, dᵀHd, dᵀd) of one layer."""
    parameters = [parameter for parameter, _, _ in pieces]
    vectors = [direction.reshape(p.shape).to(p.dtype) for p, direction, _ in pieces]
    zero = pieces[0][1].new_zeros(())
    bend = sum((slopes.bend(parameters, vectors).to(zero) for slopes in seen), zero) / factor
    slope = sum(((d * g).sum() for _, d, g in pieces), zero)
    return [slope, bend, sum((d.square().sum() for _, d, _ in pieces), zero)]
