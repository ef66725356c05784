"""TKFAC."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KRONECKER
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight


class TKFAC(CurvatureOptimizer):
    """TKFAC (Gao et al. 2021): a Kronecker product that keeps the trace of the Fisher matrix.

    With a and δ the inputs (a one appended for the bias) and output gradients of single examples::

        Φ = E[‖δ‖² a aᵀ] / τ,   Ψ = E[‖a‖² δ δᵀ] / τ,   τ = E[‖a‖² ‖δ‖²]
        F ≈ τ Ψ ⊗ Φ                                     tr Φ = tr Ψ = 1, so that the traces agree
        d = (√τ Ψ + √λ I)^-1 g (√τ Φ + √λ I)^-1
        M <- μ M + d
        w <- (1 - lr·weight_decay) w - lr M

    τΦ and τΨ are the second moments of single examples' gradients along either axis, E[gᵀg] and E[g gᵀ], which is how
    they are taken; with positions shared within an example that is of the example's whole gradient, where the paper takes
    positions one by one. Averages are over τΦ and τΨ. The paper's second damping for convolutions is not offered: its exact
    formula could not be found. A side of one entry has no factor: the direction of a layer with one output is
    (τΦ + λI)^-1 g. What can't be heard follows its momentum. The defaults are not the paper's, whose text could not be had.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        labels: see :class:`~curvlib.optimizers.kfac.KFAC`.
        beta: β of the average.
        momentum: μ, of the direction.
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
        lr: float | Tensor | Callable[[int], float] = 0.01,
        *,
        damping: float | Callable[[int], float] = 1e-2,
        labels: Labels = "data",
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        statistics_every: int = 1,
        refresh_every: int = 10,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            tkfac,
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


def tkfac(
    damping: float, labels: Labels, beta: float, momentum: float, statistics_every: int, refresh_every: int
) -> Table:
    """Linear layers and convolutions: two factors of one trace; everything else: the momentum alone."""
    rule = Rule(Momentum(momentum, after=True) if momentum else None)
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    product = Recipe(
        KRONECKER,
        Moment("samples", beta=beta, debias=True, labels=labels, composition="trace"),
        Root(1, Damping(damping, split="trace")),
        rule,
        Schedule(statistics_every, refresh_every, dense_start=True),
        join_bias=True,
        fallback=plain,
    )
    return (Route(product, kind=("linear", "conv"), where=is_weight), Route(plain))
