"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Moment, Momentum, Recipe, Root, Rule
from ..routing import Route, Table


class SGD(CurvatureOptimizer):
    """SGD with heavy-ball or Nesterov momentum; the twin of :class:`torch.optim.SGD`.

    ::

        M <- μ M + (1 - dampening) g          (M = g at the first step)
        w <- w - lr (g + μ M   if nesterov else   M)

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        momentum: μ.
        dampening: of the momentum.
        weight_decay: L2: added to the gradient times the weight.
        nesterov: look ahead.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.

    Raises:
        ValueError: nesterov without momentum or with dampening, or a setting out of range.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        settings: dict[str, Any] = dict(momentum=momentum, dampening=dampening, nesterov=nesterov)
        super().__init__(
            params, sgd, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


def sgd(momentum: float, dampening: float, nesterov: bool) -> Table:
    """Everything: no curvature."""
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov=True needs momentum above 0 and dampening 0, got {momentum!r} and {dampening!r}")
    ball = Momentum(momentum, nesterov=nesterov, dampening=dampening) if momentum != 0 else None
    recipe = Recipe(DIAGONAL, Moment(dtype="parameter"), Root(exponent=0), Rule(ball, decay="l2"))
    return (Route(recipe),)
