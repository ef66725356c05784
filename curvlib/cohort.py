"""Cohorts: the units of a bucket that take one step together, and what becomes of their gradients on the way.

Parameters of one structure form a *bucket*; those of them that take this step with the same numbers form a *cohort*. Usually
a cohort is its whole bucket and works in place; otherwise its rows are gathered, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import rules
from .blocks import Means
from .interrupts import unbroken
from .members import Members, members_of, picked
from .moments import Weight
from .precision import copy_flushed_, flush_subnormals_
from .recipe import Momentum, Recipe
from .roots import RootJob
from .rules import Tensors, gated
from .storage import Bucket
from .units import Lineup, Unit

_LARGE = 1 << 14  # entries
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
        members: who they are.
        recipe: with this step's numbers.
        step: steps taken so far.
        updates: statistics averaged so far.
        warm: whether these began with a warm start.
        heard: what the layers of each unit said since the last step, as means over examples; or none.
        given: what takes the gradient's place in moments: pass -> parameter -> tensor.
    """

    bucket: Bucket
    members: Members
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
        if self.members.whole:
            self.state = self.bucket.state
            return
        self.state = {name: self._gather(value) for name, value in self.bucket.state.items()}

    @property
    def units(self) -> list[Unit]:
        """Theirs."""
        return self.members.units

    def _gather(self, value: Any) -> Any:
        index = self.members.index
        if not isinstance(value, list):
            return value.index_select(0, index)
        if self.bucket.packed:
            return [one.index_select(0, index) for one in value]
        return [value[row] for row in self.members.rows]

    def settle(self) -> None:
        """Put gathered rows back."""
        index = self.members.index
        if index is None:
            return
        for name, value in self.bucket.state.items():
            if not isinstance(value, list):
                value.index_copy_(0, index, self.state[name])
            elif self.bucket.packed:
                for packed, part in zip(value, self.state[name], strict=True):
                    packed.index_copy_(0, index, part)

    def count(self, step: int) -> None:
        """Keep the counters of the next step."""
        now = torch.tensor([step, self.updates, int(self.warm)])
        if self.members.whole:
            self.bucket.counters.copy_(now)
        else:
            self.bucket.counters[self.members.rows] = now

    def listen(self, groups: Sequence[Group], gate: Tensor | None) -> None:
        """Take in the gradients, average the momentum before preconditioning, and the statistics if they are due."""
        self.gradient = self.gradients(groups, gate)
        momentum = self.recipe.rule.momentum
        self.reference = self.gradient
        if momentum is not None and not momentum.after and not momentum.inside:
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
        if self.recipe.moment.listens and self.heard is None:
            return
        with unbroken:
            if self.heard is None or not self.recipe.moment.listens:
                block.update(self.state, source[0] if self.bucket.packed else source, keep, gain)
            else:
                block.average(self.state, self.heard, keep, gain)
        self.updates += 1
        self.averaged = (source, keep, gain)

    def correct(self) -> None:
        """Average in what lives in the roots, if statistics were due; after the refresh."""
        block = self.bucket.block
        if self._inside is not None:
            assert block is not None
            self.reference = [block.turn(self.state, self.gradient[0])]
        if self.averaged is None:
            return
        source, keep, gain = self.averaged
        assert block is not None
        if self._inside is not None:
            source = self.reference if source is self.gradient else [block.turn(self.state, source[0])]
        with unbroken:
            block.correct(self.state, source[0] if self.bucket.packed else source, self.recipe, keep, gain, self.scale)

    @property
    def _inside(self) -> Momentum | None:
        """The momentum that is kept in the block's bases."""
        momentum = self.recipe.rule.momentum
        return momentum if momentum is not None and momentum.inside else None

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
        with unbroken:
            block.follow(self.state, self.before, after, means, self.recipe, *weights, self.scale)

    def _parameters(self) -> Tensor:
        """The parameters as a packed batch, ``[n, *layout.shape]``."""
        batch = self._batch()
        for window, view in zip(self.members.windows([batch]), self.members.views(), strict=True):
            window.copy_(view)
        return batch

    def _batch(self) -> Tensor:
        """Room for one packed operand of every unit."""
        assert self.bucket.workspace is not None
        return self.bucket.workspace.new_empty(len(self.members.rows), *self.bucket.workspace.shape[1:])

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

        values = [given(one) for one in self.members.parameters]
        if not self.bucket.packed:
            return values
        batch = self._batch()
        for window, value in zip(self.members.windows([batch]), values, strict=True):
            window.copy_(value.view(window.shape))
        return [batch]

    def _separate(self, groups: Sequence[Group], gate: Tensor | None) -> list[Tensor]:
        """The gradients as they lie, copied only where something is to be done to them."""
        dtype, members = self.bucket.structure.dtype, self.members
        raw = members.gradients()
        gradients = [one if one.dtype == dtype else one.to(dtype) for one in raw if one is not None]
        for group, places in members.by_group(raw).items():
            mine = [gradients[place] for place in places]
            prepared = self._prepared(mine, picked(members.parameters, places), groups[group], gate)
            if prepared is not mine:
                for place, gradient in zip(places, prepared, strict=True):
                    gradients[place] = gradient
        return gradients

    def _packed(self, groups: Sequence[Group], gate: Tensor | None) -> list[Tensor]:
        """The gradients copied into one batch; what has none counts as zero."""
        assert self.bucket.workspace is not None
        # Several cohorts of one bucket are in flight together; only a whole bucket has the workspace to itself.
        members = self.members
        batch = self.bucket.workspace if members.whole else self._batch()
        windows, raw, views = members.windows([batch]), members.gradients(), members.views()
        apart = batch.is_cpu and batch.numel() >= _LARGE * len(windows)  # then one by one, in one pass over memory
        for window, gradient in zip(windows, raw, strict=True):
            if gradient is None:
                window.zero_()
        for group, places in members.by_group(raw).items():
            targets = [windows[place] for place in places]
            gradients = [one for one in (raw[place] for place in places) if one is not None]
            gradients = [
                one if one.shape == target.shape else one.view(target.shape)
                for one, target in zip(gradients, targets, strict=True)
            ]
            prepared = self._prepared(gradients, picked(views, places), groups[group], gate)
            if not apart:
                torch._foreach_copy_(targets, prepared)
                continue
            for target, gradient in zip(targets, prepared, strict=True):
                copy_flushed_(target, gradient)
        return [batch if apart else flush_subnormals_(batch)]

    def _prepared(self, gradients: Tensors, parameters: list[Tensor], group: Group, gate: Tensor | None) -> Tensors:
        """The gradient of the mean loss to be minimised, with L2 decay where the rule says so; never in place."""
        factor = (-1.0 if group["maximize"] else 1.0) / group["reduction_factor"]
        scaled = isinstance(factor, Tensor) or factor != 1.0
        decays = self.recipe.rule.decay == "l2" and group["weight_decay"] != 0
        if scaled or decays:
            dtype = self.bucket.structure.dtype
            gradients = [one if one.dtype == dtype else one.to(dtype) for one in gradients]
        if scaled:
            gradients = torch._foreach_mul(gradients, factor)
        if decays:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if gate is not None:
            gradients = [torch.where(gate.to(one.device), one, 0.0) for one in gradients]
        return gradients

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
            if (inside := self._inside) is not None:
                buffer = self.state["momentum"]
                (operand,) = rules.apply_momentum(buffer, self.reference, inside, self.step, packed, gate)
                divided = block.divide(self.state, operand, self.recipe, exponent, self.scale)
                return [block.turn(self.state, divided, back=True)]
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
        windows, references = self.members.windows(direction), self.members.windows(self.reference)
        parameters = [one.detach().to(window.dtype) for one, window in zip(self.members.views(), windows, strict=True)]
        finished: Sequence[Tensor] = windows
        for finish in self.recipe.rule.finish:
            finished = finish(finished, references, parameters)
        if gate is not None:
            finished = [torch.where(gate.to(one.device), one, 0.0) for one in finished]
        if not self.bucket.packed:
            return list(finished)
        batch = [torch.empty_like(direction[0])]
        torch._foreach_copy_(self.members.windows(batch), list(finished))
        return batch

    def pieces(self, direction: Tensors) -> Iterable[Piece]:
        """Directions, parameter by parameter, for those that have a gradient."""
        members = self.members
        columns = [members.windows(tensors) for tensors in (direction, self.gradient, self.reference)]
        everything = zip(members.parameters, members.views(), members.groups, *columns, strict=True)
        for parameter, view, group, window, gradient, reference in everything:
            if parameter.grad is not None:
                yield Piece(view.detach(), window, gradient, reference, group, parameter)


def cohorts(
    bucket: Bucket,
    recipes: Mapping[Unit, Recipe],
    lineup: Lineup,
    heard: Mapping[Unit, Means],
    given: Given | None = None,
) -> list[Cohort]:
    """The active units of a bucket, grouped by what must be equal for one call."""
    units, rows = bucket.units, bucket.rows(lineup)
    if not rows:
        return []
    if not heard and bucket.steady is not None and bucket.steady[0] is lineup and bucket.steady[1] is recipes:
        _, _, members, recipe = bucket.steady
        counters = bucket.counters.tolist()
        if counters.count(counters[0]) == len(counters):
            step, updates, warm = counters[0]
            return [Cohort(bucket, members, recipe, step, updates, bool(warm), None, given or {})]
    together: dict[tuple[int, int, int, int, bool], list[int]] = {}
    chosen: dict[int, Recipe] = {}
    counters = bucket.counters.tolist()
    for row in rows:
        recipe, (step, updates, warm) = recipes[units[row]], counters[row]
        chosen[id(recipe)] = recipe
        together.setdefault((id(recipe), step, updates, warm, units[row] in heard), []).append(row)
    found = [
        Cohort(
            bucket,
            members_of(bucket, rows),
            chosen[recipe],
            step,
            updates,
            bool(warm),
            [heard[units[row]] for row in rows] if listened else None,
            given or {},
        )
        for (recipe, step, updates, warm, listened), rows in together.items()
    ]
    alone = len(found) == 1 and found[0].members.whole
    bucket.steady = (lineup, recipes, found[0].members, found[0].recipe) if alone else None
    return found
