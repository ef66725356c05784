"""Storage: buckets of equal operands, whose state lives packed and is seen, parameter by parameter, in ``state[p]``."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter, eq, is_, methodcaller
from typing import Any, TypeVar

import torch
from torch import Tensor

from .blocks import Block, Spec, State, block_for
from .calibration import calibration
from .layout import Layout
from .recipe import Recipe, Schedule
from .units import Lineup, Unit

Record = dict[str, Any]
T = TypeVar("T")
COUNTERS = ("step", "updates", "warm")
"""What is counted for every unit: steps, statistics averaged, and whether these began with a warm start."""


@dataclass(frozen=True)
class Structure:
    """What decides the form of a unit's state; units that agree share a bucket, elementwise ones whatever their shapes.

    Attributes:
        alone: a unit that shares its bucket with none.
    """

    recipe: Recipe
    layout: Layout | None
    joined: tuple[str, ...]
    param_dtype: torch.dtype
    device: torch.device
    alone: Unit | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the statistics."""
        return self.recipe.moment.dtype_for(self.param_dtype)


def state_specs(unit: Unit, recipe: Recipe) -> tuple[Block | None, dict[str, Spec], dict[str, str]]:
    """The block of a unit, the state of its curvature, and the state (name -> role) in its parameters' shapes."""
    block = block_for(unit.layout, recipe, bool(unit.operand.joined))
    like: dict[str, str] = {}
    model = recipe.rule.model
    if recipe.rule.momentum is not None or (model is not None and model.combines):
        like["momentum"] = "momentum"
    if recipe.rule.grafting is not None and recipe.rule.grafting.kind != "sgd":
        like["grafting"] = "grafting"
    return block, block.spec() if block else {}, like


def state_bytes(unit: Unit, recipe: Recipe) -> int:
    """The bytes of a unit's state, without making it."""
    _, specs, like = state_specs(unit, recipe)
    dtype = recipe.moment.dtype_for(unit.operand.lead.dtype)
    entries = sum(math.prod(spec.shape) * (spec.dtype or dtype).itemsize for spec in specs.values())
    own = math.prod(unit.layout.shape) * len(like) + len(scalars(recipe))
    return entries + own * dtype.itemsize


def scalars(recipe: Recipe) -> tuple[str, ...]:
    """Names of the numbers kept for every unit."""
    return () if recipe.rule.model is None else recipe.rule.model.scalars


class Bucket:
    """Units of one structure: one batch, in the order in which they were bound.

    State that belongs to curvature is ``[n, *spec.shape]``; state in the shape of the operand is packed,
    ``[n, *layout.shape]``, but for elementwise structures, where every parameter keeps a tensor of its own.
    """

    def __init__(self, units: list[Unit], recipe: Recipe, structure: Structure) -> None:
        self.units = units
        self.structure = structure
        self.block, self.specs, self.like = state_specs(units[0], recipe)
        self.scalars = scalars(recipe)
        self.packed = self.block is not None and not self.block.elementwise
        n, dtype, device = len(units), structure.dtype, structure.device
        # COUNTERS of every unit, on the host: no schedule ever waits for a device.
        self.counters = torch.zeros(n, len(COUNTERS), dtype=torch.int64)
        # Who took the last step together, by their first row; see :class:`~curvlib.cohort.Members`.
        self.members: dict[int, Any] = {}
        # The lineup and the recipes with which all of them stepped together, and that recipe.
        self.steady: tuple[Lineup, Mapping[Unit, Recipe], Any, Recipe] | None = None
        self._rows: tuple[Lineup | None, list[int]] = (None, [])
        self.state: State = {}
        for name, spec in self.specs.items():
            self.state[name] = spec.create(n, dtype, device) if self.packed else self._own_tensors(dtype, spec.fill)
        for name in self.like:
            shape = (n, *units[0].layout.shape)
            self.state[name] = (
                [torch.zeros(shape, dtype=dtype, device=device)] if self.packed else self._own_tensors(dtype, 0.0)
            )
        for name in self.scalars:
            self.state[name] = torch.zeros(n, dtype=dtype, device=device)
        self.workspace = torch.empty((n, *units[0].layout.shape), dtype=dtype, device=device) if self.packed else None

    def _own_tensors(self, dtype: torch.dtype, fill: float) -> list[Tensor]:
        like = [unit.operand.lead.detach() for unit in self.units]
        return [torch.full_like(one, fill, dtype=dtype, memory_format=torch.preserve_format) for one in like]

    def rows(self, lineup: Lineup) -> list[int]:
        """The rows of those that take a step."""
        if self._rows[0] is not lineup:
            active = set(lineup.units)
            self._rows = lineup, [row for row, unit in enumerate(self.units) if unit in active]
        return self._rows[1]

    def records(self) -> Iterator[tuple[Tensor, Record]]:
        """The record of every parameter: views of this bucket's state."""
        for row, unit in enumerate(self.units):
            lead: Record = {name: self.counters[row, column] for column, name in enumerate(COUNTERS)}
            for name in (*self.specs, *self.scalars):
                lead[name] = self.state[name][row]
            yield from zip(unit.parameters, self._shared(row, unit, lead), strict=True)

    def _shared(self, row: int, unit: Unit, lead: Record) -> list[Record]:
        records = [lead, *({"step": self.counters[row, 0]} for _ in unit.operand.parameters[1:])]
        for name in self.like:
            if not self.packed:
                lead[name] = self.state[name][row]
                continue
            windows = unit.operand.windows(self.state[name][0][row])
            for record, window, parameter in zip(records, windows, unit.operand.parameters, strict=True):
                record[name] = _shaped(window, parameter)
        return records

    def nbytes(self) -> dict[str, int]:
        """Bytes by role; views that trainers see are not counted twice."""
        total: dict[str, int] = defaultdict(int)
        roles = (
            {name: spec.role for name, spec in self.specs.items()}
            | self.like
            | dict.fromkeys(self.scalars, "step sizes")
        )
        for name, value in self.state.items():
            tensors = value if isinstance(value, list) else [value]
            total[roles[name]] += sum(one.numel() * one.element_size() for one in tensors)
        if self.workspace is not None:
            total["workspace"] += self.workspace.numel() * self.workspace.element_size()
        return dict(total)


def _shaped(window: Tensor, parameter: Tensor) -> Tensor:
    """A window in the parameter's own shape, where that is a view of it."""
    try:
        return window.view(parameter.shape)
    except RuntimeError:  # split axes that lie apart in the packed operand
        return window


def check_record(unit: Unit, recipe: Recipe, records: Iterable[Mapping[str, Any]], source: str) -> None:
    """Refuse records that do not fit a unit; empty ones do, and those without momentum.

    Args:
        unit: whose records they are.
        recipe: what it is routed to.
        records: one for each parameter of the unit.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the parameter, what it should have and what there is.
    """
    _, specs, like = state_specs(unit, recipe)
    windows = unit.operand.windows(torch.empty(unit.layout.shape, device="meta"))
    triples = zip(unit.slots, unit.parameters, windows, records, strict=True)
    for slot, parameter, window, record in triples:
        if not record:
            continue
        shapes: dict[str, tuple[tuple[int, ...], ...]]
        shapes = dict.fromkeys(like, (tuple(parameter.shape), tuple(window.shape)))
        if parameter is unit.lead:
            shapes.update({name: (spec.shape,) for name, spec in specs.items()})
            shapes.update(dict.fromkeys(scalars(recipe), ((),)))
        found = {name: tuple(torch.as_tensor(record[name]).shape) for name in record if name not in COUNTERS}
        # A schedule may turn momentum on, which starts with the next step, or off.
        agree = found.keys() - {"momentum"} == shapes.keys() - {"momentum"}
        if not agree or any(found[name] not in shapes[name] for name in found.keys() & shapes.keys()):
            wanted = {name: allowed[0] for name, allowed in shapes.items()}
            raise ValueError(
                f"{source} belongs to another recipe or model: {slot.name} should have {_listed(wanted)}, "
                f"there is {_listed(found)}; nothing was changed"
            )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())) or "no state"


@dataclass
class Storage:
    """All buckets of an optimizer, and the records that point into them."""

    buckets: list[Bucket] = field(default_factory=list)
    _records: list[Record] = field(default_factory=list)
    _marked: list[Record] = field(default_factory=list)
    _steps: list[Tensor] = field(default_factory=list)
    _parameters: list[Tensor] = field(default_factory=list)
    _devices: list[torch.device] = field(default_factory=list)

    def holds(self, units: Iterable[Unit], state: dict[Tensor, Record]) -> bool:
        """Whether all units are bound, and their records still are the views that were handed out."""
        bound = {id(unit) for bucket in self.buckets for unit in bucket.units}
        return all(id(unit) in bound for unit in units) and self.intact(state)

    def intact(self, state: dict[Tensor, Record]) -> bool:
        """Whether the records of all that is bound still are the views that were handed out."""
        # No parameter is looked up, and lists are compared whole, since hundreds are asked at every step.
        same = len(state) == len(self._records) and all(map(is_, state.values(), self._records))
        same = same and all(map(is_, map(methodcaller("get", "step"), self._marked), self._steps))
        return same and all(map(eq, map(attrgetter("device"), self._parameters), self._devices))

    def bind(
        self, units: Iterable[tuple[Unit, Recipe]], state: dict[Tensor, Record], alone: Container[Unit] = ()
    ) -> None:
        """Pack the state of all units anew: from the records where there are any, else as it starts.

        Args:
            units: with what they are routed to.
            state: the records.
            alone: units that get a bucket of their own.
        """
        groups: dict[Structure, list[tuple[Unit, Recipe]]] = defaultdict(list)
        for unit, recipe in units:
            check_record(unit, recipe, [state.get(one, {}) for one in unit.parameters], "the state held")
            block = block_for(unit.layout, recipe, bool(unit.operand.joined))
            layout = None if block is None or block.elementwise else unit.layout
            single, lead = unit if unit in alone else None, unit.operand.lead
            structure = Structure(structural(recipe), layout, unit.operand.joined, lead.dtype, lead.device, single)
            groups[structure].append((unit, recipe))
        self.buckets = [
            Bucket([unit for unit, _ in part], part[0][1], structure)
            for structure, members in groups.items()
            for part in _portions(members, structure)
        ]
        self._marked, self._steps, self._parameters = [], [], []
        for bucket in self.buckets:
            for parameter, record in bucket.records():
                old = state[parameter]
                for name, view in record.items():
                    if name in old:
                        view.copy_(torch.as_tensor(old[name]).reshape(view.shape))
                state[parameter] = record
                self._marked.append(record)
                self._steps.append(record["step"])
                self._parameters.append(parameter)
        self._records = list(state.values())
        self._devices = [parameter.device for parameter in self._parameters]


def _portions(members: list[T], structure: Structure) -> Iterator[list[T]]:
    """As many units at a time as :attr:`~curvlib.calibration.Calibration.bucket` allows."""
    most = calibration(structure.device).bucket
    size = len(members)
    if most is not None and structure.layout is not None:
        size = max(1, most // max(1, math.prod(structure.layout.shape)))
    yield from (members[first : first + size] for first in range(0, len(members), size))


def structural(recipe: Recipe) -> Recipe:
    """A recipe without what may change from step to step: for comparison only, since it need not be valid."""
    rule = replace(recipe.rule, finish=(), clip=None)
    return _without_numbers(replace(recipe, rule=rule, schedule=Schedule()))


_FORM = ("exponent", "initial")
"""The numbers that decide on the form of a state."""


def _without_numbers(thing: T) -> T:
    """A dataclass whose numbers, those that are floats by value or default and callables of the step, are blank."""
    blank = copy.copy(thing)
    for entry in fields(thing):  # type: ignore[arg-type]
        value = getattr(thing, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            object.__setattr__(blank, entry.name, _without_numbers(value))
            continue
        scheduled = callable(value) and not isinstance(value, type)
        if entry.name not in _FORM and (scheduled or isinstance(value, float) or isinstance(entry.default, float)):
            object.__setattr__(blank, entry.name, None)
    return blank
