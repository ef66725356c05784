"""The contract of a block structure: what the engine asks of anything that holds curvature.

A structure is written for a *batch* of operands of one shape. It holds no tensors of its own: the engine keeps the state
that :meth:`Block.spec` registers by name, saves and restores it, and hands it to every method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import planes
from ..contraction import gradients, slices
from ..layout import Layout
from ..moments import Weight
from ..precision import flush_subnormals_
from ..recipe import Recipe
from ..roots import RootJob
from ..signals import Signal

State = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One piece of state, for one operand.

    Args:
        shape: its shape; the engine stores ``[n, *shape]`` for n operands.
        role: what :meth:`CurvatureOptimizer.memory` counts it as: ``"statistics"``, ``"roots"``, …
        dtype: ``None`` is the dtype of the statistics.
        fill: the initial value.
        identity: start as identity matrices times ``fill`` instead.
        of_input: a statistic of a layer's inputs alone, which scales with no gradient.
        order: of the moment: 2 for squares and products of gradients, 1 for gradients.
        planes: square matrices, read as symmetric, which may lie by planes, see :mod:`curvlib.planes`.
        rows: whether, in a structure that is ``rowwise``, it runs along the operand's first axis, instead of being shared.
    """

    shape: tuple[int, ...]
    role: str = "statistics"
    dtype: torch.dtype | None = None
    fill: float = 0.0
    identity: bool = False
    of_input: bool = False
    order: Literal[1, 2] = 2
    rows: bool = True
    planes: bool = False

    def create(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The initial state of n operands."""
        full = (n, *self.shape)
        if not self.identity:
            return torch.full(full, self.fill, dtype=self.dtype or dtype, device=device)
        if self.planes and planes.suits(math.prod(full[:-2]), full[-1], device):
            return planes.identities(full, self.fill, self.dtype or dtype)
        each = self.fill * torch.eye(self.shape[-1], dtype=self.dtype or dtype, device=device)
        return each.expand(full).clone()


@dataclass
class Sums:
    """What the passes since the last step said of one operand.

    Attributes:
        tensors: statistic -> the sum of second moments over examples, ``[*spec.shape]``.
        of_input: those that are of inputs alone.
        first: those that are first moments.
        fresh: whether the tensors still hold what is of no use any more.
        examples: how many examples.
        places: how many input vectors the statistics of inputs sum over.
        held: what the operand's state was after its last step, by name; empty before the first.
        scale: by what gradients of outputs were divided before they were summed up.
    """

    tensors: dict[str, Tensor]
    of_input: frozenset[str]
    first: frozenset[str] = frozenset()
    fresh: bool = False
    examples: float | Tensor = 0.0
    places: float | Tensor = 0.0
    held: State = field(default_factory=dict)
    scale: float | Tensor = 1.0

    def means(self, scale: float | Tensor, first: float | Tensor) -> Means:
        """The statistics, and by what each must be multiplied to be a mean over examples.

        Args:
            scale: the factor of second moments of gradients; statistics of inputs are divided by the number of input vectors.
            first: the factor of first moments of gradients.
        """
        return {
            name: (value, 1 / self.places if name in self.of_input else first if name in self.first else scale)
            for name, value in self.tensors.items()
        }

    def renew_(self) -> None:
        """Start anew, in the same memory."""
        self.fresh = True
        self.examples = self.places = 0.0

    def zeroed_(self) -> dict[str, Tensor]:
        """The tensors, zero where nothing has been added yet."""
        if self.fresh:
            torch._foreach_zero_(list(self.tensors.values()))
            self.fresh = False
        return self.tensors


Means = Mapping[str, tuple[Tensor, Weight]]
"""Statistic -> the sum that was collected, and the factor that makes it a mean."""


class Block:
    """A curvature structure over a batch of n operands ``[n, *layout.shape]``.

    Args:
        layout: the partition, exact for the operand's axes. A structure that is more than a partition may read only
            ``layout.shape`` and ``layout.sizes``.
        recipe: the recipe, for what decides the structure; numbers are handed to each call anew.

    Attributes:
        elementwise: operands, directions and state are lists of tensors, one an operand, instead of packed batches.
        again: look at the same batch once more at the new parameters, see :meth:`follow`; it needs ``step(closure)``.
        looks: how often it must see the same data until it holds what these say: 2 where one statistic lives in what
            another is solved for.
        rowwise: whether blocks know nothing of each other (but for a damping relative to the layer), so that the rows of an
            operand whose first axis numbers blocks may be treated apart.
        turns: whether it divides in bases of its own, in which momentum may be kept, see :meth:`turn`.
        recalls: whether :meth:`collect` reads what was held after the last step, ``sums.held``.
        uses: of the settings that few structures know, those that this one does: ``"window"``, ``"tracking"``.
        damps: what an absolute damping λ is added to: the ``"whole"`` curvature, so that ``apply`` is (curvature + λI)^-p;
            or its ``"factors"``, one by one. It is what :mod:`curvlib.testing` holds a structure to.
    """

    elementwise: ClassVar[bool] = False
    again: ClassVar[bool] = False
    looks: ClassVar[int] = 1
    rowwise: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    recalls: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset()
    damps: ClassVar[Literal["whole", "factors"]] = "whole"

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        self.layout = layout

    def spec(self) -> dict[str, Spec]:
        """The state of one operand, by name."""
        raise _missing(self, "spec")

    def sums(self, dtype: torch.dtype, device: torch.device, first: bool = False) -> Sums:
        """Empty sums of one operand's statistics, or of its first moments alone."""
        specs = {name: spec for name, spec in self.spec().items() if spec.role == "statistics"}
        specs = {name: spec for name, spec in specs.items() if spec.order == 1 or not first}
        tensors = {name: torch.zeros(spec.shape, dtype=dtype, device=device) for name, spec in specs.items()}
        of_input = frozenset(name for name, spec in specs.items() if spec.of_input)
        return Sums(tensors, of_input, frozenset(name for name, spec in specs.items() if spec.order == 1))

    def update(self, state: State, operand: Any, keep: Weight, gain: Weight) -> None:
        """Average a new second moment in, F <- keep F + gain S, in place.

        Args:
            state: name -> ``[n, *shape]``.
            operand: the gradients, ``[n, *layout.shape]``.
            keep: weight of the old value, a number or a 0-d tensor.
            gain: weight of the new one.
        """
        raise _missing(self, "update")

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add what one backward pass says of one operand: sums over its examples, in place.

        This falls back to :meth:`update` with the gradient of every single example, which is slow.

        Args:
            sums: one tensor for each statistic, ``[*spec.shape]``.
            signals: of the same examples; their gradients add up.
            recipe: the numbers of this step.
        """
        state = {name: value[None] for name, value in sums.zeroed_().items()}
        for part in slices(signals, math.prod(self.layout.shape)):
            for gradient in gradients(part, self.layout).split(1):
                self.update(state, gradient, 1.0, part[0].gain)

    def average(self, state: State, means: Sequence[Means], keep: Weight, gain: Weight) -> None:
        """Average what was collected in, F <- keep F + gain S, in place.

        This takes all statistics to be second moments, which add up; a structure whose statistics do not, such as square
        roots, has its own.

        Args:
            state: name -> ``[n, *shape]``.
            means: for each of the n operands its collected statistics.
            keep: weight of the old value, a number or a 0-d tensor.
            gain: weight of the new one.
        """
        for name in means[0]:
            rows = list(state[name])
            torch._foreach_mul_(rows, keep)
            for row, mean in zip(rows, means, strict=True):
                value, factor = mean[name]
                weight = gain * factor
                row.add_(value * weight if isinstance(weight, Tensor) else value, alpha=_plain(weight))
                flush_subnormals_(row)

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """What must be solved at a refresh, for all operands; the engine solves equal sizes of all blocks together.

        A structure that keeps its root in another way does so here, in place, and returns nothing.

        Args:
            state: name -> ``[n, *shape]``.
            recipe: the numbers of this step.
            scale: what the stored average is multiplied by (its debiasing).
        """
        return ()

    def solves(self) -> list[tuple[int, int]]:
        """(rows, n) of the matrices of one operand that :meth:`roots` hands to the engine, in its order.

        By default every ``residual_…`` of the state belongs to matrices whose ``root_…``, ``basis_…``, ``core_…``,
        ``lower_…`` or ``inverse_…`` has its name. Staggered refreshes are planned by it, also for operands that other ranks
        have.
        """
        specs, found = self.spec(), []
        for name, spec in specs.items():
            if name.startswith("residual_"):
                own = (
                    specs.get(kind + name.removeprefix("residual"))
                    for kind in ("root", "basis", "core", "lower", "inverse")
                )
                found += [(spec.shape[0], one.shape[-1]) for one in own if one is not None][:1]
        return found

    def correct(self, state: State, operand: Any, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """Average in what lives in the roots, such as a second moment in eigenbases; by default nothing does.

        It follows every :meth:`update` or :meth:`average`, after the refresh of the same step where one is due, with the
        same operand and weights.

        Args:
            state: name -> ``[n, *shape]``.
            operand: the gradients, ``[n, *layout.shape]``; turned, where the recipe keeps momentum inside.
            recipe: the numbers of this step.
            keep: weight of the old value, a number or a 0-d tensor.
            gain: weight of the new one.
            scale: what the stored average is multiplied by.
        """

    def turn(self, state: State, operand: Tensor, back: bool = False) -> Tensor:
        """A batch of operands in the bases in which the block divides, or back from them; for blocks that ``turn``.

        Where the recipe keeps momentum inside, the state has it, ``state["momentum"][0]``; whenever a basis changes, the
        block turns it along (see :class:`~curvlib.roots.RootJob`, ``moved``).
        """
        raise _missing(self, "turn")

    def divide(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """What :meth:`apply` does between turning and turning back, for blocks that ``turn``."""
        raise _missing(self, "divide")

    def follow(
        self,
        state: State,
        before: Any,
        after: Any,
        means: Sequence[Means],
        recipe: Recipe,
        keep: Weight,
        gain: Weight,
        scale: float,
    ) -> None:
        """Learn from a step that was taken, where ``again`` asks for it and statistics were due.

        Args:
            state: name -> ``[n, *shape]``.
            before: the parameters before the step, ``[n, *layout.shape]``.
            after: the parameters after it.
            means: for each operand its first moments, of the same batch at the new parameters.
            recipe: the numbers of this step.
            keep: weight of the old value, a number or a 0-d tensor.
            gain: weight of the new one.
            scale: what the stored average is multiplied by.
        """
        raise _missing(self, "follow")

    def apply(self, state: State, operand: Any, recipe: Recipe, exponent: float, scale: float) -> Any:
        """curvature^(-exponent) times the operand, ``[n, *layout.shape]``.

        Args:
            state: name -> ``[n, *shape]``.
            operand: what to precondition.
            recipe: the numbers of this step.
            exponent: the power; -1 multiplies by the (undamped) curvature itself.
            scale: what the stored average is multiplied by.
        """
        raise _missing(self, "apply")

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """The undamped curvature, ``[n, numel, numel]`` in the operand's row-major order."""
        raise _missing(self, "dense")


def _plain(weight: Weight) -> float:
    return 1.0 if isinstance(weight, Tensor) else weight


def _missing(block: Block, method: str) -> TypeError:
    return TypeError(f"{type(block).__name__} must define {method}(); a Block defines spec, update, apply and dense")
