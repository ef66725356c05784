"""K-BFGS, K-BFGS(L) and KF-QN-CNN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KRONECKER, AdditiveQuasiNewtonBlock, QuasiNewtonBlock
from ..checks import Flags, check_number
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight

_NEVER = 10**9


class KBFGS(CurvatureOptimizer):
    """K-BFGS (Goldfarb, Ren & Bahamou 2020): inverses of KFAC's two factors that follow secant pairs.

    ::

        A   <- β A + (1 - β) E[a aᵀ]    a: inputs, a one appended for the bias; H_a starts as (A + √λ I)^-1
        M   <- μ M + (1 - μ) g         g with weight_decay · w added
        w   <- w - lr H_g M H_a
        H_g <- BFGS(H_g; s, y)         s, y: EMAs of the changes of mean pre-activations and of their gradients
        H_a <- BFGS(H_a; s, (A + √λ I) s),  s = H_a ā         the Hessian's action

    The fourth line looks at the same batch once more at the new parameters: ``optimizer.step(closure)`` calls the closure,
    which does ``zero_grad``, forward and ``backward``, once before and once after the step: twice the cost of a first-order
    step. Layers whose forward pass is random, such as dropout, see other noise the second time; batch norms count it twice.

    Linear layers have the double damping of the paper, convolutions that of KF-QN-CNN (Ren, Bahamou & Goldfarb 2021), see
    :class:`~curvlib.blocks.QuasiNewtonBlock`; of these A is averaged as in linear layers, where that paper takes the batch's
    own. With ``memory`` H_g is limited: K-BFGS(L), the authors' with 100 pairs. Everything else follows the momentum. The
    authors also skip pairs with sᵀy ≤ 1e-4 ‖s‖² ‖g‖, which the second damping leaves none of.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ, of which each factor gets the square root; above 0 and below 1.
        beta: β, of A and of the pairs.
        momentum: μ, an EMA.
        weight_decay: L2, added to the gradient.
        memory: number of pairs of H_g; ``None`` keeps the matrix.
        statistics_every: in steps; between them there is no second pass.
        refresh_every: H_a starts anew as the exact inverse at every so many steps; ``None`` for at the first alone.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 0.3,
        *,
        damping: float | Callable[[int], float] = 0.3,
        beta: float = 0.9,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 1e-5,
        memory: int | None = None,
        statistics_every: int = 1,
        refresh_every: int | None = None,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            kbfgs,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            beta=beta,
            momentum=momentum,
            memory=memory,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            **flags,
        )


def kbfgs(
    damping: float, beta: float, momentum: float, memory: int | None, statistics_every: int, refresh_every: int | None
) -> Table:
    """Linear layers and convolutions: inverses that follow secant pairs; everything else: the momentum alone."""
    check_number("damping", damping, high=1.0, strict=True)
    rule = Rule(Momentum(momentum, "ema") if momentum else None, decay="l2")
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)

    def recipe(block: type[QuasiNewtonBlock]) -> Recipe:
        return Recipe(
            KRONECKER,
            Moment("signals", beta=beta, debias=True, window=memory),
            Root(1, Damping(damping)),
            rule,
            Schedule(statistics_every, _NEVER if refresh_every is None else refresh_every),
            join_bias=True,
            block=block,
            fallback=plain,
        )

    return (
        Route(recipe(QuasiNewtonBlock), kind="linear", where=is_weight),
        Route(recipe(AdditiveQuasiNewtonBlock), kind="conv", where=is_weight),
        Route(plain),
    )
