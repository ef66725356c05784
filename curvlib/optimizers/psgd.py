"""PSGD-Kron."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import WhiteningBlock
from ..checks import Flags, check_count
from ..finishes import ClipEntries, ClipRms
from ..layers import Slot
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule, Schedule, Tracking
from ..routing import Route, Table

_AXES = ("o", "i", "v", "d", "c")


class PSGDKron(CurvatureOptimizer):
    """PSGD-Kron (Li 2015; Pooladzandi & Li 2024): a Kronecker whitening of gradients that is fitted, not solved for.

    For a tensor of k axes, with (P g)_(i) the whitened gradient unfolded along axis i, t the entries beside that axis::

        P    = ⊗ Q_i²,   T = (P g)_(i) (P g)_(i)ᵀ
        Q_i <- symmetric descent of step η towards T = t I          every T steps, see WhiteningBlock
        m   <- μ m + (1 - μ) g
        d    = P m̂, scaled down to a root mean square of 2, entries cut off at ±10
        w   <- (1 - lr·weight_decay) w - lr d

    This is the authors' geometry "QUAD" on gradients; their default geometry has the same fixed point. Updates come on a
    schedule, not at random, and nothing is drawn. An axis above ``max_size`` entries has a diagonal factor.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        rate: η.
        momentum: μ, a debiased EMA.
        weight_decay: decoupled.
        bound_beta: β of the bound by which η is divided.
        max_size: largest axis with a dense factor.
        statistics_every: T, in steps.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        rate: float | Callable[[int], float] = 0.1,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        bound_beta: float = 0.9,
        max_size: int = 8192,
        statistics_every: int = 1,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            psgd_kron,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            rate=rate,
            momentum=momentum,
            bound_beta=bound_beta,
            max_size=max_size,
            statistics_every=statistics_every,
            **flags,
        )


def psgd_kron(rate: float, momentum: float, bound_beta: float, max_size: int, statistics_every: int) -> Table:
    """A dense factor for every axis, a diagonal one for one that is long; a diagonal where several are."""
    check_count("max_size", max_size)

    def recipe(partition: str) -> Recipe:
        return Recipe(
            partition,
            Moment(),
            Root(0.5, Damping(0.0), tracking=Tracking(rate, bound_beta)),
            Rule(Momentum(momentum, "ema", debias=True), finish=(ClipRms(2.0), ClipEntries(10.0))),
            Schedule(statistics_every),
            block=WhiteningBlock,
        )

    whole = Route(recipe("| ,..."), where=_Long(max_size))
    halves = [Route(recipe(f"| [{axis}], ,..."), where=_Long(max_size, axis)) for axis in _AXES]
    return (whole, *halves, Route(recipe("| [...]")))


@dataclass(frozen=True)
class _Long:
    """Whether just one axis of a parameter, or none, has more entries than a limit."""

    limit: int
    axis: str = ""

    def __call__(self, slot: Slot) -> bool:
        return [axis for axis, size in slot.sizes.items() if size > self.limit] == [*([self.axis] if self.axis else [])]
