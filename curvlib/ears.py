"""Ears: one listening unit each, from the signals of its layers' calls to sums over examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .blocks import Block, State, Sums
from .layers import Reading
from .precision import full_precision
from .recipe import Recipe
from .signals import Signal, joined
from .units import Unit


class TapError(RuntimeError):
    """A layer could not be heard, or not be understood; names it and the way out."""


class TapWarning(UserWarning):
    """Parameters whose layers can't be heard have moments of the batch gradient instead."""


@dataclass(eq=False)
class Ear:
    """One listening unit.

    Attributes:
        unit: whose layers are heard.
        recipe: what it is routed to.
        block: its structure.
        readings: the layers that speak of it.
        due: whether statistics are due.
        calls: calls of its layers that have not been heard yet.
        waiting: signals of calls, by backward pass, until all calls have been heard.
        sums: what has been heard since the last step.
        spare: the memory of earlier sums.
        ever: whether anything was ever heard.
        step: steps that its parameters have taken; it decides which examples thinning leaves.
        held: the state of its curvature after the last step, by name.
        again: whether this is the second pass of a step, which is of first moments alone.
        scale: what the loss was multiplied by at the last step: gradients of outputs are divided by it before they are
            squared, since the scale of a GradScaler grows to numbers whose squares are infinite.
    """

    unit: Unit
    recipe: Recipe
    block: Block
    readings: Sequence[Reading]
    due: bool = True
    calls: int = 0
    waiting: dict[int, list[Signal]] = field(default_factory=dict)
    sums: Sums | None = None
    spare: Sums | None = None
    ever: bool = False
    step: int = 0
    held: State = field(default_factory=dict)
    again: bool = False
    scale: float | Tensor = 1.0

    def trains(self) -> bool:
        """Whether any of its parameters wants a gradient."""
        return any(parameter.requires_grad for parameter in self.unit.parameters)

    def graded(self) -> bool:
        """Whether any of its parameters holds a gradient other than zero."""
        gradients = [parameter.grad for parameter in self.unit.parameters]
        return any(bool(gradient.any()) for gradient in gradients if gradient is not None)

    def empty(self) -> Sums:
        """Sums of nothing, where those of the last step were."""
        lead, sums = self.unit.lead, self.spare
        dtype = self.recipe.moment.dtype_for(lead.dtype)
        if self.again:
            return replace(self.block.sums(dtype, lead.device, first=True), scale=self.scale)
        self.spare = None
        if sums is None or any((one.dtype, one.device) != (dtype, lead.device) for one in sums.tensors.values()):
            sums = self.block.sums(dtype, lead.device)
        else:
            sums.renew_()
        sums.held, sums.scale = self.held, self.scale
        return sums

    def drop(self) -> None:
        """Forget what was heard, but keep its memory."""
        if self.sums is not None:
            self.spare, self.sums = (self.spare if self.again else self.sums), None
        self.waiting = {}

    @full_precision()
    def take(self, repeated: bool) -> None:
        """Sum up what is waiting, one backward pass after another.

        Args:
            repeated: the same inputs were summed up before, with another seed.
        """
        moment = self.recipe.moment
        waiting, self.waiting = self.waiting, {}
        for signals in waiting.values():
            if self.sums is None:
                self.sums = self.empty()
            sums = self.sums
            dtype = moment.dtype_for(self.unit.lead.dtype)
            try:
                together = [joined(same).cast(dtype) for same in _by_sources(signals)]
            except ValueError as error:
                raise TapError(
                    f"the layer of {self.unit.name} {error}; its calls can't be paired by example. Route this parameter "
                    "to a recipe with of='gradient'"
                ) from None
            if not repeated:
                sums.examples = sums.examples + _examples(together[0])
            over_positions = moment.of == "signals" and moment.sharing == "expand"
            if moment.labels == "data" and (isinstance(sums.scale, Tensor) or sums.scale != 1.0):
                together = [replace(one, delta=one.delta / sums.scale) for one in together]
            together = [one.thinned(moment.subsample, self.step, over_positions) for one in together]
            if repeated:
                rest = {name: value for name, value in sums.tensors.items() if name not in sums.of_input}
                self.block.collect(replace(sums, tensors=rest), together, self.recipe)
            else:
                sums.places = sums.places + (_places(together[0]) if over_positions else _examples(together[0]))
                self.block.collect(sums, together, self.recipe)
            self.ever = True


def _by_sources(signals: Sequence[Signal]) -> Iterator[list[Signal]]:
    groups: dict[tuple[tuple[str, ...], ...], list[Signal]] = defaultdict(list)
    for signal in signals:
        groups[signal.delta_axes, signal.input_axes].append(signal)
    return iter(groups.values())


def _examples(signal: Signal) -> float | Tensor:
    if signal.weight is None:
        return float(signal.delta.shape[0])
    return (signal.weight > 0).any(1).sum().to(torch.float64)


def _places(signal: Signal) -> float | Tensor:
    if signal.weight is None:
        return float(signal.delta.shape[0] * signal.delta.shape[1])
    return (signal.weight > 0).sum().to(torch.float64)
