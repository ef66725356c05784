"""MBF: mini-block Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KERNELS
from ..checks import Flags, check_choice
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Grafting, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_kernel, is_matrix

LINEAR_BLOCKS = {
    "output-averaged": "~o | i",
    "input-averaged": "~i | o",
    "output": "o | i",
    "input": "i | o",
    "row-major": "| (o i)~/o",
}
"""Named groupings of a linear layer's weight and bias; any other text over ``o`` and ``i`` will do as well."""

PUBLISHED: dict[str, Any] = dict(
    lr=1e-5,
    damping=3e-4,
    relative_damping=False,
    linear_blocks="row-major",
    grafting=None,
    heavy_ball=True,
    debias=False,
    statistics_every=2,
    refresh_every=25,
    dense_start=True,
)
"""The authors' settings on the MNIST autoencoder, for ``MBF(model, **PUBLISHED)`` after a warm start (released code)."""


class MBF(CurvatureOptimizer):
    """Mini-block Fisher (Bahamou, Goldfarb & Ren, AISTATS 2023).

    The empirical Fisher of the batch gradient ḡ, restricted to small blocks b of each layer's weights, and inverted::

        F_b <- β F_b + (1 - β) ḡ_b ḡ_bᵀ                every T1 steps; divided by 1 - β^n if debias
        P_b  = (F_b + λI)^-1                           every T2 steps
        d_b  = P_b m_b                                 m: the gradient's momentum
        d   <- d ‖Adam's direction‖ / ‖d‖              for each layer, if grafting="adam"
        w   <- (1 - lr·weight_decay) w - lr d

    A convolution has a block for every kernel, one (output, input) channel pair. A linear layer, its bias joined as one
    more input, has a block for each output (all weights into one neuron) or each input, usually averaged over the layer.
    Everything else has the diagonal rule d = n / (√v̂ + eps), with n the EMA of the gradient and v that of n².

    The published settings are :data:`PUBLISHED`. They belong to the released code's grouping, ``"row-major"``: blocks of
    ``o`` consecutive entries of [W, b] in memory order, averaged. They do not carry over to true input or output blocks,
    nor to losses of another scale: with exponent -1 the step scales with the inverse of the gradient, a batch gradient
    shows only one direction of each block at a time, and between two refreshes what the blocks have not seen is multiplied
    by lr/λ. `docs/mbf.md` measures this. The defaults here avoid both: λ is relative to the layer's own curvature, and
    every layer's step has the length that Adam's would have, so that ``lr`` is on Adam's scale.

    Args:
        params: parameters, groups, named parameters, or a model. Without a model biases are not joined.
        lr: step size.
        damping: λ: a multiple of the mean eigenvalue over the layer's blocks, or absolute.
        linear_blocks: ``"output-averaged"``, ``"input-averaged"``, ``"output"``, ``"input"`` (not averaged: a matrix for
            every neuron), ``"row-major"``, or a partition text over ``o`` and ``i``.
        momentum: of the gradient, before preconditioning.
        beta: β.
        weight_decay: decoupled, of every parameter.
        grafting: ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``, or ``None``.
        relative_damping: see ``damping``.
        heavy_ball: momentum as m <- μ m + g, and n without debiasing, as the authors have it, instead of debiased EMAs.
        debias: divide the average by 1 - β^n.
        statistics_every: T1, in steps.
        refresh_every: T2, in steps.
        dense_start: also refresh with every statistic of the first T2 steps.
        of: ``"gradient"``: the moments of the batch gradient ḡ, as published; ``"samples"``: of the gradients g_n of single
            examples, F_b <- β F_b + (1 - β) 1/N Σ_n g_nb g_nbᵀ, the Fisher itself, for which layers are listened to.
        labels: of those examples: ``"data"``, ``"sampled"`` or ``"exact"``; the last two need ``observe`` in the loop.
        subsample: use every s-th example only.
        window: keep the last W batch gradients of linear layers instead of matrices, for ``linear_blocks="output"`` or
            ``"input"``: the same average but for a share of β^W, in W numbers a weight (see
            :class:`~curvlib.blocks.WindowBlock`). It is solved at every statistic.
        stagger: spread the inverses of a period over its steps.
        diagonal_beta: β of the diagonal rule and of grafting.
        eps: added to their denominators.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`; ``of="samples"`` listens to its layers.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        damping: float | Callable[[int], float] = 1.0,
        linear_blocks: str = "output-averaged",
        momentum: float | Callable[[int], float] = 0.9,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None = "adam",
        relative_damping: bool = True,
        heavy_ball: bool = False,
        debias: bool = True,
        statistics_every: int = 1,
        refresh_every: int = 10,
        dense_start: bool = False,
        stagger: bool = False,
        of: Literal["gradient", "samples"] = "gradient",
        labels: Labels = "data",
        subsample: int = 1,
        window: int | None = None,
        diagonal_beta: float = 0.999,
        eps: float = 1e-8,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            mbf,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            linear_blocks=linear_blocks,
            momentum=momentum,
            beta=beta,
            grafting=grafting,
            relative_damping=relative_damping,
            heavy_ball=heavy_ball,
            debias=debias,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            dense_start=dense_start,
            stagger=stagger,
            of=of,
            labels=labels,
            subsample=subsample,
            window=window,
            diagonal_beta=diagonal_beta,
            eps=eps,
            **flags,
        )


def mbf(
    damping: float,
    linear_blocks: str,
    momentum: float,
    beta: float,
    grafting: Literal["sgd", "adagrad", "rmsprop", "adam"] | None,
    relative_damping: bool,
    heavy_ball: bool,
    debias: bool,
    statistics_every: int,
    refresh_every: int,
    dense_start: bool,
    stagger: bool,
    of: Literal["gradient", "samples"],
    labels: Labels,
    subsample: int,
    window: int | None,
    diagonal_beta: float,
    eps: float,
) -> Table:
    """Linear layers with their bias: blocks of neurons; convolutions: kernels; all else: a diagonal."""
    if "|" not in linear_blocks:
        check_choice("linear_blocks", linear_blocks, (*LINEAR_BLOCKS, "a partition text"))
    check_choice("of", of, ("gradient", "samples"))
    moment = Moment(of, beta=beta, debias=debias, labels=labels, subsample=subsample)
    root = Root(1, Damping(damping, "layer") if relative_damping else Damping(damping))
    kind: Literal["heavy-ball", "ema"] = "heavy-ball" if heavy_ball else "ema"
    rule = Rule(
        Momentum(momentum, kind, debias=not heavy_ball),
        Grafting(grafting, diagonal_beta, eps) if grafting else None,
    )
    schedule = Schedule(statistics_every, refresh_every, dense_start, stagger)
    partition, windowed = LINEAR_BLOCKS.get(linear_blocks, linear_blocks), replace(moment, window=window)
    linear = Recipe(partition, windowed, root, rule, schedule, join_bias=True)
    kernels = Recipe(KERNELS, moment, root, rule, schedule)
    diagonal = Recipe(
        DIAGONAL,
        Moment("momentum", beta=diagonal_beta, debias=True),
        Root(0.5, Damping(eps, outside=True)),
        Rule(Momentum(momentum, "ema", debias=not heavy_ball)),
    )
    return (
        Route(linear, kind="linear", where=is_matrix),
        Route(kernels, kind="conv", where=is_kernel),
        Route(diagonal),
    )
