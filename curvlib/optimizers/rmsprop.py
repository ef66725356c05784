"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule
from ..routing import Route, Table


class RMSprop(CurvatureOptimizer):
    """RMSprop (Tieleman & Hinton 2012); the twin of :class:`torch.optim.RMSprop`.

    ::

        v <- α v + (1 - α) g²                  ḡ <- α ḡ + (1 - α) g
        d = g / (√(v - ḡ²   if centered else   v) + eps)
        M <- μ M + d
        w <- w - lr (M   if momentum else   d)

    Rounding that makes v - ḡ² negative counts as zero, where torch's root is NaN.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        alpha: α.
        eps: added to the denominator.
        weight_decay: L2: added to the gradient times the weight.
        momentum: μ, of the preconditioned direction.
        centered: by the estimated variance instead of the second moment.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        settings: dict[str, Any] = dict(alpha=alpha, eps=eps, momentum=momentum, centered=centered)
        super().__init__(
            params, rmsprop, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


def rmsprop(alpha: float, eps: float, momentum: float, centered: bool) -> Table:
    """Everything: the diagonal of the averaged second moment, to the power -1/2."""
    moment = Moment(beta=alpha, centered=centered, dtype="parameter")
    ball = Momentum(momentum, after=True) if momentum != 0 else None
    return (Route(Recipe(DIAGONAL, moment, Root(0.5, Damping(eps, outside=True)), Rule(ball, decay="l2"))),)
