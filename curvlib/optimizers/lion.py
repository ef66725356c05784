"""Lion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..finishes import Sign
from ..optimizer import CurvatureOptimizer
from ..recipe import Momentum, Recipe, Root, Rule
from ..routing import Route, Table


class Lion(CurvatureOptimizer):
    """Lion (Chen et al. 2023, Algorithm 2): the sign of an interpolated momentum.

    ::

        d <- sign(β1 m + (1 - β1) g)
        m <- β2 m + (1 - β2) g
        w <- (1 - lr·weight_decay) w - lr d

    The authors take a third to a tenth of Adam's step size, and as many times its decay.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        betas: β1, β2.
        weight_decay: decoupled.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params, lion, lr, weight_decay=weight_decay, maximize=maximize, model=model, betas=betas, **flags
        )


def lion(betas: tuple[float, float]) -> Table:
    """Everything: no curvature, the sign of the momentum."""
    momentum = Momentum(betas[1], "ema", mix=betas[0])
    return (Route(Recipe(DIAGONAL, root=Root(exponent=0), rule=Rule(momentum, finish=(Sign(),)))),)
