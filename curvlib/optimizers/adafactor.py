"""AdaFactor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..finishes import ClipRms, ParameterScale
from ..layers import Slot
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Recipe, Root, Rule
from ..routing import Route, Table


class Adafactor(CurvatureOptimizer):
    """AdaFactor (Shazeer & Stern 2018, Algorithms 4 and 5); the twin of :class:`torch.optim.Adafactor`.

    A diagonal that is itself a Kronecker product of two diagonals, normalised by the trace, ``| [o], [i]``::

        r <- β_t r + (1 - β_t) mean over columns of g²          c likewise over rows; β_t = 1 - t^beta2_decay
        v  = r cᵀ / mean(r)                                      vectors: v <- β_t v + (1 - β_t) g²
        u  = g / √v,     u <- u / max(1, RMS(u) / d)
        w <- (1 - ρ weight_decay) w - max(eps, RMS(w)) ρ u       ρ = min(lr, t^-½)

    ε₁ = 1e-30 is added to every factor. As torch's does, it factors the last two dimensions of a tensor and numbers the
    others. Torch's decay is by lr instead of ρ, which is the same for the first lr^-2 steps.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: largest relative step size.
        beta2_decay: of β_t.
        eps: least scale of a parameter.
        d: largest root mean square of a step.
        weight_decay: decoupled.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-2,
        beta2_decay: float = -0.8,
        eps: float = 1e-3,
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        if beta2_decay > 0:
            raise ValueError(f"beta2_decay must be at most 0, got {beta2_decay!r}")
        super().__init__(
            params,
            adafactor,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            beta2=Decaying(beta2_decay),
            eps=eps,
            d=d,
            **flags,
        )


def largest_step(step: int) -> float:
    """t^-½ of step t = 1, 2, …, which is counted from 0."""
    return (step + 1) ** -0.5


class Decaying:
    """The average β_t = 1 - t^decay of step t = 1, 2, …."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, step: int) -> float:
        """β of a step, from 0."""
        return 1 - (step + 1) ** self.decay


def adafactor(beta2: float | Callable[[int], float], eps: float, d: float) -> Table:
    """Matrices and higher: two diagonal factors over the last two dimensions; vectors: their diagonal."""
    root, rule = Root(0.5, Damping(1e-30)), Rule(finish=(ClipRms(d), ParameterScale(eps)), lr_limit=largest_step)
    factored = Moment(beta=beta2, composition="trace")
    matrices = tuple(
        Route(Recipe(f"{own} | [y], [z]", factored, root, rule, axes=f"{own} y z".strip()), where=Rank(dimensions))
        for dimensions, own in ((2, ""), (3, "a"), (4, "a b"), (5, "a b c"))
    )
    return (*matrices, Route(Recipe(DIAGONAL, Moment(beta=beta2), root, rule)))


class Rank:
    """A predicate: whether a parameter has so many dimensions."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def __call__(self, slot: Slot) -> bool:
        """Whether it has."""
        return slot.ndim == self.dimensions
