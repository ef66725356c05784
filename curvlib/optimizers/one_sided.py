"""One-sided methods: a single factor a layer. FOOF, one-sided Shampoo, and AdaGrad with the full matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, FULL_LAYER
from ..checks import Flags, check_choice, check_count
from ..layers import Slot
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight

_SIDES = {"output": "~i ~k... | o", "input": "~o | i k..."}


class FOOF(CurvatureOptimizer):
    """FOOF (Benzing 2022): gradient descent on neurons instead of weights, KFAC without its output factor.

    With a the inputs of a layer, a one appended for the bias::

        A <- β A + (1 - β) E[a aᵀ]          every T1 steps; divided by 1 - β^n
        d  = m (A + λI)^-1                  A refreshed every T2 steps; m: the gradient's momentum, [W, b]
        w <- (1 - lr·weight_decay) w - lr d

    Only inputs are heard, so labels do not matter. What has no inputs that can be heard follows its momentum. The paper tunes
    λ and lr for each problem; the defaults are this library's.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        beta: β.
        momentum: of the gradient, a heavy ball; 0 for none.
        weight_decay: decoupled.
        sharing: of a layer's shared positions, see :class:`Moment`.
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
        lr: float | Tensor | Callable[[int], float] = 0.1,
        *,
        damping: float | Callable[[int], float] = 1.0,
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        sharing: Literal["expand", "reduce"] = "expand",
        statistics_every: int = 1,
        refresh_every: int = 10,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            foof,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            beta=beta,
            momentum=momentum,
            sharing=sharing,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            **flags,
        )


def foof(
    damping: float,
    beta: float,
    momentum: float,
    sharing: Literal["expand", "reduce"],
    statistics_every: int,
    refresh_every: int,
) -> Table:
    """Linear layers and convolutions: the input factor; everything else: the momentum alone."""
    rule = Rule(Momentum(momentum) if momentum else None)
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    factor = Recipe(
        _SIDES["input"],
        Moment("signals", beta=beta, debias=True, sharing=sharing),
        Root(1, Damping(damping)),
        rule,
        Schedule(statistics_every, refresh_every, dense_start=True),
        join_bias=True,
        fallback=plain,
    )
    return (Route(factor, kind=("linear", "conv"), where=is_weight), Route(plain))


class OneSidedShampoo(CurvatureOptimizer):
    """One-sided Shampoo (Xie et al. 2025), also ASGO (An et al. 2025): one factor a matrix, to the power -1/2.

    With G the gradient of o outputs and i inputs, for the output side::

        L <- β L + (1 - β) G Gᵀ / i          every T1 steps; divided by 1 - β^n; ``beta=None`` sums
        d  = (L + λI)^(-1/2) m               refreshed every T2 steps; m: the gradient's debiased momentum
        d <- d ‖graft(m)‖ / ‖d‖
        w <- (1 - lr·weight_decay) w - lr d

    The papers have no division by i, and thus steps of a √i-th the length, and no grafting (``grafting=None``). With
    grafting lr is on Adam's scale. The defaults are those of :class:`~curvlib.Shampoo` here.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        side: ``"output"``: L; ``"input"``: R of Gᵀ G / o; ``"smaller"`` is the side with fewer entries.
        beta: β; ``None`` sums.
        damping: λ; relative to the factor's largest eigenvalue.
        momentum: of the gradient; 0 for none.
        weight_decay: decoupled.
        grafting: see :class:`Grafting`; ``None`` for none.
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
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        side: Literal["output", "input", "smaller"] = "smaller",
        beta: float | None = 0.999,
        damping: float | Callable[[int], float] = 1e-6,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None = "adam",
        statistics_every: int = 1,
        refresh_every: int = 10,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            one_sided_shampoo,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            side=side,
            beta=beta,
            damping=damping,
            momentum=momentum,
            grafting=grafting,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            **flags,
        )


def one_sided_shampoo(
    side: Literal["output", "input", "smaller"],
    beta: float | None,
    damping: float,
    momentum: float,
    grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None,
    statistics_every: int,
    refresh_every: int,
) -> Table:
    """Matrices and kernels: one side; everything else: Adam's diagonal."""
    check_choice("side", side, ("output", "input", "smaller"))
    rule = Rule(
        Momentum(momentum, "ema", debias=True) if momentum else None,
        grafting=None if grafting is None else Grafting(grafting),
    )
    moment = Moment(average="sum") if beta is None else Moment(beta=beta, debias=True)
    root = Root(0.5, Damping(damping, relative_to="largest"))
    schedule = Schedule(statistics_every, refresh_every)
    sides = {name: Recipe(partition, moment, root, rule, schedule) for name, partition in _SIDES.items()}
    diagonal = Recipe(
        DIAGONAL, Moment(beta=0.999, debias=True), Root(0.5, Damping(1e-8, outside=True)), Rule(rule.momentum)
    )
    if side != "smaller":
        return (Route(sides[side], where=has_sides), Route(diagonal))
    return (Route(sides["output"], where=is_wide), Route(sides["input"], where=has_sides), Route(diagonal))


def has_sides(slot: Slot) -> bool:
    """Whether a parameter has outputs and inputs."""
    return {"o", "i"} <= set(slot.sizes)


def is_wide(slot: Slot) -> bool:
    """Whether it has no more outputs than inputs."""
    inputs = math.prod(size for axis, size in slot.sizes.items() if axis not in ("g", "o"))
    return has_sides(slot) and slot.sizes["o"] <= inputs


class FullAdagrad(CurvatureOptimizer):
    """AdaGrad with the full matrix of every parameter (Duchi et al. 2011, Figure 1): O(numel²) memory, for small ones.

    ::

        G <- G + g gᵀ
        w <- (1 - lr·weight_decay) w - lr (G + λI)^(-1/2) g

    The paper adds λ to the root instead of under it.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        weight_decay: decoupled.
        block_size: chunks of at most so many entries, in row-major order, instead of whole parameters; ``None`` for no limit.
        refresh_every: in steps.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-2,
        *,
        damping: float | Callable[[int], float] = 1e-8,
        weight_decay: float = 0.0,
        block_size: int | None = None,
        refresh_every: int = 1,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            full_adagrad,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            damping=damping,
            block_size=block_size,
            refresh_every=refresh_every,
            **flags,
        )


def full_adagrad(damping: float, block_size: int | None, refresh_every: int) -> Table:
    """Everything: the dense sum of second moments, to the power -1/2."""
    if block_size is not None:
        check_count("block_size", block_size)
    partition = FULL_LAYER if block_size is None else f"| (...)/{block_size}"
    root = Root(0.5, Damping(damping))
    return (Route(Recipe(partition, Moment(average="sum"), root, schedule=Schedule(refresh=refresh_every))),)
