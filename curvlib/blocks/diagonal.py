"""The diagonal block: every entry a block of its own, as elementwise operations over lists of tensors.

The same mathematics as the standard block with one diagonal factor, without packing operands and without stored roots:
the framework's multi-tensor kernels read each tensor where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import number
from ..contraction import Target, add_independent, add_samples, independent_places
from ..layout import Layout
from ..moments import Weight
from ..recipe import Damping, Recipe
from ..signals import Signal
from ..solvers import SILENT
from .base import Block, Means, Spec, State, Sums


class DiagonalBlock(Block):
    """State of one operand: ``moment``; with ``centered`` also ``mean``, with ``maximum`` also ``peak``.

    Operands and state are lists of tensors, one a parameter, of any shapes. Roots cost no more than reading them and are
    always fresh, whatever the schedule.
    """

    elementwise: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        self._centered, self._maximum = recipe.moment.centered, recipe.moment.maximum
        self._initial, self._order = number(recipe.moment.initial), recipe.moment.order

    def spec(self) -> dict[str, Spec]:
        """Entrywise second moment, mean and maximum, each in the operand's shape."""
        specs = {"moment": Spec(self.layout.shape, fill=self._initial, order=self._order)}
        if self._centered:
            specs["mean"] = Spec(self.layout.shape)
        if self._maximum:
            specs["peak"] = Spec(self.layout.shape, "peak")
        return specs

    def update(self, state: State, operand: list[Tensor], keep: Weight, gain: Weight) -> None:
        """Entrywise v <- keep v + gain g², or gain g of a first moment."""
        torch._foreach_mul_(state["moment"], keep)
        if self._order == 1:
            torch._foreach_add_(state["moment"], torch._foreach_mul(operand, gain))
        elif isinstance(gain, Tensor):
            torch._foreach_add_(state["moment"], torch._foreach_mul(torch._foreach_mul(operand, operand), gain))
        else:
            torch._foreach_addcmul_(state["moment"], operand, operand, value=gain)
        if self._centered:
            torch._foreach_mul_(state["mean"], keep)
            torch._foreach_add_(state["mean"], torch._foreach_mul(operand, gain))
        if self._maximum:
            torch._foreach_maximum_(state["peak"], state["moment"])

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the squares of single examples' gradients, or of a bias' output gradients."""
        total = sums.zeroed_()["moment"]
        if not total.numel():
            return
        flat = total.new_zeros(1, total.numel())
        if recipe.moment.of == "signals":
            place = independent_places(self.layout)[0][0]
            add_independent(flat, place, self.layout, signals[0], recipe.moment.sharing == "reduce")
        else:
            add_samples([Target(0, 0, flat)], self.layout, signals)
        total.add_(self.layout.unblock([flat.view(self.layout.regions[0].shape)], total[None])[0])

    def average(self, state: State, means: Sequence[Means], keep: Weight, gain: Weight) -> None:
        """Entrywise v <- keep v + gain S."""
        rows = state["moment"]
        shaped = [
            {name: (value.view(row.shape), factor) for name, (value, factor) in mean.items()}
            for mean, row in zip(means, rows, strict=True)
        ]
        super().average({"moment": rows}, shaped, keep, gain)
        if self._maximum:
            torch._foreach_maximum_(state["peak"], rows)

    def apply(self, state: State, operand: list[Tensor], recipe: Recipe, exponent: float, scale: float) -> list[Tensor]:
        """(scale v + λ)^-p g, or g / ((scale v)^p + ε); g where a relative λ says that there is no signal yet."""
        value = self._value(state, scale)
        damping = recipe.damping
        shift = _shifts(value, damping) if exponent > 0 else 0.0
        if isinstance(shift, list):
            silent = [one <= SILENT for one in shift]
            shift = [one.masked_fill(quiet, 1.0) for one, quiet in zip(shift, silent, strict=True)]
            value = [one.masked_fill(quiet, 0.0) for one, quiet in zip(value, silent, strict=True)]
        if not damping.outside:
            torch._foreach_add_(value, shift)
        if exponent == 0.5:
            torch._foreach_sqrt_(value)
        elif exponent != 1:
            torch._foreach_pow_(value, float(exponent))
        if damping.outside:
            torch._foreach_add_(value, shift)
        return list(torch._foreach_div(operand, value))

    def _value(self, state: State, scale: float) -> list[Tensor]:
        """A fresh copy of the debiased second moment."""
        value = list(torch._foreach_mul(state["peak" if self._maximum else "moment"], scale))
        if self._centered:
            torch._foreach_addcmul_(value, state["mean"], state["mean"], value=-(scale**2))
        if self._centered or self._order == 1:
            torch._foreach_clamp_min_(value, 0.0)
        return value

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """The diagonal as a matrix, for operands of one shape."""
        return torch.stack([one.flatten().diag() for one in self._value(state, scale)])


def _shifts(value: list[Tensor], damping: Damping) -> list[Tensor] | float:
    """λ: one number, or one for every tensor where it is relative to the tensor's mean or largest entry."""
    strength, floor = number(damping.value), number(damping.floor)
    if damping.relative_to is None:
        return strength
    reduce = torch.amax if damping.relative_to == "largest" else torch.mean
    return [(strength * reduce(one)).clamp_min(floor) if one.numel() else one.new_zeros(()) for one in value]
