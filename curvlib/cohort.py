"""Cohorts: the units of a bucket that take one step together, and what becomes of their gradients on the way.

Parameters of one structure form a *bucket*; those of them that take this step with the same numbers form a *cohort*. Usually
a cohort is its whole bucket and works in place; otherwise its rows are gathered, and put back afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import rules
from .blocks import Means
from .moments import Weight
from .precision import flush_subnormals_
from .recipe import Recipe
from .roots import RootJob
from .rules import Tensors, gated
from .storage import Bucket
from .units import Unit

Group = Mapping[str, Any]
Given = Mapping[str, Mapping[Tensor, Tensor]]


@dataclass
class Piece:
    """A direction on its way into a parameter, with its gradient; both have the dimensions of ``parameter``.

    Attributes:
        parameter: a view of the parameter with its named axes.
        direction: what is subtracted, but for the step size.
        gradient: of the mean loss.
        reference: what was preconditioned: the gradient, or its momentum.
        group: number of the parameter's group.
        source: the parameter itself.
    """

    parameter: Tensor
    direction: Tensor
    gradient: Tensor
    reference: Tensor
    group: int
    source: Tensor


@dataclass
class Cohort:
    """Units of a bucket that share recipe, step and number of updates, so that one call serves them all.

    Attributes:
        bucket: where they live.
        rows: their rows; all of them for a whole bucket.
        recipe: with this step's numbers.
        step: steps taken so far.
        updates: statistics averaged so far.
        warm: whether these began with a warm start.
        heard: what the layers of each unit said since the last step, as means over examples; or none.
        given: what takes the gradient's place in moments: pass -> parameter -> tensor.
    """

    bucket: Bucket
    rows: list[int]
    recipe: Recipe
    step: int
    updates: int
    warm: bool
    heard: list[Means] | None = None
    given: Given = field(default_factory=dict)
    state: dict[str, Any] = field(init=False)
    gradient: Tensors = field(init=False)
    reference: Tensors = field(init=False)
    before: Tensor | None = field(init=False, default=None)
    averaged: tuple[Tensors, Weight, Weight] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.units = [self.bucket.units[row] for row in self.rows]
        self.whole = len(self.rows) == len(self.bucket.units)
        if self.whole:
            self.state = self.bucket.state
            return
        self.index = torch.tensor(self.rows, device=self.bucket.structure.device)
        self.state = {name: self._gather(value) for name, value in self.bucket.state.items()}

    def _gather(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value.index_select(0, self.index)
        if self.bucket.packed:
            return [one.index_select(0, self.index) for one in value]
        return [value[row] for row in self.rows]

    def settle(self) -> None:
        """Put gathered rows back."""
        if self.whole:
            return
        for name, value in self.bucket.state.items():
            if not isinstance(value, list):
                value.index_copy_(0, self.index, self.state[name])
            elif self.bucket.packed:
                for whole, part in zip(value, self.state[name], strict=True):
                    whole.index_copy_(0, self.index, part)

    def listen(self, groups: Sequence[Group], gate: Tensor | None) -> None:
        """Take in the gradients, average the momentum before preconditioning, and the statistics if they are due."""
        self.gradient = self.gradients(groups, gate)
        momentum = self.recipe.rule.momentum
        self.reference = self.gradient
        if momentum is not None and not momentum.after:
            buffer, packed = self.state["momentum"], self.bucket.packed
            self.reference = rules.apply_momentum(buffer, self.gradient, momentum, self.step, packed, gate)
        if self.bucket.block is not None and self.recipe.schedule.takes_statistics(self.step):
            keep, gain = self.recipe.moment.weights(self.updates)
            source = self.reference if self.recipe.moment.of == "momentum" else self.gradient
            if self.recipe.moment.extra:
                source = self._given_gradients(gate)
            self.update(source, gated(keep, 1.0, gate), gated(gain, 0.0, gate))

    def update(self, source: Tensors, keep: Weight, gain: Weight) -> None:
        """Average a second moment in: of gradients, or of what was heard."""
        block = self.bucket.block
        assert block is not None
        if not self.recipe.moment.listens:
            block.update(self.state, source[0] if self.bucket.packed else source, keep, gain)
        elif self.heard is not None:
            block.average(self.state, self.heard, keep, gain)
        else:
            return
        self.updates += 1
        self.averaged = (source, keep, gain)

    def correct(self) -> None:
        """Average in what lives in the roots, if statistics were due; after the refresh."""
        if self.averaged is None:
            return
        block, (source, keep, gain) = self.bucket.block, self.averaged
        assert block is not None
        block.correct(self.state, source[0] if self.bucket.packed else source, self.recipe, keep, gain, self.scale)

    def remember(self) -> None:
        """Keep the parameters of before the step, for a block that follows it."""
        if self.bucket.block is not None and self.bucket.block.again and self.averaged is not None:
            self.before = self._parameters()

    def follow(self, heard: Mapping[Unit, Means], gate: Tensor | None) -> None:
        """Let the block learn from the step that was taken."""
        if self.before is None:
            return
        block, (keep, gain) = self.bucket.block, self.recipe.moment.weights(self.updates - 1)
        assert block is not None
        means, after = [heard[unit] for unit in self.units], self._parameters()
        weights = gated(keep, 1.0, gate), gated(gain, 0.0, gate)
        block.follow(self.state, self.before, after, means, self.recipe, *weights)

    def _parameters(self) -> Tensor:
        """The parameters as a packed batch, ``[n, *layout.shape]``."""
        assert self.bucket.workspace is not None
        batch = self.bucket.workspace.new_empty(len(self.rows), *self.bucket.workspace.shape[1:])
        for unit, one in zip(self.units, batch, strict=True):
            for parameter, window in zip(unit.operand.parameters, unit.operand.windows(one), strict=True):
                window.copy_(parameter.detach().view(window.shape))
        return batch

    def gradients(self, groups: Sequence[Group], gate: Tensor | None) -> Tensors:
        """The gradients of the mean loss: one packed batch, or a tensor for every parameter."""
        return self._packed(groups, gate) if self.bucket.packed else self._separate(groups, gate)

    def _given_gradients(self, gate: Tensor | None) -> Tensors:
        """What another pass found, as :meth:`gradients` has the gradients of the data; zero where the gate is shut."""
        dtype, found = self.bucket.structure.dtype, self.given.get(self.recipe.moment.extra, {})

        def given(parameter: Tensor) -> Tensor:
            one = found.get(parameter)
            value = torch.zeros_like(parameter, dtype=dtype) if one is None else one.to(dtype)
            return value if gate is None else torch.where(gate.to(value.device), value, 0.0)

        if not self.bucket.packed:
            return [given(unit.operand.lead) for unit in self.units]
        assert self.bucket.workspace is not None
        batch = self.bucket.workspace.new_zeros(len(self.rows), *self.bucket.workspace.shape[1:])
        for unit, one in zip(self.units, batch, strict=True):
            for parameter, window in zip(unit.operand.parameters, unit.operand.windows(one), strict=True):
                window.copy_(given(parameter).view(window.shape))
        return [batch]

    def _separate(self, groups: Sequence[Group], gate: Tensor | None) -> list[Tensor]:
        """The gradients as they lie, copied only where something is to be done to them."""
        parameters = [unit.operand.lead for unit in self.units]
        gradients = [_as(parameter.grad, self.bucket.structure.dtype) for parameter in parameters]
        members: dict[int, list[int]] = defaultdict(list)
        for place, unit in enumerate(self.units):
            members[unit.groups[0]].append(place)
        for group, places in members.items():
            mine = [gradients[place] for place in places]
            mine = self._prepared(mine, [parameters[place] for place in places], groups[group], gate)
            for place, gradient in zip(places, mine, strict=True):
                gradients[place] = gradient
        return gradients

    def _packed(self, groups: Sequence[Group], gate: Tensor | None) -> list[Tensor]:
        """The gradients copied into one batch; what has none counts as zero."""
        assert self.bucket.workspace is not None
        # Several cohorts of one bucket are in flight together; only a whole bucket has the workspace to itself.
        shape = (len(self.rows), *self.bucket.workspace.shape[1:])
        batch = self.bucket.workspace if self.whole else self.bucket.workspace.new_empty(shape)
        members: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for unit, one in zip(self.units, batch, strict=True):
            windows = unit.operand.windows(one)
            for parameter, window, group in zip(unit.operand.parameters, windows, unit.groups, strict=True):
                if parameter.grad is None:
                    window.zero_()
                else:
                    gradient = _as(parameter.grad, window.dtype).view(window.shape)
                    members[group].append((window, gradient, parameter.detach().view(window.shape)))
        for group, entries in members.items():
            places, gradients, parameters = (list(column) for column in zip(*entries, strict=True))
            torch._foreach_copy_(places, self._prepared(gradients, parameters, groups[group], gate))
        return [flush_subnormals_(batch)]

    def _prepared(
        self, gradients: Tensors, parameters: list[Tensor], group: Group, gate: Tensor | None
    ) -> list[Tensor]:
        """The gradient of the mean loss to be minimised, with L2 decay where the rule says so; never in place."""
        factor = (-1.0 if group["maximize"] else 1.0) / group["reduction_factor"]
        if isinstance(factor, Tensor) or factor != 1.0:
            gradients = torch._foreach_mul(gradients, factor)
        if self.recipe.rule.decay == "l2" and group["weight_decay"] != 0:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if gate is not None:
            gradients = [torch.where(gate.to(one.device), one, 0.0) for one in gradients]
        return list(gradients)

    def root_jobs(self) -> Iterable[RootJob]:
        """What a refresh has to solve."""
        if self.bucket.block is None:
            return ()
        return self.bucket.block.roots(self.state, self.recipe, self.scale)

    @property
    def scale(self) -> float:
        """What the stored average is multiplied by."""
        return self.recipe.moment.scale(self.updates, self.warm)

    def direct(self, gate: Tensor | None) -> Tensors:
        """The directions: precondition, graft, finish, average."""
        block, rule, packed = self.bucket.block, self.recipe.rule, self.bucket.packed
        direction = self.reference
        if block is not None:
            operand = self.reference[0] if packed else self.reference
            exponent = float(self.recipe.root.exponent)
            applied = block.apply(self.state, operand, self.recipe, exponent, self.scale)
            direction = [applied] if packed else applied
        if rule.grafting is not None:
            second = self.state.get("grafting")
            direction = rules.graft(
                direction, self.reference, self.gradient, second, rule.grafting, self.step, packed, gate
            )
        if rule.finish:
            direction = self._finished(direction, gate)
        if rule.momentum is not None and rule.momentum.after:
            direction = rules.apply_momentum(self.state["momentum"], direction, rule.momentum, self.step, packed, gate)
        return direction

    def _finished(self, direction: Tensors, gate: Tensor | None) -> list[Tensor]:
        """The directions after the rule's finishes; zero where the gate is shut, whatever these make of nothing."""
        windows, references = self.windows(direction), self.windows(self.reference)
        parameters = [
            parameter.detach().view(window.shape).to(window.dtype)
            for (parameter, _), window in zip(self.members(), windows, strict=True)
        ]
        finished: Sequence[Tensor] = windows
        for finish in self.recipe.rule.finish:
            finished = finish(finished, references, parameters)
        if gate is not None:
            finished = [torch.where(gate.to(one.device), one, 0.0) for one in finished]
        if not self.bucket.packed:
            return list(finished)
        batch = [torch.empty_like(direction[0])]
        torch._foreach_copy_(self.windows(batch), list(finished))
        return batch

    def members(self) -> Iterable[tuple[Tensor, int]]:
        """Every parameter with the number of its group."""
        for unit in self.units:
            yield from zip(unit.operand.parameters, unit.groups, strict=True)

    def windows(self, tensors: Tensors) -> list[Tensor]:
        """Operands cut into their parameters: a view for every one of :meth:`members`."""
        if not self.bucket.packed:
            return list(tensors)
        return [
            window for unit, one in zip(self.units, tensors[0], strict=True) for window in unit.operand.windows(one)
        ]

    def pieces(self, direction: Tensors) -> Iterable[Piece]:
        """Directions, parameter by parameter, for those that have a gradient."""
        columns = (self.windows(tensors) for tensors in (direction, self.gradient, self.reference))
        for (parameter, group), window, gradient, reference in zip(self.members(), *columns, strict=True):
            if parameter.grad is not None:
                view = parameter.detach().view(window.shape)
                yield Piece(view, window, gradient, reference, group, parameter)


def _as(gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert gradient is not None
    return gradient.detach().to(dtype)


def cohorts(
    bucket: Bucket,
    recipes: Mapping[Unit, Recipe],
    heard: Mapping[Unit, Means],
    given: Given | None = None,
) -> list[Cohort]:
    """The active units of a bucket, grouped by what must be equal for one call."""
    members: dict[tuple[int, int, int, int, bool], list[int]] = defaultdict(list)
    chosen: dict[int, Recipe] = {}
    for row, (unit, (step, updates, warm)) in enumerate(zip(bucket.units, bucket.counters.tolist(), strict=True)):
        if unit.active():
            recipe = recipes[unit]
            chosen[id(recipe)] = recipe
            members[id(recipe), step, updates, warm, unit in heard].append(row)
    return [
        Cohort(
            bucket,
            rows,
            chosen[recipe],
            step,
            updates,
            bool(warm),
            [heard[bucket.units[row]] for row in rows] if listened else None,
            given or {},
        )
        for (recipe, step, updates, warm, listened), rows in members.items()
    ]
