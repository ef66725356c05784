"""Routes: which parameters get which recipe, by layer kind, role, module, name or predicate, in written order."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from .layers import Slot
from .partition import Partition, PartitionError
from .recipe import Recipe


class RouteWarning(UserWarning):
    """A parameter does not get what its first route says."""


@dataclass(frozen=True)
class Route:
    """Which parameters get a recipe. Every condition given must hold; a route without conditions takes all.

    Args:
        recipe: what they get.
        kind: a layer kind, or several: ``"linear"``, ``"conv"``, ``"embedding"``, ``"norm"``, ``"vector"``, …
        role: the layer's name for the parameter: ``"weight"``, ``"bias"``, …
        module: a module class, or the dotted name of one module and all below it.
        name: a pattern for the parameter's dotted name, with ``*`` and ``?``.
        where: a predicate of the parameter's :class:`~curvlib.layers.Slot`.
    """

    recipe: Recipe
    kind: str | tuple[str, ...] | None = None
    role: str | None = None
    module: type[nn.Module] | str | None = None
    name: str | None = None
    where: Callable[[Slot], bool] | None = None

    def takes(self, slot: Slot) -> bool:
        """Whether every condition holds for a parameter."""
        kinds = (self.kind,) if isinstance(self.kind, str) else self.kind
        return (
            (kinds is None or slot.kind in kinds)
            and (self.role is None or slot.role == self.role)
            and (self.module is None or self._inside(slot))
            and (self.name is None or fnmatch.fnmatchcase(slot.name, self.name))
            and (self.where is None or self.where(slot))
        )

    def _inside(self, slot: Slot) -> bool:
        if isinstance(self.module, str):
            return slot.module_name is not None and f"{slot.module_name}.".startswith(f"{self.module}.")
        return slot.module is not None and issubclass(slot.module, self.module)  # type: ignore[arg-type]

    def __str__(self) -> str:
        conditions = [f"{name}={getattr(self, name)!r}" for name in ("kind", "role", "name") if getattr(self, name)]
        if self.module is not None:
            conditions.append(f"module={self.module if isinstance(self.module, str) else self.module.__name__}")
        if self.where is not None:
            conditions.append(f"where={getattr(self.where, '__name__', 'a predicate')}")
        return ", ".join(conditions) or "everything"


def is_vector(slot: Slot) -> bool:
    """Whether a parameter has at most one dimension."""
    return slot.ndim <= 1


def is_matrix(slot: Slot) -> bool:
    """Whether a parameter has two dimensions."""
    return slot.ndim == 2


def is_kernel(slot: Slot) -> bool:
    """Whether a parameter has three dimensions or more."""
    return slot.ndim >= 3


def is_weight(slot: Slot) -> bool:
    """Whether a parameter has two dimensions or more."""
    return slot.ndim >= 2


@dataclass(frozen=True)
class Fits:
    """A predicate: whether a partition can be made exact for a parameter's axes.

    Args:
        partition: the partition.
        joined: with the layer's bias as one more column of the inputs.
    """

    partition: Partition
    joined: bool = False

    def __call__(self, slot: Slot) -> bool:
        """Whether it fits."""
        if self.joined and slot.bias is None:
            return False
        try:
            self.partition.layout(slot.sizes, slot.inputs if self.joined else ())
        except PartitionError:
            return False
        return True


Table = tuple[Route, ...]


def as_table(recipe: Recipe | Route | Sequence[Route]) -> Table:
    """A routing table from a recipe, a route or several.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(recipe, Recipe):
        return (Route(recipe),)
    routes = (recipe,) if isinstance(recipe, Route) else tuple(recipe) if isinstance(recipe, (list, tuple)) else ()
    if not routes or not all(isinstance(route, Route) for route in routes):
        raise TypeError(f"expected a Recipe, a Route or a sequence of Routes, got {recipe!r}")
    return routes


def meaning(table: Table) -> str:
    """What the state of a table's parameters means, in words that a checkpoint can hold."""
    return "; ".join(f"{route}: {_meaning(route.recipe)}" for route in table)


def _meaning(recipe: Recipe) -> str:
    moment, root, momentum = recipe.moment, recipe.root, recipe.rule.momentum
    parts = []
    if root.exponent:
        first = " of first order" if moment.order == 1 else ""
        block = "" if recipe.block is None else f", {recipe.block.__name__}"
        parts.append(f"{recipe.partition} {moment.average} of {moment.of}{first} ^-{root.exponent}{block}")
    if momentum is not None:
        parts.append(f"{momentum.kind} momentum{' of directions' if momentum.after else ''}")
    return ", ".join(parts) or "no state"


def choices(table: Table, slot: Slot) -> list[int]:
    """The numbers of the routes that take a parameter, in order.

    Raises:
        ValueError: where none does, naming the parameter and the routes.
    """
    found = [number for number, route in enumerate(table) if route.takes(slot)]
    if found:
        return found
    routes = "; ".join(map(str, table))
    raise ValueError(f"no route takes {slot.name} (kind {slot.kind}, role {slot.role}); the routes: {routes}")
