"""Sophia: a diagonal Gauss-Newton matrix, or Hessian, and clipped steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags, check_choice, check_count, check_number
from ..finishes import ClipEntries
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table


class SophiaG(CurvatureOptimizer):
    """Sophia-G (Liu et al. 2024, Algorithm 3): a diagonal Gauss-Newton matrix by labels drawn from the model, clipped.

    With ĝ the batch gradient for drawn labels (Gauss-Newton-Bartlett)::

        h <- β2 h + (1 - β2) ĝ²                 every k steps; the Gauss-Newton diagonal is B h
        m <- β1 m + (1 - β1) g
        w <- (1 - lr·weight_decay) w - lr clip(m / (ρ B h + ε), 1)

    The paper has max(γ h, ε) where the authors' code, and this, has the sum. They take h after a step, to be used from the
    next; here it is taken before the step at which it is due. Drawn labels need ``optimizer.observe(outputs, likelihood)``
    between the forward pass and ``backward``.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size, which is also the largest change of any weight.
        betas: β1, β2.
        rho: ρ, the smaller, the more entries are clipped.
        batch: B, the number of examples (of language models: tokens) whose mean the loss is.
        weight_decay: decoupled.
        statistics_every: k, in steps.
        eps: ε.
        labels: ``"sampled"``, or ``"data"``: ĝ is the training gradient (the paper's ablation "E-F+clip").
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        batch: int = 128,
        weight_decay: float = 0.1,
        *,
        statistics_every: int = 10,
        eps: float = 1e-15,
        labels: Literal["sampled", "data"] = "sampled",
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            sophia_g,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            betas=betas,
            rho=rho,
            batch=batch,
            statistics_every=statistics_every,
            eps=eps,
            labels=labels,
            **flags,
        )


def sophia_g(
    betas: tuple[float, float],
    rho: float,
    batch: int,
    statistics_every: int,
    eps: float,
    labels: Literal["sampled", "data"] = "sampled",
) -> Table:
    """Everything: the diagonal of drawn labels' second moment, to the power -1."""
    check_choice("labels", labels, ("sampled", "data"))
    check_number("rho", rho, strict=True)
    check_count("batch", batch)
    scale = 1 / (rho * batch)
    return (
        Route(
            Recipe(
                DIAGONAL,
                Moment("gradient", beta=betas[1], labels=labels),
                Root(1, Damping(eps * scale)),
                Rule(Momentum(betas[0], "ema"), finish=(ClipEntries(1.0, scale),)),
                Schedule(statistics_every),
            )
        ),
    )


class SophiaH(CurvatureOptimizer):
    """Sophia-H (Liu et al. 2024, Algorithm 3): the Hessian's diagonal by random signs, clipped.

    With z random signs and H the Hessian of the batch (Hutchinson)::

        h <- β2 h + (1 - β2) z ⊙ Hz             every k steps
        m <- β1 m + (1 - β1) g
        w <- (1 - lr·weight_decay) w - lr clip(m / (γ max(h, 0) + ε), 1)

    The paper has max(γ h, ε) for the denominator, which differs by at most ε. ``optimizer.observe(loss=loss)`` before
    ``backward`` differentiates twice, where h is due.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size, which is also the largest change of any weight.
        betas: β1, β2.
        gamma: γ, the smaller, the more entries are clipped.
        weight_decay: decoupled.
        statistics_every: k, in steps.
        eps: ε.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-4,
        betas: tuple[float, float] = (0.96, 0.99),
        gamma: float = 0.01,
        weight_decay: float = 0.1,
        *,
        statistics_every: int = 10,
        eps: float = 1e-12,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            sophia_h,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            betas=betas,
            gamma=gamma,
            statistics_every=statistics_every,
            eps=eps,
            **flags,
        )


def sophia_h(betas: tuple[float, float], gamma: float, statistics_every: int, eps: float) -> Table:
    """Everything: the Hessian's diagonal, to the power -1."""
    check_number("gamma", gamma, strict=True)
    return (
        Route(
            Recipe(
                DIAGONAL,
                Moment("hessian", beta=betas[1], order=1),
                Root(1, Damping(eps / gamma)),
                Rule(Momentum(betas[0], "ema"), finish=(ClipEntries(1.0, 1 / gamma),)),
                Schedule(statistics_every),
            )
        ),
    )
