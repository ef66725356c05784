"""EKFAC."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KRONECKER, EigenbasisBlock, RunningEigenbasisBlock
from ..checks import Flags, check_choice
from ..optimizer import CurvatureOptimizer
from ..recipe import Clip, Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight


class EKFAC(CurvatureOptimizer):
    """EKFAC (George et al. 2018): KFAC's eigenbases with the best diagonal in them.

    With A and B KFAC's factors of inputs (a one appended for the bias) and output gradients, A = U_A S_A U_Aᵀ::

        U_A, U_B <- eigenvectors               every T2 steps; s is carried over to them
        s  <- β s + (1 - β) E_n[(U_Bᵀ g_n U_A)²]            every T1 steps; divided by 1 - β^n
        d   = U_B ((U_Bᵀ m U_A) / (s + λ)) U_Aᵀ             m: the gradient's momentum
        d  <- d min(1, √(κ / Σ lr² mᵀd))
        w  <- (1 - lr·weight_decay) w - lr d

    g_n are the gradients of single examples, rotated by the bases of the last step. The authors' EKFAC-ra has the squares of
    the batch gradient instead (``scaling="gradient"``): they scale with the Fisher over the batch size, and so must lr and
    λ. Their code sets s anew at every refresh; here it is carried over by the squared overlaps of old and new vectors.
    Everything but linear layers and convolutions follows the momentum, diagonally preconditioned by single examples. Their
    code refreshes bases at every step, averages EKFAC-ra with β 0.75, and has no clip.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        beta: β.
        momentum: of the gradient, a heavy ball; 0 for none.
        weight_decay: decoupled.
        kl_clip: κ; ``None`` for none.
        scaling: ``"samples"`` or ``"gradient"``.
        labels: ``"data"``; ``"sampled"`` and ``"exact"`` need ``observe`` in the loop.
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
        lr: float | Tensor | Callable[[int], float] = 0.03,
        *,
        damping: float | Callable[[int], float] = 1e-2,
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-2,
        scaling: Literal["samples", "gradient"] = "samples",
        labels: Labels = "data",
        statistics_every: int = 1,
        refresh_every: int = 10,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            ekfac,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            beta=beta,
            momentum=momentum,
            kl_clip=kl_clip,
            scaling=scaling,
            labels=labels,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            **flags,
        )


def ekfac(
    damping: float,
    beta: float,
    momentum: float,
    kl_clip: float | None,
    scaling: Literal["samples", "gradient"],
    labels: Labels,
    statistics_every: int,
    refresh_every: int,
) -> Table:
    """Linear layers and convolutions: a diagonal in KFAC's eigenbases; everything else: a diagonal."""
    check_choice("scaling", scaling, ("samples", "gradient"))
    rule = Rule(Momentum(momentum) if momentum else None, clip=None if kl_clip is None else Clip("kl", kl_clip))
    schedule, root = Schedule(statistics_every, refresh_every, dense_start=True), Root(1, Damping(damping))
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    diagonal = Recipe(
        DIAGONAL, Moment("samples", beta=beta, debias=True, labels=labels), root, rule, schedule, fallback=plain
    )
    kronecker = Recipe(
        KRONECKER,
        Moment("signals", beta=beta, debias=True, labels=labels),
        root,
        rule,
        schedule,
        join_bias=True,
        block=EigenbasisBlock if scaling == "samples" else RunningEigenbasisBlock,
    )
    return (Route(kronecker, kind=("linear", "conv"), where=is_weight), Route(diagonal))
