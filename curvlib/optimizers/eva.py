"""Eva."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KRONECKER, RankOneBlock
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Clip, Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight


class Eva(CurvatureOptimizer):
    """Eva (Zhang, Shi & Li 2023): KFAC with rank-one factors, vectors instead of matrices.

    With ā the mean input of a layer (a one appended for the bias) and b̄ the mean output gradient::

        ā <- β ā + (1 - β) E[a],   b̄ <- β b̄ + (1 - β) E[b]         every T1 steps; divided by 1 - β^n
        d  = (b̄b̄ᵀ ⊗ āāᵀ + λI)^-1 m = 1/λ (m - (b̄ᵀ m ā) / (λ + ‖ā‖²‖b̄‖²) b̄ āᵀ)
        d <- d min(1, √(κ / Σ lr² mᵀd))
        w <- (1 - lr·weight_decay) w - lr d

    m is the gradient's momentum; the authors average the direction instead. What can't be heard follows its momentum.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        beta: β.
        momentum: of the gradient, a heavy ball; 0 for none.
        weight_decay: decoupled.
        kl_clip: κ; ``None`` for none.
        labels: ``"data"`` (the authors'), or ``"sampled"``, which needs ``observe`` in the loop.
        statistics_every: T1, in steps.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 0.1,
        *,
        damping: float | Callable[[int], float] = 0.03,
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-3,
        labels: Literal["data", "sampled"] = "data",
        statistics_every: int = 1,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            eva,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            beta=beta,
            momentum=momentum,
            kl_clip=kl_clip,
            labels=labels,
            statistics_every=statistics_every,
            **flags,
        )


def eva(
    damping: float, beta: float, momentum: float, kl_clip: float | None, labels: Labels, statistics_every: int
) -> Table:
    """Linear layers and convolutions: rank-one factors; everything else: the momentum alone."""
    clip = None if kl_clip is None else Clip("kl", kl_clip)
    rule = Rule(Momentum(momentum) if momentum else None, clip=clip)
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    vectors = Recipe(
        KRONECKER,
        Moment("signals", beta=beta, debias=True, labels=labels),
        Root(1, Damping(damping)),
        rule,
        Schedule(statistics_every),
        join_bias=True,
        block=RankOneBlock,
        fallback=plain,
    )
    return (Route(vectors, kind=("linear", "conv"), where=is_weight), Route(plain))
