"""Methods whose layers choose their own step sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..layerwise import Layerwise
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule
from ..routing import Route, Table

M = TypeVar("M", CurvatureOptimizer, Table)


def layerwise(method: M, model: Layerwise | None = None) -> M:
    """Any method, with step sizes of its layers' own; ``lr`` multiplies them.

    ::

        optimizer = layerwise(curvlib.Shampoo(model, lr=1.0), Layerwise(largest=0.1))

    Args:
        method: an optimizer that has not stepped yet, which is changed, or a routing table.
        model: how they are measured and bounded; by default as :class:`~curvlib.layerwise.Layerwise` has it.

    Returns:
        The optimizer, or a new table.

    Raises:
        ValueError: for a rule with a clip, which decides the length by itself.
        RuntimeError: for an optimizer that has stepped.
    """
    chosen = Layerwise() if model is None else model
    if isinstance(method, CurvatureOptimizer):
        method.amend(partial(layerwise, model=chosen))
        return method
    return tuple(
        replace(route, recipe=replace(route.recipe, rule=replace(route.recipe.rule, model=chosen))) for route in method
    )


class LayerwiseSGD(CurvatureOptimizer):
    """SGD with momentum whose layers choose their step sizes (Bahamou & Goldfarb 2023).

    ::

        m_l <- μ m_l + (1 - μ) g_l
        α_l  = min(largest, EMA(g_lᵀm_l) / (max(0, EMA(m_lᵀ H_ll m_l)) + λ EMA(m_lᵀm_l)))
        w_l <- (1 - lr·weight_decay) w_l - lr α_l m_l

    See :mod:`curvlib.layerwise`, also for what is not certain. ``optimizer.observe(loss=loss)`` comes before
    ``loss.backward(retain_graph=True)``.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: factor of all step sizes.
        momentum: μ, a debiased EMA.
        damping: λ.
        beta: β of the averages in α.
        largest: bound of α.
        every: a layer is measured at every so many steps, the layers in turn.
        weight_decay: decoupled.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1.0,
        *,
        momentum: float | Callable[[int], float] = 0.9,
        damping: float | Callable[[int], float] = 1e-3,
        beta: float = 0.9,
        largest: float = 1.0,
        every: int = 10,
        weight_decay: float = 0.0,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            layerwise_sgd,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            momentum=momentum,
            damping=damping,
            beta=beta,
            largest=largest,
            every=every,
            **flags,
        )


def layerwise_sgd(momentum: float, damping: float, beta: float, largest: float, every: int) -> Table:
    """Everything: the momentum itself."""
    plain = Recipe(DIAGONAL, root=Root(0), rule=Rule(Momentum(momentum, "ema", debias=True)))
    return layerwise((Route(plain),), Layerwise(damping, beta, largest, every))


class LayerwiseAdamW(CurvatureOptimizer):
    """AdamW whose layers choose their step sizes (Bahamou & Goldfarb 2023).

    ::

        d_l  = m̂_l / (√v̂_l + ε)                Adam's direction
        α_l  = min(largest, EMA(g_lᵀd_l) / (max(0, EMA(d_lᵀ H_ll d_l)) + λ EMA(d_lᵀd_l)))
        w_l <- (1 - lr·weight_decay) w_l - lr α_l d_l

    See :mod:`curvlib.layerwise`, also for what is not certain. ``optimizer.observe(loss=loss)`` comes before
    ``loss.backward(retain_graph=True)``.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: factor of all step sizes.
        betas: Adam's.
        eps: Adam's.
        damping: λ.
        beta: β of the averages in α.
        largest: bound of α.
        every: a layer is measured at every so many steps, the layers in turn.
        weight_decay: decoupled.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        damping: float | Callable[[int], float] = 1e-3,
        beta: float = 0.9,
        largest: float = 0.01,
        every: int = 10,
        weight_decay: float = 0.0,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            layerwise_adamw,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            betas=betas,
            eps=eps,
            damping=damping,
            beta=beta,
            largest=largest,
            every=every,
            **flags,
        )


def layerwise_adamw(
    betas: tuple[float, float], eps: float, damping: float, beta: float, largest: float, every: int
) -> Table:
    """Everything: Adam's diagonal."""
    moment, root = Moment(beta=betas[1], debias=True), Root(0.5, Damping(eps, outside=True))
    adam = Recipe(DIAGONAL, moment, root, Rule(Momentum(betas[0], "ema", debias=True)))
    return layerwise((Route(adam),), Layerwise(damping, beta, largest, every))
