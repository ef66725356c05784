"""NGD: natural gradient descent with the dense block of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags, check_period
from ..optimizer import CurvatureOptimizer
from ..recipe import Clip, Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table


class NGD(CurvatureOptimizer):
    """Natural gradient descent (Amari 1998) with one dense Fisher block a layer.

    With g_n the gradients of single examples::

        F <- β F + (1 - β) 1/N Σ_n g_n g_nᵀ         every T1 steps; divided by 1 - β^n
        d  = (F + λI)^-1 m                          F refreshed every T2 steps; m: the gradient's momentum
        w <- (1 - lr·weight_decay) w - lr d

    A layer of P weights has a block of P² entries, solved in O(P³): this is for small networks, and for comparisons.
    Larger layers are cut into equal chunks of at most ``block_size`` consecutive entries of [W, b].

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        labels: ``"data"``: empirical Fisher; ``"sampled"``: Fisher, by labels drawn from the model; ``"exact"``: its mean
            over labels, which is the generalised Gauss-Newton matrix. The last two need ``observe`` in the loop.
        beta: β.
        momentum: of the gradient, a heavy ball; 0 for none.
        weight_decay: decoupled.
        block_size: largest block; ``None`` leaves layers whole.
        kl_clip: bound of the step's quadratic size, see :class:`Clip`; ``None`` for none.
        statistics_every: T1, in steps.
        refresh_every: T2, in steps.
        subsample: use every s-th example only.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`; without one the moments are those of the batch gradient.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 0.1,
        *,
        damping: float | Callable[[int], float] = 1e-2,
        labels: Labels = "data",
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.0,
        weight_decay: float = 0.0,
        block_size: int | None = 4096,
        kl_clip: float | None = None,
        statistics_every: int = 1,
        refresh_every: int = 1,
        subsample: int = 1,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            ngd,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            labels=labels,
            beta=beta,
            momentum=momentum,
            block_size=block_size,
            kl_clip=kl_clip,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            subsample=subsample,
            **flags,
        )


def ngd(
    damping: float,
    labels: Labels,
    beta: float,
    momentum: float,
    block_size: int | None,
    kl_clip: float | None,
    statistics_every: int,
    refresh_every: int,
    subsample: int,
) -> Table:
    """Every layer: its dense block; what can't be heard, or is too large: the momentum alone."""
    if block_size is not None:
        check_period("block_size", block_size)
    cut = "..." if block_size is None else f"(...)/{block_size}"
    moment = Moment("samples", beta=beta, debias=True, labels=labels, subsample=subsample)
    rule = Rule(Momentum(momentum) if momentum else None, clip=Clip("kl", kl_clip) if kl_clip is not None else None)
    schedule = Schedule(statistics_every, refresh_every)
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    dense = Recipe(f"| {cut}", moment, Root(1, Damping(damping)), rule, schedule, join_bias=True, fallback=plain)
    return (Route(dense), Route(plain))
