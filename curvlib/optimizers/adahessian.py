"""AdaHessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags, check_number
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table


class AdaHessian(CurvatureOptimizer):
    """AdaHessian (Yao et al. 2021): Adam with the Hessian's diagonal in the place of the gradient.

    With z random signs and H the Hessian of the batch::

        D = z ⊙ Hz                                       of a convolution: its mean over each kernel
        v <- β2 v + (1 - β2) D²                         every T steps
        m <- β1 m + (1 - β1) g
        w <- (1 - lr·weight_decay) w - lr m̂ / (v̂^(k/2) + ε)

    with m̂, v̂ divided by 1 - β^n. ``optimizer.observe(loss=loss)`` before ``backward`` differentiates twice where D is due;
    ``backward(create_graph=True)`` is not needed. The authors' code averages absolute values of D over kernels, the paper D
    itself.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size; this default and those of betas and eps are the authors'.
        betas: β1, β2.
        eps: ε.
        weight_decay: decoupled.
        power: k; the authors' is at most 1.
        pooling: over kernels: ``"mean"`` (the paper's), ``"absolute"`` (the authors' code's), or ``None``.
        statistics_every: T, in steps.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        power: float = 1.0,
        pooling: Literal["mean", "absolute"] | None = "mean",
        statistics_every: int = 1,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            adahessian,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            betas=betas,
            eps=eps,
            power=power,
            pooling=pooling,
            statistics_every=statistics_every,
            **flags,
        )


def adahessian(
    betas: tuple[float, float],
    eps: float,
    power: float,
    pooling: Literal["mean", "absolute"] | None,
    statistics_every: int,
) -> Table:
    """Everything: the diagonal of squared estimates, to the power -k/2."""
    check_number("power", power, strict=True)
    return (
        Route(
            Recipe(
                DIAGONAL,
                Moment("hessian", beta=betas[1], debias=True, pooling=pooling),
                Root(power / 2, Damping(eps, outside=True)),
                Rule(Momentum(betas[0], "ema", debias=True)),
                Schedule(statistics_every),
            )
        ),
    )
