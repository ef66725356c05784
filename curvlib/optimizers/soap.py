"""SOAP and KL-Shampoo: what lives in the eigenbases of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, EigenbasisBlock, LikelihoodBlock
from ..checks import Flags, check_choice, check_period
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_kernel, is_vector
from .shampoo import KERNELS, Kernels


class SOAP(CurvatureOptimizer):
    """SOAP (Vyas et al. 2024): Adam in the eigenbases of Shampoo's factors.

    For a tensor of k axes, with G_(i) the gradient unfolded along axis i::

        L_i <- β2 L_i + (1 - β2) G_(i) G_(i)ᵀ
        Q_i <- eigenvectors of L_i               every T steps; v is carried over to them
        v   <- β2 v + (1 - β2) (g ×_1 Q_1ᵀ … ×_k Q_kᵀ)²
        m   <- β1 m + (1 - β1) g
        d    = (m̂ ×_1 Q_1ᵀ … ×_k Q_kᵀ) / (√v̂ + ε) ×_1 Q_1 … ×_k Q_k
        w   <- (1 - lr·weight_decay) w - lr d

    with m̂, v̂ divided by 1 - β^n. m is kept in the bases, as in the authors' code, and turned with them. Vectors have Adam.
    Unlike the authors' code, the basis of a step knows its gradient, so that no first step is skipped; and v is carried
    over by the squared overlaps of old and new vectors, where theirs follows the order of the vectors alone. Theirs leaves
    axes above 10,000 entries alone; here axes are cut in blocks.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size, of the size that Adam likes.
        betas: β1, β2.
        eps: ε.
        weight_decay: decoupled.
        refresh_every: T, in steps.
        basis: ``"qr"`` (the authors'): one orthogonal iteration from the last basis, the first by ``"eigh"``; or always that.
        block_size: axes are cut in balanced pieces of at most this many entries; ``None`` leaves them whole.
        kernels: a convolution's kernel axes: ``"separate"`` factors (the authors'), ``"merged"`` into one, or joined to the
            ``"inputs"``.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        refresh_every: int = 10,
        basis: Literal["qr", "eigh"] = "qr",
        block_size: int | None = 4096,
        kernels: Kernels = "separate",
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            soap,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            betas=betas,
            eps=eps,
            refresh_every=refresh_every,
            basis=basis,
            block_size=block_size,
            kernels=kernels,
            **flags,
        )


def soap(
    betas: tuple[float, float],
    eps: float,
    refresh_every: int,
    basis: Literal["qr", "eigh"],
    block_size: int | None,
    kernels: Kernels,
) -> Table:
    """Vectors: Adam's diagonal; convolutions and everything else: a diagonal in the basis of every axis' factor."""
    check_choice("basis", basis, ("qr", "eigh"))
    rule, inside = (Rule(Momentum(betas[0], "ema", debias=True, inside=inside)) for inside in (False, True))
    root = Root(0.5, Damping(eps, outside=True))

    def recipe(partition: str) -> Recipe:
        moment = Moment(beta=betas[1], debias=True, composition="trace")
        schedule = Schedule(refresh=refresh_every)
        return Recipe(
            partition, moment, Root(0.5, root.damping, basis, tolerance=1.0), inside, schedule, block=EigenbasisBlock
        )

    diagonal = Recipe(DIAGONAL, Moment(beta=betas[1], debias=True), root, rule)
    return _routes(diagonal, recipe, block_size, kernels)


class KLShampoo(CurvatureOptimizer):
    """KL-Shampoo (Lin et al. 2025): Shampoo whose factors minimise a Kullback-Leibler divergence, without grafting.

    For a tensor of k axes, with d_i their sizes and G_(i) the gradient unfolded along axis i::

        S_i <- β2 S_i + (1 - β2) G_(i) (⊗_{j≠i} (S_j + λI)^-1) G_(i)ᵀ / Π_{j≠i} d_j
        Q_i <- eigenvectors of S_i               every T steps
        Λ_i  = diag(Q_iᵀ S_i Q_i)                every step
        d    = m̂ ×_1 Q_1 (Λ_1 + λ)^-½ Q_1ᵀ … ×_k Q_k (Λ_k + λ)^-½ Q_kᵀ
        w   <- (1 - lr·weight_decay) w - lr d

    with m̂ the gradient's debiased EMA. The covariance of the gradients is taken to be ⊗ S_i, so that d has entries of the
    size of Adam's. λ is relative to the mean eigenvalue; the paper has a small absolute one. Vectors have Adam. Other
    defaults are SOAP's.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size, of the size that Adam likes.
        betas: β1, β2.
        damping: λ, relative to each factor's mean eigenvalue.
        eps: of Adam's diagonal.
        weight_decay: decoupled.
        refresh_every: T, in steps.
        basis: ``"qr"``: one orthogonal iteration from the last basis, and ``"eigh"`` where that is not enough.
        block_size: axes are cut in balanced pieces of at most this many entries; ``None`` leaves them whole.
        kernels: see :class:`SOAP`.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        damping: float | Callable[[int], float] = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        refresh_every: int = 10,
        basis: Literal["qr", "eigh"] = "qr",
        block_size: int | None = 4096,
        kernels: Kernels = "separate",
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            kl_shampoo,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            betas=betas,
            damping=damping,
            eps=eps,
            refresh_every=refresh_every,
            basis=basis,
            block_size=block_size,
            kernels=kernels,
            **flags,
        )


def kl_shampoo(
    betas: tuple[float, float],
    damping: float,
    eps: float,
    refresh_every: int,
    basis: Literal["qr", "eigh"],
    block_size: int | None,
    kernels: Kernels,
) -> Table:
    """Vectors: Adam's diagonal; convolutions and everything else: a factor for every axis."""
    check_choice("basis", basis, ("qr", "eigh"))
    rule = Rule(Momentum(betas[0], "ema", debias=True))
    moment = Moment(beta=betas[1], debias=True)

    def recipe(partition: str) -> Recipe:
        root, schedule = Root(0.5, Damping(damping, "trace"), basis), Schedule(refresh=refresh_every)
        return Recipe(partition, moment, root, rule, schedule, block=LikelihoodBlock)

    diagonal = Recipe(DIAGONAL, moment, Root(0.5, Damping(eps, outside=True)), rule)
    return _routes(diagonal, recipe, block_size, kernels)


def _routes(diagonal: Recipe, recipe: Callable[[str], Recipe], block_size: int | None, kernels: Kernels) -> Table:
    check_choice("kernels", kernels, tuple(KERNELS))
    if block_size is not None:
        check_period("block_size", block_size)
    cut = "" if block_size is None else f"/{block_size}"
    return (
        Route(diagonal, where=is_vector),
        Route(recipe(KERNELS[kernels].format(cut=cut)), kind="conv", where=is_kernel),
        Route(recipe("| ,..." + cut)),
        Route(diagonal),
    )
