"""Units: every parameter with its named axes, its group and its route; a weight and its joined bias are one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from torch import Tensor

from .blocks import block_for
from .contraction import independent_places
from .layers import Operand, Slot, bare_slot, group_axes, split_axes
from .layout import Layout, joined_axes
from .partition import PartitionError
from .recipe import Recipe
from .routing import Table, choices

Groups = Sequence[Mapping[str, Any]]

LARGE, TIMES = 1 << 32, 1 << 12
"""A parameter whose curvature would take more than 4 GiB and 4,096 times its own bytes goes to its next route."""


@dataclass(eq=False)
class Unit:
    """One operand on its way: its parameters, where they come from, and the recipe that they are routed to.

    Attributes:
        operand: named axes, and the tensors to compute on: the parameters, or what stands in for shards of them.
        slots: one for each parameter.
        groups: the number of each parameter's group; the first one's decides the recipe.
        route: the number of the route in that group's table.
        why: the route's conditions, in words.
        layout: the partition, exact for the operand.
        passed: which earlier routes were too large for it, and how large; empty where none was.
        silent: why the recipe's moment of a layer's signals is replaced by the gradient's; empty where it is not.
        parameters: the optimizer's own, by which records, gradients and readings are known; by default the operand's.
        solves: (rows, n) of the matrices that a refresh solves, once somebody asked.
    """

    operand: Operand
    slots: tuple[Slot, ...]
    groups: tuple[int, ...]
    route: int
    why: str
    layout: Layout
    silent: str = ""
    passed: str = ""
    parameters: tuple[Tensor, ...] = ()
    solves: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        self.parameters = self.parameters or self.operand.parameters

    def layout_axes(self, sources: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
        """Axes of signals in the names of the layout, where a joined bias has merged the inputs'."""
        return tuple(joined_axes(axes, self.operand.joined) for axes in sources)

    @property
    def lead(self) -> Tensor:
        """The parameter whose record holds the curvature."""
        return self.parameters[0]

    @property
    def away(self) -> bool:
        """Whether another rank computes it."""
        return self.operand.lead.is_meta and not self.lead.is_meta

    @property
    def name(self) -> str:
        """The lead's name."""
        return self.slots[0].name

    def active(self) -> bool:
        """Whether any of its parameters has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters)


@dataclass(frozen=True, eq=False)
class Lineup:
    """The units that take a step, and what follows from that as long as the same parameters have gradients.

    Args:
        everyone: all units, in order.
        graded: for every parameter of the optimizer whether it has a gradient.
        recipes: of all units.

    Attributes:
        units: those of which a parameter has a gradient.
        here: of these, those that this rank computes.
        asks: whether any of them rests on more than gradients.
        watched: (name, parameter, number of its group, whether gradients are squared) of these that are here.
    """

    everyone: Sequence[Unit]
    graded: Sequence[bool]
    recipes: InitVar[Mapping[Unit, Recipe]]
    units: list[Unit] = field(init=False)
    here: list[Unit] = field(init=False)
    asks: bool = field(init=False)
    watched: list[tuple[str, Tensor, int, bool]] = field(init=False)

    def __post_init__(self, recipes: Mapping[Unit, Recipe]) -> None:
        units = [unit for unit in self.everyone if unit.active()]
        here = [unit for unit in units if not unit.away]
        used = [recipes[unit] for unit in units]
        asks = any(one.moment.listens or one.moment.extra or one.rule.model is not None for one in used)
        watched = [
            (slot.name, parameter, group, recipes[unit].squares)
            for unit in here
            for slot, parameter, group in zip(unit.slots, unit.operand.parameters, unit.groups, strict=True)
        ]
        found = {
            "units": units,
            "here": here,
            "asks": asks,
            "watched": watched,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)


def build_units(groups: Groups, slots: Mapping[Tensor, Slot], tables: Sequence[Table]) -> list[Unit]:
    """Route every parameter, in group order.

    Args:
        groups: an optimizer's parameter groups.
        slots: what is known of the parameters from a model; the others are named by rank.
        tables: a routing table for each group.

    Raises:
        ValueError, PartitionError: where no route takes a parameter, or its partition does not fit; naming it.
    """
    place = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
    known = {parameter: _slot(parameter, groups[number], number, slots) for parameter, number in place.items()}
    units: list[Unit] = []
    taken: set[Tensor] = set()
    for parameter in _weights_first(known):
        if parameter in taken:
            continue
        slot, table = known[parameter], tables[place[parameter]]
        passed = ""
        for route in choices(table, slot):
            recipe = table[route].recipe
            silent = _silence(slot, recipe)
            recipe = recipe.on_gradients if silent else recipe
            operand = _operand(parameter, slot, recipe, known)
            layout = _layout(slot, operand, recipe)
            too_large = _too_large(operand, recipe, layout)
            if not too_large:
                break
            passed += f"{'; ' if passed else ''}route {route} would keep {too_large}"
        else:
            raise ValueError(
                f"{slot.name} of shape {list(parameter.shape)} is too large: {passed}, and no other route takes it; give it "
                "one with a diagonal, or cut its axes, such as '| o/256, i/256'"
            )
        parts = operand.parameters
        where = tuple(place[one] for one in parts)
        slots_of = tuple(known[one] for one in parts)
        units.append(Unit(operand, slots_of, where, route, str(table[route]), layout, silent, passed))
        taken.update(parts)
    return units


def _layout(slot: Slot, operand: Operand, recipe: Recipe) -> Layout:
    sources = operand.named(slot.sources) if recipe.moment.listens else ()
    try:
        layout = recipe.cut.layout(operand.sizes, operand.joined, sources)
        if sources and recipe.moment.of == "signals":
            independent_places(layout)
    except PartitionError as error:
        raise error.about(slot.name) from None
    except ValueError as error:
        raise ValueError(f"{slot.name}: {error}; got partition {str(recipe.partition)!r}") from None
    return layout


def _too_large(operand: Operand, recipe: Recipe, layout: Layout) -> str:
    """The size of a curvature's state, in words, where it is beyond reason: see :data:`LARGE` and :data:`TIMES`."""
    own = sum(one.numel() * one.element_size() for one in operand.parameters)
    matrices = sum(region.blocks * factor.size**2 for region in layout.regions for factor in region.factors)
    if 8 * matrices <= LARGE:  # no structure keeps more than some numbers for every entry of its matrices
        return ""
    block = block_for(layout, recipe, bool(operand.joined))
    dtype = recipe.moment.dtype_for(operand.lead.dtype)
    specs = block.spec().values() if block is not None else ()
    size = sum(math.prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in specs)
    return f"{size / 2**30:.0f} GiB for {str(recipe.partition)!r}" if size > max(LARGE, TIMES * own) else ""


def _silence(slot: Slot, recipe: Recipe) -> str:
    """Why a recipe that listens can't hear a parameter."""
    if not recipe.moment.listens or recipe.root.exponent == 0:
        return ""
    if recipe.axes is not None and slot.ndim != len(slot.sizes):
        return f"axes={recipe.axes!r} renames axes that its layer splits"
    return slot.silent or (slot.crossed if recipe.moment.of == "signals" else "")


def _weights_first(known: Mapping[Tensor, Slot]) -> Iterable[Tensor]:
    """Parameters in group order, but every weight before its own bias, so that a recipe may join it."""
    weight_of = {slot.bias: weight for weight, slot in known.items() if slot.bias is not None}
    order: dict[Tensor, None] = {}
    for parameter in known:
        order.setdefault(weight_of.get(parameter, parameter))
        order.setdefault(parameter)
    return order


def _slot(parameter: Tensor, group: Mapping[str, Any], number: int, slots: Mapping[Tensor, Slot]) -> Slot:
    if parameter in slots:
        return slots[parameter]
    at = next(index for index, one in enumerate(group["params"]) if one is parameter)
    name = group["param_names"][at] if "param_names" in group else f"parameter {at} of group {number}"
    return bare_slot(parameter, name)


def _operand(parameter: Tensor, slot: Slot, recipe: Recipe, known: Mapping[Tensor, Slot]) -> Operand:
    """The operand of a parameter under a recipe: renamed axes, or its bias joined."""
    if recipe.axes is not None:
        try:
            groups = group_axes(recipe.axes, parameter.shape)
            renamed = {old: tuple(new) for old, new in zip(slot.sizes, groups, strict=False)}
            return Operand((parameter,), split_axes(recipe.axes, parameter.shape, recipe.sizes), (), renamed)
        except ValueError as error:
            raise ValueError(f"{slot.name}: {error}") from None
    bias = slot.bias
    joins = recipe.join_bias and recipe.root.exponent != 0
    if joins and bias is not None and bias in known and slot.inputs and bias.dtype == parameter.dtype:
        return Operand((parameter, bias), slot.sizes, slot.inputs)
    return Operand((parameter,), slot.sizes)
