"""Shampoo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags, check_choice, check_period
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_kernel, is_vector

Kernels = Literal["separate", "merged", "inputs"]
KERNELS = {
    "separate": "| o{cut}, i{cut}, ,k...{cut}",
    "merged": "| o{cut}, i{cut}, k...",
    "inputs": "| o{cut}, (i k...){cut}",
}
"""Partitions of a convolution; ``cut`` is the length of blocks."""


class Shampoo(CurvatureOptimizer):
    """Shampoo (Gupta, Koren & Singer 2018), with the grafting, blocking and averages of Anil et al. 2020.

    For a tensor of k axes, with G_(i) the gradient unfolded along axis i::

        L_i <- L_i + G_(i) G_(i)ᵀ                  or  β L_i + (1 - β) G_(i) G_(i)ᵀ,  divided by 1 - β^n
        d    = m ×_1 (L_1 + λI)^(-p/k) … ×_k (L_k + λI)^(-p/k)          p = 1/2
        d   <- d ‖graft(m)‖ / ‖d‖
        w   <- (1 - lr·weight_decay) w - lr d

    with m the gradient's momentum. The curvature is thus ⊗ L_i^(1/k), of which the power -p is applied; ``exponent=1`` is
    the override to 1/k that is often used for matrices. Gupta et al. have the sum (``beta=None``), an absolute damping
    (``relative_damping=False``, theirs is the initial value εI) and no grafting; the MBF and TNT authors' Shampoo is
    ``beta=0.9, debias=False, grafting=None, heavy_ball=True, relative_damping=False, vectors="kronecker"``
    (theirs counts axes of size one in k, which here have no factor).

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size; with ``grafting="adam"`` of the size that Adam likes.
        beta: β of the factors' average; ``None`` sums instead.
        damping: λ; relative to each factor's largest eigenvalue, or absolute.
        momentum: of the gradient, before preconditioning; 0 for none.
        weight_decay: decoupled.
        exponent: p.
        grafting: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, or ``None``.
        block_size: axes are cut in balanced pieces of at most this many entries; ``None`` leaves them whole.
        kernels: a convolution's kernel axes: ``"separate"`` factors, ``"merged"`` into one, or joined to the ``"inputs"``.
        vectors: tensors of at most one axis: ``"diagonal"``: Adam's diagonal; ``"kronecker"``: a factor like all others.
        statistics_every: T1, in steps.
        refresh_every: T2, in steps.
        stagger: spread the roots of a period over its steps.
        debias: divide the average by 1 - β^n.
        relative_damping: see ``damping``.
        heavy_ball: momentum as M <- μ M + g instead of a debiased EMA.
        grafting_beta: β of the grafted diagonal, and of the vectors' diagonal.
        grafting_eps: added to their denominators.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`; layers name their axes, grouped convolutions get a product per group.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        beta: float | None = 0.999,
        damping: float | Callable[[int], float] = 1e-6,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        exponent: float = 0.5,
        grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None = "adam",
        block_size: int | None = 1024,
        kernels: Kernels = "merged",
        vectors: Literal["diagonal", "kronecker"] = "diagonal",
        statistics_every: int = 1,
        refresh_every: int = 10,
        stagger: bool = False,
        debias: bool = True,
        relative_damping: bool = True,
        heavy_ball: bool = False,
        grafting_beta: float = 0.999,
        grafting_eps: float = 1e-8,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            shampoo,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            beta=beta,
            damping=damping,
            momentum=momentum,
            exponent=exponent,
            grafting=grafting,
            block_size=block_size,
            kernels=kernels,
            vectors=vectors,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            stagger=stagger,
            debias=debias,
            relative_damping=relative_damping,
            heavy_ball=heavy_ball,
            grafting_beta=grafting_beta,
            grafting_eps=grafting_eps,
            **flags,
        )


def shampoo(
    beta: float | None,
    damping: float,
    momentum: float,
    exponent: float,
    grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None,
    block_size: int | None,
    kernels: Kernels,
    vectors: Literal["diagonal", "kronecker"],
    statistics_every: int,
    refresh_every: int,
    stagger: bool,
    debias: bool,
    relative_damping: bool,
    heavy_ball: bool,
    grafting_beta: float,
    grafting_eps: float,
) -> Table:
    """Vectors, and what is too long: Adam's diagonal (or a factor); convolutions and everything else: Kronecker."""
    check_choice("kernels", kernels, tuple(KERNELS))
    check_choice("vectors", vectors, ("diagonal", "kronecker"))
    if block_size is not None:
        check_period("block_size", block_size)
    cut = "" if block_size is None else f"/{block_size}"
    kind: Literal["heavy-ball", "ema"] = "heavy-ball" if heavy_ball else "ema"
    average = Momentum(momentum, kind, debias=not heavy_ball) if momentum != 0 else None
    moment = Moment(
        average="sum" if beta is None else "ema",
        beta=0.0 if beta is None else beta,
        debias=debias,
        composition="power-mean",
    )
    root = Root(exponent, Damping(damping, "largest") if relative_damping else Damping(damping))
    rule = Rule(average, Grafting(grafting, grafting_beta, grafting_eps) if grafting else None)
    schedule = Schedule(statistics_every, refresh_every, stagger=stagger)
    kronecker = Recipe("| ,..." + cut, moment, root, rule, schedule)
    vector = Recipe(f"| (...){cut}", moment, root, rule, schedule)
    convolution = Recipe(KERNELS[kernels].format(cut=cut), moment, root, rule, schedule)
    diagonal = Recipe(
        DIAGONAL,
        Moment(beta=grafting_beta, debias=True),
        Root(0.5, Damping(grafting_eps, outside=True)),
        Rule(average),
    )
    return (
        Route(vector if vectors == "kronecker" else diagonal, where=is_vector),
        Route(convolution, kind="conv", where=is_kernel),
        Route(kronecker),
        Route(diagonal),
    )
