"""TNT."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags, check_choice
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_kernel


class TNT(CurvatureOptimizer):
    """TNT, tensor normal training (Ren & Goldfarb 2021): a Fisher matrix that is a Kronecker product of k covariances.

    With G the batch gradient for labels drawn from the model, unfolded along axis i::

        V_i <- β V_i + (1 - β) G_(i) G_(i)ᵀ          every T1 steps
        U_i  = V_i / (c^(k-1) Π_{j≠i} d_j)           c = (tr V_1 / Π d_j)^(1/k), so that ⊗ U_i = ⊗ V_i / tr^(k-1)
        M   <- μ M + g                               g: the gradient of the data
        d    = M ×_1 (U_1 + λI)^-1 … ×_k (U_k + λI)^-1          U refreshed every T2 steps, at first every T1
        w   <- (1 - lr·weight_decay) w - lr d

    Kernels have one axis of their own, vectors a full matrix. Drawn labels need ``optimizer.observe(outputs, likelihood)``
    between the forward pass and ``backward``, and one more backward pass where statistics are due. The authors start with a
    pass over the data (:meth:`CurvatureOptimizer.warm_start`), and skip the first update after it. An axis of one
    entry has no factor and does not count in k.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        labels: ``"sampled"``, or ``"data"``: of the training gradient itself (the authors' EF variant).
        beta: β.
        momentum: μ.
        weight_decay: decoupled.
        statistics_every: T1, in steps.
        refresh_every: T2, in steps.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-4,
        *,
        damping: float | Callable[[int], float] = 0.1,
        labels: Literal["sampled", "data"] = "sampled",
        beta: float = 0.9,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        statistics_every: int = 1,
        refresh_every: int = 20,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            tnt,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            labels=labels,
            beta=beta,
            momentum=momentum,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            **flags,
        )


def tnt(
    damping: float,
    labels: Literal["sampled", "data"],
    beta: float,
    momentum: float,
    statistics_every: int,
    refresh_every: int,
) -> Table:
    """Convolutions: outputs, inputs and kernel; else a factor for every axis; what is too long: the momentum alone."""
    check_choice("labels", labels, ("sampled", "data"))

    def recipe(partition: str) -> Recipe:
        return Recipe(
            partition,
            Moment("gradient", beta=beta, labels=labels, composition="trace"),
            Root(1, Damping(damping)),
            Rule(Momentum(momentum) if momentum else None),
            Schedule(statistics_every, refresh_every, dense_start=True),
        )

    return (
        Route(recipe("| o, i, k..."), kind="conv", where=is_kernel),
        Route(recipe("| ,...")),
        Route(Recipe(DIAGONAL, root=Root(0), rule=Rule(Momentum(momentum) if momentum else None))),
    )
