"""The engine: one step of any routing table, batched.

    gradients ─ moment ─> factors          accumulated in place, on the schedule
    factors ─ root ─> roots                all equal sizes of all parameters in one solve, on the schedule
    gradients ─ blocks ─ mode products ─> directions ─ rule ─> parameters

What takes the step together is a cohort, see :mod:`curvlib.cohort`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import rules
from .blocks import Means, block_for
from .checks import number, period
from .cohort import Cohort, Given, Group, Piece, cohorts
from .kernels import Kernel, kernel_for
from .moments import Weight
from .phases import phase
from .recipe import Clip, Recipe
from .roots import RootJob
from .rules import Tensors, gated
from .storage import Bucket
from .units import Lineup, Unit


@dataclass(frozen=True)
class Together:
    """What the ranks of a process group do together.

    Attributes:
        refresh: solves the roots that are due.
        total: adds up the sizes of all directions of every clip.
        steps: whether the optimizer steps along its directions by itself.
    """

    refresh: Callable[[Iterable[RootJob]], None]
    total: Callable[[dict[Clip, Tensor]], dict[Clip, Tensor]] = dict
    steps: bool = True


@dataclass
class Direction:
    """What one cohort would do, which is computed when it is first looked at, and forgotten when it is done.

    Attributes:
        cohort: who.
        gate: 0-d bool, False where the step must change nothing; ``None`` is open.
        shrink: the factor by which all directions are shrunk.
        kernel: what does all of the step at once, if anything does.
    """

    cohort: Cohort
    gate: Tensor | None
    shrink: Tensor | None = None
    kernel: Kernel | None = None

    @cached_property
    def whole(self) -> Tensors:
        """The direction of each of the cohort's operands; nothing where a kernel takes the step."""
        return self.cohort.direct(self.gate) if self.kernel is None else ()

    def forget(self) -> None:
        """Free the memory of the directions, of which as few as possible are held at a time."""
        self.cohort.gradient = self.cohort.reference = ()
        for name in ("whole", "pieces"):
            self.__dict__.pop(name, None)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The direction of each parameter."""
        return list(self.cohort.pieces(self.whole))

    def last(self) -> list[Tensor]:
        """The last update of each piece's parameter, where a model of the loss keeps it as momentum."""
        return [piece.direction for piece in self.cohort.pieces(self.cohort.state["momentum"])]

    def combine(self, alpha: float, mu: float) -> None:
        """Make αΔ + μδ₀ the update, where Δ is minus the direction, and keep it as δ₀."""
        buffers = self.cohort.state["momentum"]
        torch._foreach_mul_(buffers, -mu)
        torch._foreach_add_(buffers, self.whole, alpha=alpha)
        torch._foreach_copy_(self.whole, buffers)
        torch._foreach_neg_(buffers)

    def stretch(self, factors: Tensor) -> None:
        """Multiply the direction of every operand by its number, ``[n]``."""
        if self.cohort.bucket.packed:
            self.whole[0].mul_(factors.view(-1, *[1] * (self.whole[0].ndim - 1)))
        else:
            torch._foreach_mul_(list(self.whole), list(factors.unbind()))


def directions(
    buckets: Iterable[Bucket],
    recipes: Mapping[Unit, Recipe],
    lineup: Lineup,
    groups: Sequence[Group],
    gate: Tensor | None,
    heard: Mapping[Unit, Means],
    given: Given,
    together: Together,
) -> list[Direction]:
    """Take in gradients and statistics, refresh the roots that are due, and precondition everything that has a gradient.

    Args:
        buckets: the bound units.
        recipes: every unit's recipe with this step's numbers; equal recipes are one object.
        lineup: who has a gradient.
        groups: settings: ``lr``, ``weight_decay``, ``maximize``, ``reduction_factor``.
        gate: 0-d bool, False where the whole step must change nothing; ``None`` is open.
        heard: what the layers of listening units said.
        given: what takes the gradient's place in moments: pass -> parameter -> tensor.
        together: what is shared with other ranks.
    """
    active = [cohort for bucket in buckets for cohort in cohorts(bucket, recipes, lineup, heard, given)]
    kernels = {id(cohort): kernel_for(cohort, groups) if together.steps else None for cohort in active}
    composed = [cohort for cohort in active if kernels[id(cohort)] is None]
    with phase("statistics"):
        for cohort in composed:
            cohort.listen(groups, gate)
    with phase("refresh"):
        together.refresh(due_jobs(composed, lineup, recipes))
    with phase("precondition and apply"):
        for cohort in composed:
            cohort.correct()
        finished = [Direction(cohort, gate) for cohort in composed]
        sizes = together.total(_clip_sizes(finished, groups))
        shrink = {clip: rules.clip_scale(clip, size) for clip, size in sizes.items()}
        for one in finished:
            clip = one.cohort.recipe.rule.clip
            one.shrink = None if clip is None else shrink[clip]
    return finished + [Direction(cohort, gate, None, kernel) for cohort in active if (kernel := kernels[id(cohort)])]


def settle(finished: Iterable[Direction]) -> None:
    """Put the state of a step back where it is kept."""
    for one in finished:
        cohort = one.cohort
        cohort.settle()
        cohort.count(cohort.step + 1)


def follow(finished: Iterable[Direction], heard: Mapping[Unit, Means], gate: Tensor | None) -> None:
    """Let blocks learn from the step that was taken."""
    with phase("statistics"):
        for one in finished:
            one.cohort.follow(heard, gate)


def advance(finished: Iterable[Direction], groups: Sequence[Group], gate: Tensor | None) -> None:
    """Step along the directions."""
    with phase("precondition and apply"):
        for one in finished:
            if one.kernel is not None:
                one.kernel(one.cohort, groups, gate)
                continue
            one.cohort.remember()
            _update(one, groups, gate)
            one.forget()


def due_jobs(active: Iterable[Cohort], lineup: Lineup, recipes: Mapping[Unit, Recipe]) -> list[RootJob]:
    """Every root that is due: all of a cohort's at once, or its share of a staggered period.

    A staggered period T is cut by cost: the matrices of all units, wherever they are computed, stand in a row, each as long
    as its n³, and step t takes those whose middle lies in the (t mod T)-th of T equal stretches.
    """
    due: list[RootJob] = []
    plans: dict[int, tuple[dict[Unit, int], int]] = {}
    for cohort in active:
        schedule = cohort.recipe.schedule
        if schedule.refreshes(cohort.step):
            due.extend(cohort.root_jobs())
        elif schedule.stagger:
            length = period(schedule.refresh)
            if length not in plans:
                plans[length] = _plan(lineup, recipes, length)
            (begins, total), inside = plans[length], 0
            for job in cohort.root_jobs():
                each, rows = job.factor.shape[-1] ** 3, job.factor.shape[0] // len(cohort.units)
                middles = (begins[unit] + inside + each * (row + 0.5) for unit in cohort.units for row in range(rows))
                mine = [row for row, at in enumerate(middles) if at * length // total == cohort.step % length]
                inside += each * rows
                if mine:
                    due.append(job.rows(mine[0], mine[-1] + 1))
    return due


def _plan(lineup: Lineup, recipes: Mapping[Unit, Recipe], length: int) -> tuple[dict[Unit, int], int]:
    """Where each unit begins in the row of a staggered period, and how long this is."""
    begins, before = {}, 0
    for unit in lineup.units:
        recipe = recipes[unit]
        if not recipe.schedule.stagger or period(recipe.schedule.refresh) != length:
            continue
        if unit.solves is None:
            block = block_for(unit.layout, recipe, bool(unit.operand.joined))
            unit.solves = [] if block is None else block.solves()
        begins[unit] = before
        before += sum(rows * n**3 for rows, n in unit.solves)
    return begins, max(1, before)


def write(finished: Iterable[Direction]) -> None:
    """Put the directions where the gradients are."""
    for one in finished:
        for piece in one.pieces:
            direction = piece.direction if one.shrink is None else piece.direction * one.shrink.to(piece.direction)
            assert piece.source.grad is not None
            piece.source.grad.copy_(direction.reshape(piece.source.shape))


def _clip_sizes(finished: Iterable[Direction], groups: Sequence[Group]) -> dict[Clip, Tensor]:
    """One size for every clip, over all parameters that share it."""
    pairs: dict[Clip, list[tuple[list[Tensor], list[Tensor], Weight]]] = defaultdict(list)
    for one in finished:
        clip = one.cohort.recipe.rule.clip
        if clip is not None:
            pairs[clip] += [([piece.direction], [piece.reference], groups[piece.group]["lr"]) for piece in one.pieces]
    return {clip: rules.clip_size(clip, members) for clip, members in pairs.items()}


def _update(one: Direction, groups: Sequence[Group], gate: Tensor | None) -> None:
    """Step: w <- (1 - lr decay) w - lr d."""
    cohort, members = one.cohort, one.cohort.members
    views, windows, rule, shrink = members.views(), members.windows(one.whole), cohort.recipe.rule, one.shrink
    for group, places in members.by_group(members.gradients()).items():
        parameters, directions = [views[place] for place in places], [windows[place] for place in places]
        settings, device = groups[group], parameters[0].device
        lr: Weight = settings["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(device)
        if rule.lr_limit is not None:
            limit = number(rule.lr_limit)
            lr = lr.clamp_max(limit) if isinstance(lr, Tensor) else min(lr, limit)
        if gate is not None:
            lr = lr * gated(1.0, 0.0, gate.to(device))
        if rule.decay == "decoupled" and settings["weight_decay"] != 0:
            torch._foreach_mul_(parameters, 1 - lr * settings["weight_decay"])
        lr = lr / (1 + cohort.step * number(rule.lr_decay))
        if shrink is not None:
            lr = lr * shrink.to(device=device, dtype=directions[0].dtype)
        if isinstance(lr, Tensor) and device.type == "cpu":  # one pass over memory instead of two
            torch._foreach_addcmul_(parameters, directions, [lr.to(directions[0].dtype)] * len(places), value=-1)
        elif isinstance(lr, Tensor):
            torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr))
        else:
            torch._foreach_add_(parameters, directions, alpha=-lr)


def warm(
    buckets: Iterable[Bucket],
    recipes: Mapping[Unit, Recipe],
    lineup: Lineup,
    groups: Sequence[Group],
    gate: Tensor | None,
    heard: Mapping[Unit, Means],
    seen: int,
) -> None:
    """Average one batch's statistics into a running mean over ``seen`` earlier ones; nothing else changes.

    Moments of the momentum are left alone: without steps there is none.
    """
    for bucket in buckets:
        for cohort in cohorts(bucket, recipes, lineup, heard):
            if bucket.block is None or cohort.recipe.moment.of == "momentum":
                continue
            gradient = cohort.gradients(groups, gate)
            cohort.update(gradient, gated(seen / (seen + 1), 1.0, gate), gated(1 / (seen + 1), 0.0, gate))
            cohort.correct()
            cohort.settle()
            cohort.warm = True
            cohort.count(cohort.step)
