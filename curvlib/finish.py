"""Finishes: maps of a direction that need no state, such as a trust ratio or a sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Finish:
    """A map of directions, ``Rule(finish=(…,))``; subclasses are frozen dataclasses that define ``__call__``.

    Finishes come after preconditioning and grafting, since they set what those leave open, such as a norm; and before a
    momentum that averages directions, the clip, decoupled decay and the step size, which act on what is really stepped
    along. Numbers among a subclass's fields may be callables of the step.

    Attributes:
        elementwise: whether every entry follows from its own entry alone, so that rows of a parameter may be treated apart.
    """

    elementwise: ClassVar[bool] = False

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The directions to be used instead.

        The lists hold one tensor for every parameter, a weight and its joined bias apart, all of one shape and dtype for
        each parameter. How parameters are grouped into lists depends on what shares a batch, so that each direction should
        follow from its own parameter alone. A parameter without a gradient may be among them.

        Args:
            direction: what would be subtracted, but for the step size; not to be changed.
            reference: what was preconditioned, the gradient or its momentum; not to be changed.
            parameters: the parameters as they are; not to be changed.

        Returns:
            As many tensors of the same shapes. They may be computed on the device only: nothing should wait for it.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(direction, reference, parameters)")
