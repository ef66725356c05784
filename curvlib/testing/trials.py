"""Examples of block structures: operands of some shape, a structure over them, and the state that it holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import roots
from ..blocks import Block, State
from ..layout import Layout
from ..partition import Partition
from ..recipe import Damping, Recipe

Make = Callable[[Layout, Recipe], Block]


@dataclass(frozen=True)
class Trial:
    """One example: operands of some shape, and a structure over them.

    Attributes:
        make: the structure.
        recipe: with the damping of this example.
        sizes: of the axes.
        n: number of operands.
        seed: of everything random.
        dtype: of the statistics.
        spread: how many powers of ten lie between the largest and the smallest operand.
    """

    make: Make
    recipe: Recipe
    sizes: tuple[tuple[str, int], ...]
    n: int
    seed: int
    dtype: torch.dtype = torch.float64
    spread: int = 2

    def __str__(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.sizes)
        return (
            f"{self.n} operands of axes {axes or 'none'} under {str(self.recipe.partition)!r}, damping {self.damping:g}, "
            f"exponent {float(self.recipe.root.exponent):g}, {self.recipe.moment.composition}, seed {self.seed}"
        )

    @property
    def damping(self) -> float:
        """λ."""
        assert isinstance(self.recipe.damping.value, (int, float))
        return float(self.recipe.damping.value)

    @property
    def exponent(self) -> float:
        """P."""
        return float(self.recipe.root.exponent)

    @cached_property
    def layout(self) -> Layout:
        """The partition, exact."""
        return self.recipe.cut.layout(dict(self.sizes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one operand."""
        return self.layout.shape

    @property
    def numel(self) -> int:
        """D."""
        return math.prod(self.shape)

    def gradient(self, number: int = 0) -> Tensor:
        """Operands ``[n, *shape]`` of very different sizes, the same for the same number."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + number)
        value = torch.randn((self.n, *self.shape), generator=generator, dtype=torch.float64)
        sizes = 10.0 ** torch.linspace(-self.spread / 2, self.spread / 2, self.n, dtype=torch.float64)
        return (value * sizes.view(-1, *[1] * len(self.shape))).to(self.dtype)

    @property
    def power(self) -> int:
        """How often the gradient's square enters the curvature: the number of independent factors."""
        if self.recipe.moment.composition != "independent":
            return 1
        return max((len(region.factors) for region in self.layout.regions), default=1) or 1

    def held(self, gradients: Sequence[Tensor] = (), recipe: Recipe | None = None) -> Held:
        """A structure that has averaged some gradients in, each with weights ½, and solved its roots."""
        held = Held(self, recipe or self.recipe)
        held.take(gradients)
        return held

    def tolerance(self, dense: Tensor, exponent: float) -> float:
        """What rounding may do to (curvature + λ)^-p times a vector: c D (1 + |p|) κ u, with D rows in what is solved."""
        values = torch.linalg.eigvalsh(dense.double())
        least = self.damping if exponent > 0 else 1.0
        kappa = 1.0 if exponent <= 0 else float(values.abs().max()) / least + 1.0
        rows = max(1, self.numel, self.recipe.moment.window or 1)
        return 32 * rows * (1 + abs(exponent)) * kappa * torch.finfo(self.dtype).eps


class Held:
    """A structure with its state, spoken to in packed batches whatever the structure takes.

    Args:
        trial: the example.
        recipe: its recipe, perhaps with other numbers.
        state: to go on from; by default the initial one.
    """

    def __init__(self, trial: Trial, recipe: Recipe, state: State | None = None) -> None:
        self.trial, self.recipe = trial, recipe
        self.block = trial.make(trial.layout, recipe)
        self.state = self._initial() if state is None else state

    def _initial(self) -> State:
        specs = self.block.spec()
        n, dtype, device = self.trial.n, self.trial.dtype, torch.device("cpu")
        whole = {name: spec.create(n, dtype, device) for name, spec in specs.items()}
        return {name: list(value) for name, value in whole.items()} if self.block.elementwise else whole

    def _given(self, operand: Tensor) -> Any:
        return list(operand.clone()) if self.block.elementwise else operand.clone()

    def _taken(self, result: Any) -> Tensor:
        return torch.stack(list(result)) if isinstance(result, (list, tuple)) else result

    def update(self, operand: Tensor, keep: Any, gain: Any, refresh: bool = False) -> None:
        """Average a gradient in, in the engine's order."""
        self.block.update(self.state, self._given(operand), keep, gain)
        if refresh:
            self.refresh()
        self.block.correct(self.state, self._given(operand), self.recipe, keep, gain, 1.0)

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Average some gradients in, each with weights ½, and solve the roots at the last one."""
        for number, gradient in enumerate(gradients):
            last = number == len(gradients) - 1
            self.update(gradient, 0.5 if number else 0.0, 0.5 if number else 1.0, refresh=last)
        if not gradients:
            self.refresh()

    def refresh(self) -> None:
        """Solve the roots."""
        roots.refresh(list(self.block.roots(self.state, self.recipe, 1.0)))

    def apply(self, operand: Tensor, exponent: float | None = None, scale: float = 1.0) -> Tensor:
        """curvature^-exponent times operands; by default with the recipe's exponent."""
        p = self.trial.exponent if exponent is None else exponent
        return self._taken(self.block.apply(self.state, self._given(operand), self.recipe, p, scale))

    def dense(self, scale: float = 1.0) -> Tensor:
        """The undamped curvature."""
        return self.block.dense(self.state, self.recipe, scale)

    def copied(self) -> Held:
        """Another instance of the structure, with a copy of the state and of nothing else."""
        return Held(self.trial, self.recipe, copy.deepcopy(self.state))

    def row(self, number: int) -> Held:
        """One operand alone."""
        alone = replace(self.trial, n=1)
        state = {name: value[number : number + 1] for name, value in self.state.items()}
        return Held(alone, self.recipe, copy.deepcopy(state))


@st.composite
def trials(draw: st.DrawFn, make: Make, recipe: Recipe, partitions: Sequence[Partition], largest: int = 4) -> Trial:
    """Draw an example of a structure under one of some partitions."""
    partition = draw(st.sampled_from(list(partitions)))
    sizes = draw(axis_sizes(partition, largest))
    damping = draw(st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0]))
    root = replace(recipe.root, damping=replace(_damping(recipe), value=damping))
    return Trial(
        make,
        replace(recipe, partition=partition, root=root),
        tuple(sizes.items()),
        n=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 999)),
        spread=draw(st.integers(0, 2)),
    )


def _damping(recipe: Recipe) -> Damping:
    return recipe.damping


@st.composite
def axis_sizes(draw: st.DrawFn, partition: Partition, largest: int = 4) -> dict[str, int]:
    """Sizes for the axes that a partition names; an ellipsis stands for those of some layer."""
    named = [axis for term in partition.sentence.terms() for axis in term.axes]
    axes = [axis for axis in named if not axis.endswith("...")]
    for ellipsis in (axis for axis in named if axis.endswith("...")):
        if ellipsis == "...":
            extra = draw(st.sampled_from([("o", "i"), ("o", "i", "k1"), ("c",), ("o", "i", "k1", "k2")]))
        else:
            extra = tuple(f"{ellipsis[:-3]}{number}" for number in range(1, 1 + draw(st.integers(1, 2))))
        axes += [axis for axis in extra if axis not in axes]
    limits = [term.cut.limit for term in partition.sentence.terms() if term.cut is not None]
    axes += [limit for limit in limits if isinstance(limit, str) and limit not in axes]
    order = {name: number for number, name in enumerate(("g", "o", "i", "k1", "k2"))}
    axes = sorted(dict.fromkeys(axes), key=lambda axis: order.get(axis, -1))
    return {axis: draw(st.integers(1, largest)) for axis in axes}
