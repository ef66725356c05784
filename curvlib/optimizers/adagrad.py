"""AdaGrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Recipe, Root, Rule
from ..routing import Route, Table


class Adagrad(CurvatureOptimizer):
    """Diagonal AdaGrad (Duchi et al. 2011); the twin of :class:`torch.optim.Adagrad`.

    ::

        G <- G + g²
        w <- w - lr / (1 + t·lr_decay) g / (√G + eps)         t = 0, 1, …

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        lr_decay: of the step size.
        weight_decay: L2: added to the gradient times the weight.
        initial_accumulator_value: of G.
        eps: added to the denominator.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        settings: dict[str, Any] = dict(lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps)
        super().__init__(
            params, adagrad, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


def adagrad(lr_decay: float, initial_accumulator_value: float, eps: float) -> Table:
    """Everything: the diagonal of the summed second moment, to the power -1/2."""
    moment = Moment(average="sum", initial=initial_accumulator_value, dtype="parameter")
    root = Root(0.5, Damping(eps, outside=True))
    return (Route(Recipe(DIAGONAL, moment, root, Rule(decay="l2", lr_decay=lr_decay))),)
