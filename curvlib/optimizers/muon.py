"""Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..finishes import Orthogonal
from ..layers import Slot
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule
from ..routing import Route, Table, is_weight


class Muon(CurvatureOptimizer):
    """Muon (Jordan et al. 2024): orthogonalised momentum for matrices, Adam for everything else.

    ::

        M <- μ M + (1 - μ) g
        m  = μ M + (1 - μ) g          with nesterov, else M
        d  = scale · (m mᵀ)^(-1/2) m          by an odd polynomial iteration, see :class:`~curvlib.finishes.Orthogonal`
        w <- (1 - lr·weight_decay) w - lr d

    It is one-sided Shampoo without memory: the curvature is the momentum's own (m mᵀ), to the power -1/2. Convolutions
    merge their input axes. On matrices alone it is the twin of :class:`torch.optim.Muon`, with ``scale="spectral"`` for its
    ``adjust_lr_fn="original"`` and ``scale="adam"`` for ``"match_rms_adamw"``. The default is the latter, since one lr then
    suits matrices and the rest (embeddings, vectors), which have Adam's diagonal. Output layers the authors leave to Adam;
    name them with a routing table of your own.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        momentum: μ.
        weight_decay: decoupled.
        nesterov: look ahead.
        iterations: of the polynomial.
        coefficients: ``"quintic"`` (the authors'), or ``"polar-express"`` (Amsel et al. 2025).
        scale: ``"spectral"``, ``"adam"``, or ``None``.
        low_precision: iterate in bfloat16, as the authors do.
        betas: Adam's, of the rest.
        eps: Adam's, of the rest.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`; it tells embeddings from matrices.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        momentum: float | Callable[[int], float] = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        iterations: int = 5,
        coefficients: Literal["quintic", "polar-express"] = "quintic",
        scale: Literal["spectral", "adam"] | None = "adam",
        low_precision: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            muon,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            momentum=momentum,
            nesterov=nesterov,
            iterations=iterations,
            coefficients=coefficients,
            scale=scale,
            low_precision=low_precision,
            betas=betas,
            eps=eps,
            **flags,
        )


def muon(
    momentum: float,
    nesterov: bool,
    iterations: int,
    coefficients: Literal["quintic", "polar-express"],
    scale: Literal["spectral", "adam"] | None,
    low_precision: bool,
    betas: tuple[float, float],
    eps: float,
) -> Table:
    """Matrices and kernels: orthogonalised momentum; embeddings, norms and vectors: Adam's diagonal."""
    finish = Orthogonal(iterations, coefficients, scale, "bfloat16" if low_precision else None)
    rule = Rule(Momentum(momentum, "ema", nesterov=nesterov), finish=(finish,))
    diagonal = Recipe(
        DIAGONAL,
        Moment(beta=betas[1], debias=True),
        Root(0.5, Damping(eps, outside=True)),
        Rule(Momentum(betas[0], "ema", debias=True)),
    )
    return (Route(Recipe(DIAGONAL, root=Root(exponent=0), rule=rule), where=_is_matrix), Route(diagonal))


def _is_matrix(slot: Slot) -> bool:
    """Whether a parameter maps inputs to outputs."""
    return is_weight(slot) and slot.kind != "embedding"
