"""MBF: mini-block Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from ..blocks import DIAGONAL, KERNELS
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_kernel, is_matrix

LINEAR_BLOCKS = {
    "row-major": "| (o i)~/o",
    "input-averaged": "~i | o",
    "output-averaged": "~o | i",
    "input": "i | o",
    "output": "o | i",
}
"""Named groupings of a linear layer's weights and bias; any partition text over ``o`` and ``i`` will do as well."""


class MBF(CurvatureOptimizer):
    """MBF (Bahamou, Goldfarb & Ren 2023)."""

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-5,
        *,
        damping: float | Callable[[int], float] = 3e-4,
        linear_blocks: str = "row-major",
        momentum: float | Callable[[int], float] = 0.9,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None = None,
        relative_damping: bool = False,
        debias: bool = False,
        statistics_every: int = 2,
        refresh_every: int = 25,
        dense_start: bool = True,
        stagger: bool = False,
        heavy_ball: bool = True,
        diagonal_beta: float = 0.999,
        eps: float = 1e-8,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            params,
            mbf,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            linear_blocks=linear_blocks,
            momentum=momentum,
            beta=beta,
            grafting=grafting,
            relative_damping=relative_damping,
            debias=debias,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            dense_start=dense_start,
            stagger=stagger,
            heavy_ball=heavy_ball,
            diagonal_beta=diagonal_beta,
            eps=eps,
        )


def mbf(
    damping: float,
    linear_blocks: str,
    momentum: float,
    beta: float,
    grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None,
    relative_damping: bool,
    debias: bool,
    statistics_every: int,
    refresh_every: int,
    dense_start: bool,
    stagger: bool,
    heavy_ball: bool,
    diagonal_beta: float,
    eps: float,
) -> Table:
    """Linear layers with their bias: averaged blocks; convolutions: kernels; all else: a diagonal."""
    moment = Moment(beta=beta, debias=debias)
    root = Root(1, Damping(damping, "layer", floor=1e-30) if relative_damping else Damping(damping))
    kind: Literal["heavy-ball", "ema"] = "heavy-ball" if heavy_ball else "ema"
    average = Momentum(momentum, kind, debias=not heavy_ball)
    rule = Rule(average, Grafting(grafting, diagonal_beta, eps) if grafting else None)
    schedule = Schedule(statistics_every, refresh_every, dense_start, stagger)
    linear = Recipe(LINEAR_BLOCKS.get(linear_blocks, linear_blocks), moment, root, rule, schedule, join_bias=True)
    kernels = Recipe(KERNELS, moment, root, rule, schedule)
    diagonal = Recipe(
        DIAGONAL,
        Moment("momentum", beta=diagonal_beta, debias=True),
        Root(0.5, Damping(eps, outside=True)),
        Rule(Momentum(momentum, "ema", debias=not heavy_ball)),
    )
    return (
        Route(linear, kind="linear", where=is_matrix),
        Route(kernels, kind="conv", where=is_kernel),
        Route(diagonal),
    )
