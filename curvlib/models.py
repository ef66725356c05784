"""Models of the loss along a direction, by which a rule may decide how far to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .checks import Number, check_number, check_period


@dataclass(frozen=True)
class Model:
    """What decides step sizes; it declares what it keeps, and what it cannot do together with.

    Attributes:
        needs: the pass that it rests on, see :class:`~curvlib.passes.Passes`: ``"outputs"`` or ``"loss"``.
        combines: whether it also takes over momentum, so that a rule may have none of its own.
        scalars: names of numbers kept for every operand.
    """

    needs: ClassVar[str] = "outputs"
    combines: ClassVar[bool] = False
    scalars: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Quadratic(Model):
    """Step size and momentum that minimise a quadratic model of the loss, see :mod:`curvlib.quadratic`.

    Needs ``optimizer.observe(outputs, likelihood)`` at every step, and for ``adapt_every`` also ``step(closure)``.

    Args:
        damping: λ of the model.
        momentum: combine with the last update.
        adapt_every: T, in steps, of the Levenberg-Marquardt rule that changes the group's ``damping``; ``None`` for never.
        rate: ω^(1/T).
    """

    combines: ClassVar[bool] = True

    damping: Number = 1e-2
    momentum: bool = True
    adapt_every: int | None = None
    rate: float = 19 / 20

    def __post_init__(self) -> None:
        check_number("damping", self.damping)
        check_number("rate", self.rate, high=1.0, strict=True)
        if self.adapt_every is not None:
            check_period("adapt_every", self.adapt_every)


@dataclass(frozen=True)
class Layerwise(Model):
    """A step size for every layer, from the Hessian's diagonal block of that layer, see :mod:`curvlib.layerwise`.

    Needs ``optimizer.observe(loss=loss)`` before ``loss.backward(retain_graph=True)``.

    Args:
        damping: λ.
        beta: β of the averages.
        largest: largest step size.
        every: T: a layer is measured at every T-th step, the layers in turn; all at the first.
    """

    needs: ClassVar[str] = "loss"
    scalars: ClassVar[tuple[str, ...]] = ("slope", "bend", "square")

    damping: Number = 1e-3
    beta: Number = 0.9
    largest: Number = 1.0
    every: int = 10

    def __post_init__(self) -> None:
        check_number("damping", self.damping)
        check_number("beta", self.beta, high=1.0)
        check_number("largest", self.largest, strict=True)
        check_period("every", self.every)
