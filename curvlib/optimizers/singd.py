"""SINGD, INGD and IKFAC."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, InverseFreeBlock
from ..checks import Flags, check_choice, check_period
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule, Tracking
from ..routing import Route, Table, is_weight

Structure = Literal["dense", "triangular", "diagonal", "blocks"]
_PARTITIONS = {
    "dense": "| o, i k...",
    "triangular": "| o, i k...",
    "diagonal": "| [o], [i k...]",
    "blocks": "| o/{size}, (i k...)/{size}",
}


class SINGD(CurvatureOptimizer):
    """SINGD (Lin et al. 2024): KFAC whose inverse factors K Kᵀ, C Cᵀ are tracked by matrix products alone.

    With U, G the batch's factors of inputs (a one appended for the bias) and output gradients, traces over dimensions::

        m_K <- α m_K + ½ (tr(CᵀGC) KᵀUK + λ tr(CᵀC) KᵀK - I)          every T steps; likewise m_C
        K   <- K - β K m_K
        M   <- μ M + C Cᵀ g K Kᵀ
        w   <- (1 - lr·weight_decay) w - lr M

    Dense factors are INGD. ``coupled=False`` is IKFAC, whose K Kᵀ tends to KFAC's (U + λI)^-1; the authors have no
    ``factor_momentum`` there. Their code adds weight_decay · w to the preconditioned gradient instead. What can't be heard
    follows its momentum.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        momentum: μ, a heavy ball of directions; 0 for none.
        damping: λ.
        weight_decay: decoupled.
        rate: β, of the factors.
        factor_momentum: α, of the factors' steps.
        structure: of K and C: ``"dense"``, ``"triangular"`` (lower), ``"diagonal"``, ``"blocks"`` (block-diagonal).
        block_size: of ``"blocks"``: axes are cut in balanced pieces of at most this many entries.
        coupled: see above.
        normalize: bound the factors' steps by their largest entry, against a rough start.
        labels: ``"data"`` (the authors'), or ``"sampled"``, ``"exact"``, which need ``observe`` in the loop.
        sharing: of shared positions: ``"expand"`` or ``"reduce"``.
        statistics_every: T, in steps.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        momentum: float | Callable[[int], float] = 0.9,
        damping: float | Callable[[int], float] = 1e-3,
        weight_decay: float = 0.0,
        rate: float | Callable[[int], float] = 1e-2,
        factor_momentum: float = 0.5,
        structure: Structure = "dense",
        block_size: int = 32,
        coupled: bool = True,
        normalize: bool = False,
        labels: Labels = "data",
        sharing: Literal["expand", "reduce"] = "expand",
        statistics_every: int = 10,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            singd,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            momentum=momentum,
            damping=damping,
            rate=rate,
            factor_momentum=factor_momentum,
            structure=structure,
            block_size=block_size,
            coupled=coupled,
            normalize=normalize,
            labels=labels,
            sharing=sharing,
            statistics_every=statistics_every,
            **flags,
        )


def singd(
    momentum: float,
    damping: float,
    rate: float,
    factor_momentum: float,
    structure: Structure,
    block_size: int,
    coupled: bool,
    normalize: bool,
    labels: Labels,
    sharing: Literal["expand", "reduce"],
    statistics_every: int,
) -> Table:
    """Linear layers and convolutions: tracked inverse factors; everything else: the momentum alone."""
    check_choice("structure", structure, tuple(_PARTITIONS))
    check_period("block_size", block_size)
    plain = Recipe(DIAGONAL, root=Root(0), rule=Rule(Momentum(momentum) if momentum else None))
    tracking = Tracking(rate, factor_momentum, coupled, normalize, structure == "triangular")
    tracked = Recipe(
        _PARTITIONS[structure].format(size=block_size),
        Moment("signals", beta=0.0, labels=labels, sharing=sharing),
        Root(1, Damping(damping), tracking=tracking),
        Rule(Momentum(momentum, after=True) if momentum else None),
        Schedule(statistics_every),
        join_bias=True,
        block=InverseFreeBlock,
        fallback=plain,
    )
    return (Route(tracked, kind=("linear", "conv"), where=is_weight), Route(plain))
