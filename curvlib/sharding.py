"""Parameters that are shards (FSDP2): blocks that lie inside a shard stay, the others travel to one rank.

A parameter sharded over R ranks is a DTensor, of which every rank holds consecutive rows. The engine computes on plain
tensors in its place:

* *rows*: where rows know nothing of each other (diagonals, blocks within a row), on the rows where they lie. Nothing travels;
* *whole*: everything else on one rank, its owner. Each step one ``all_to_all`` brings gradients and parameters to their
  owners, and one brings the parameters back; owners are chosen once, by the cost of their refresh, n³ for every factor.

A checkpoint holds the records as they would be without shards, but as DTensors: names and global shapes are the same for any
number of ranks, one included. To make and to load one is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .blocks import block_for
from .health import NonFiniteGradient, raises
from .layers import Operand
from .recipe import Clip, Recipe
from .storage import COUNTERS, Bucket, Record, Structure
from .units import Unit


class Shards:
    """The sharded parameters of one optimizer, and where the engine computes on them.

    Args:
        units: all of the optimizer's, of which some parameters are DTensors; these lie alike on one mesh.

    Raises:
        ValueError: where they do not, or are not cut into rows, naming the parameter.

    Attributes:
        mesh, placements: of all of them.
        group: the ranks over which each is sharded.
        rank, size: this rank's number in the group, and how many there are.
        device: where shards lie.
        sent: bytes of this rank's share in all exchanges of shards.
        agreed: bytes of its share in what ranks agree on: whether all is finite, sizes of clipped directions.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        some = next(one for unit in units for one in unit.parameters if isinstance(one, DTensor))
        self.mesh, self.placements = some.device_mesh, some.placements
        along = next((dim for dim, one in enumerate(self.placements) if isinstance(one, Shard)), 0)
        self.group = self.mesh.get_group(along)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = _local(some).device
        self.sent = self.agreed = 0
        self._owners: dict[Tensor, int] = {}
        self._load = [0] * self.size
        self._stands: dict[Tensor, Tensor] = {}
        self._originals: dict[Unit, tuple[Unit, Recipe]] = {}

    def _check_place(self, name: str, parameter: DTensor) -> None:
        cut = [one for one in parameter.placements if not isinstance(one, Replicate)]
        if parameter.ndim == 0 or len(cut) != 1 or type(cut[0]) is not Shard or cut[0].dim != 0:
            raise ValueError(
                f"parameter {name} is a DTensor placed as {parameter.placements}; allowed are rows, Shard(dim=0), along one "
                "dimension of the mesh, and copies, Replicate(), along the others, as fully_shard makes them"
            )
        if (parameter.device_mesh, parameter.placements) != (self.mesh, self.placements):
            raise ValueError(
                f"all sharded parameters must lie alike on one mesh; {name} does not, it is on {parameter.device_mesh}"
            )

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """All ranks of the mesh, copies included, if torch has a group of them."""
        if self.mesh.ndim == 1:
            return self.group
        return dist.group.WORLD if self.mesh.size() == dist.get_world_size() else None

    # -- where units are ------------------------------------------------------------------------------------------

    def place(self, units: Sequence[Unit], recipes: Mapping[Unit, Recipe]) -> list[Unit]:
        """The units on the tensors that stand in for their parameters.

        Raises:
            ValueError: for what can't be done with shards, naming the parameter.
        """
        mine = [unit for unit in units if any(isinstance(one, DTensor) for one in unit.parameters)]
        for unit in mine:
            for slot, one in zip(unit.slots, unit.parameters, strict=True):
                if isinstance(one, DTensor):
                    self._check_place(slot.name, one)
            _check(unit, recipes[unit])
        apart = {unit for unit in mine if self._in_rows(unit, recipes[unit])}
        new = [unit for unit in mine if unit not in apart and unit.lead not in self._owners]
        for unit in sorted(new, key=_cost, reverse=True):
            owner = min(range(self.size), key=self._load.__getitem__)
            self._load[owner] += _cost(unit)
            self._owners.update(dict.fromkeys(unit.parameters, owner))
        placed = {unit: self._rows(unit, recipes[unit]) if unit in apart else self._whole(unit) for unit in mine}
        self._originals = {one: (unit, recipes[unit]) for unit, one in placed.items()}
        return [placed.get(unit, unit) for unit in units]

    def _in_rows(self, unit: Unit, recipe: Recipe) -> bool:
        """Whether rows know nothing of each other, and every record is cut where the parameter is."""
        slot, moment, rule = unit.slots[0], recipe.moment, recipe.rule
        block = block_for(unit.layout, recipe, bool(unit.operand.joined))
        coupled = rule.grafting is not None or not all(finish.elementwise for finish in rule.finish)
        if coupled or moment.listens or unit.operand.renamed or slot.ndim != len(slot.sizes):
            return False
        if recipe.schedule.stagger:  # planned with whole units
            return False
        if block is None:
            return True
        if not block.rowwise or recipe.damping.relative_to == "layer":
            return False
        if block.elementwise:
            return recipe.damping.relative_to is None
        rows, first = unit.lead.shape[0], next(iter(unit.operand.sizes))
        lengths = {spec.shape[0] for spec in block.spec().values() if spec.rows}
        return (
            first not in unit.operand.joined
            and bool(unit.layout.regions)
            and all(region.own and region.own[0].name == first for region in unit.layout.regions)
            and rows > (self.size - 1) * -(-rows // self.size)  # no rank is without rows
            and all(length == rows or rows % self.size == 0 for length in lengths)
        )

    def _rows(self, unit: Unit, recipe: Recipe) -> Unit:
        """A unit on its rows."""
        stands = tuple(self._stand(one, local=True) for one in unit.parameters)
        first, *rest = unit.operand.sizes.items()
        sizes = {first[0]: stands[0].shape[0], **dict(rest)}
        layout = recipe.cut.layout(sizes, unit.operand.joined)
        return replace(unit, operand=Operand(stands, sizes, unit.operand.joined), layout=layout)

    def _whole(self, unit: Unit) -> Unit:
        """A unit at its owner; elsewhere it is known by its shape."""
        stands = tuple(self._stand(one, local=False) for one in unit.parameters)
        return replace(unit, operand=replace(unit.operand, parameters=stands))

    def _stand(self, parameter: Tensor, local: bool) -> Tensor:
        if parameter not in self._stands:
            rows = _local(parameter)
            here = rows.device if local or self._owners[parameter] == self.rank else torch.device("meta")
            shape = rows.shape if local else parameter.shape
            self._stands[parameter] = rows if local else torch.zeros(shape, dtype=parameter.dtype, device=here)
        return self._stands[parameter]

    # -- a step ---------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Bring gradients, and the parameters that belong to them, to where the engine computes."""
        for parameter, stand in self._stands.items():
            if parameter not in self._owners:
                stand.data = _local(parameter)
                stand.grad = None if parameter.grad is None else _local(parameter.grad)
            else:
                stand.grad = None if parameter.grad is None else torch.empty_like(stand)
        sent = self._sent()
        owners = [self._owners[one] for one in sent]
        values = [_local(one) for one in sent] + [_local(one.grad) for one in sent if one.grad is not None]
        stands = [self._stands[one] for one in sent]
        self._to_owners(values, stands + [one.grad for one in stands if one.grad is not None], owners + owners)

    def scatter(self, gradients: bool = False) -> None:
        """Bring parameters, or what is where their gradients were, back to all ranks."""
        sent = self._sent()
        pairs = [(self._stands[one], one) for one in sent]
        if gradients:
            pairs = [(own.grad, one.grad) for own, one in pairs if own.grad is not None and one.grad is not None]
        owners = [self._owners[one] for one in sent]
        self._from_owners([own for own, _ in pairs], [_local(one) for _, one in pairs], owners)

    def _sent(self) -> list[Tensor]:
        return [one for one in self._stands if one in self._owners and one.grad is not None]

    def _bounds(self, rows: int, rank: int) -> tuple[int, int]:
        """The rows of a rank, first and one past the last: equal pieces, the last ones shorter or empty."""
        each = -(-rows // self.size)
        return min(rank * each, rows), min((rank + 1) * each, rows)

    def _to_owners(self, values: Sequence[Tensor], places: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Rows of every rank -> whole tensors at their owners."""
        for numbers in _by_dtype(places):
            outgoing = [[values[n].flatten() for n in numbers if owners[n] == rank] for rank in range(self.size)]
            mine = [places[n] for n in numbers if owners[n] == self.rank]
            windows = [[one[slice(*self._bounds(len(one), rank))] for one in mine] for rank in range(self.size)]
            self._send(outgoing, windows, values[numbers[0]])

    def _from_owners(self, values: Sequence[Tensor], places: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Whole tensors at their owners -> rows of every rank."""
        for numbers in _by_dtype(values):
            mine = [values[n] for n in numbers if owners[n] == self.rank]
            outgoing = [
                [one[slice(*self._bounds(len(one), rank))].flatten() for one in mine] for rank in range(self.size)
            ]
            windows = [[places[n] for n in numbers if owners[n] == rank] for rank in range(self.size)]
            self._send(outgoing, windows, places[numbers[0]])

    def _send(self, outgoing: Sequence[Sequence[Tensor]], windows: Sequence[Sequence[Tensor]], like: Tensor) -> None:
        """One all_to_all: what goes to every rank, and where what comes from it is put."""
        sent = [sum(one.numel() for one in column) for column in outgoing]
        come = [sum(one.numel() for one in column) for column in windows]
        packed = torch.cat([one for column in outgoing for one in column] or [like.new_empty(0)])
        buffer = like.new_empty(sum(come))
        dist.all_to_all_single(buffer, packed, come, sent, group=self.group)
        self.sent += packed.numel() * packed.element_size()
        targets = [one for column in windows for one in column]
        for target, part in zip(targets, buffer.split([one.numel() for one in targets]), strict=True):
            target.copy_(part.view(target.shape))

    # -- what all ranks must agree on -------------------------------------------------------------------------------

    def finite(self, check: Callable[[], Tensor | None], mode: str) -> Tensor | None:
        """The verdict of all ranks on their gradients.

        Args:
            check: of this rank's; returns a gate, or raises.
            mode: see :func:`~curvlib.health.check_finite`.

        Raises:
            NonFiniteGradient: on all ranks, by the names that any of them has.
        """
        bad: Sequence[str] = ()
        gate: Tensor | None = None
        try:
            gate = check()
        except NonFiniteGradient as error:
            bad = error.names
        good = self.agree(not bad if gate is None else gate)
        if not raises(mode, self.device):
            return good
        if not good:
            raise NonFiniteGradient(self._names(bad))
        return None

    def agree(self, good: Tensor | bool) -> Tensor:
        """Whether something is so on all ranks, 0-d."""
        flag = torch.as_tensor(good, device=self.device).to(torch.int32)
        self.agreed += flag.element_size()
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return flag.bool()

    def _names(self, mine: Sequence[str]) -> list[str]:
        """What any rank names, in order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(mine), group=self.group)
        return sorted({name for names in found for name in names})

    def total(self, clips: Sequence[Clip]) -> Callable[[dict[Clip, Tensor]], dict[Clip, Tensor]]:
        """What adds up the sizes of directions over ranks, for these clips."""

        def add(mine: dict[Clip, Tensor]) -> dict[Clip, Tensor]:
            if not clips:
                return mine
            dtype = torch.float64 if self.device.type == "cpu" else torch.float32
            zero = torch.zeros((), dtype=dtype, device=self.device)
            sizes = torch.stack([mine.get(clip, zero).to(zero) for clip in clips])
            self.agreed += sizes.numel() * sizes.element_size()
            dist.all_reduce(sizes, group=self.group)
            return dict(zip(clips, sizes, strict=True))

        return add

    # -- records ----------------------------------------------------------------------------------------------------

    def count(self, units: Iterable[Unit], state: dict[Tensor, Record], taken: int) -> None:
        """Count the steps of units that live elsewhere."""
        for unit in units:
            for parameter in unit.parameters if unit.away else ():
                state[parameter]["step"] = torch.as_tensor(state[parameter].get("step", 0)) + taken

    def shown(self, packed: Mapping[int, Record], numbers: Mapping[Tensor, int]) -> dict[int, Record]:
        """Records as a checkpoint has them: each tensor a DTensor of its global shape, counters as their owners know them.

        Args:
            packed: number of a parameter -> the record here.
            numbers: of the parameters.
        """
        # In one order on all ranks, since whoever gathers these tensors does it one by one.
        shown = {number: dict(packed[number]) for number in numbers.values() if number in packed}
        values: list[Tensor] = []
        places: list[Tensor] = []
        owners: list[int] = []
        for unit, whole, number, name, model in self._entries(shown, numbers):
            record = shown[number]
            if whole:
                first, last = self._bounds(model.shape[0], self.rank)
                rows = torch.empty((last - first, *model.shape[1:]), dtype=model.dtype, device=self.device)
                values.append(model if unit.away else record[name])
                places.append(rows)
                owners.append(self._owners[unit.lead])
            else:
                rows = record[name]
            record[name] = DTensor.from_local(
                rows, self.mesh, self.placements, shape=model.shape, stride=model.contiguous().stride()
            )
        self._from_owners(values, places, owners)
        self._know_counters(shown, numbers)
        return shown

    def settled(self, records: Mapping[int, Record], numbers: Mapping[Tensor, int]) -> dict[int, Record]:
        """The inverse of :meth:`shown`: each rank's own records, from DTensors or from whole tensors."""
        settled = {number: dict(record) for number, record in records.items()}
        values: list[Tensor] = []
        places: list[Tensor] = []
        owners: list[int] = []
        for unit, whole, number, name, model in list(self._entries(settled, numbers)):
            value = self._rows_of(settled[number][name])
            if not whole:
                settled[number][name] = value
                continue
            values.append(value.to(model.dtype))
            places.append(model if unit.away else torch.empty(model.shape, dtype=model.dtype, device=value.device))
            owners.append(self._owners[unit.lead])
            settled[number][name] = places[-1]
        self._to_owners(values, places, owners)
        for parameter in (one for unit in self._originals if unit.away for one in unit.parameters):
            record = settled.get(numbers[parameter], {})
            for name in record.keys() - {"step"}:
                del record[name]
        return settled

    def original(self, unit: Unit) -> Unit:
        """A unit as it would be without shards."""
        return self._originals.get(unit, (unit, None))[0]

    def _entries(
        self, records: Mapping[int, Record], numbers: Mapping[Tensor, int]
    ) -> Iterator[tuple[Unit, bool, int, str, Tensor]]:
        """(unit, whether it is whole, number of the parameter, name, a model of the tensor on no device) of all tensors."""
        for unit, (original, recipe) in self._originals.items():
            whole = unit.lead in self._owners
            for parameter, models in _models(original, recipe):
                if not records.get(numbers[parameter]):
                    continue
                for name, (model, rows) in models.items():
                    if rows or whole:
                        yield unit, whole, numbers[parameter], name, model

    def _rows_of(self, value: Tensor) -> Tensor:
        """This rank's rows of something loaded."""
        if isinstance(value, DTensor):
            return value.redistribute(self.mesh, self.placements).to_local()
        return value[slice(*self._bounds(len(value), self.rank))]

    def _know_counters(self, shown: Mapping[int, Record], numbers: Mapping[Tensor, int]) -> None:
        """Put the counters of units that live elsewhere in."""
        units = [unit for unit in self._originals if unit.lead in self._owners and numbers[unit.lead] in shown]
        if not units:
            return
        known = [
            [0] * len(COUNTERS) if unit.away else [int(shown[numbers[unit.lead]][name]) for name in COUNTERS]
            for unit in units
        ]
        counted = torch.tensor(known, device=self.device)
        dist.all_reduce(counted, group=self.group)
        for unit, row in zip(units, counted.cpu(), strict=True):
            shown[numbers[unit.lead]].update(dict(zip(COUNTERS, row, strict=True)))


def _local(value: Tensor) -> Tensor:
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of tensors of one dtype."""
    numbers: dict[torch.dtype, list[int]] = {}
    for number, one in enumerate(tensors):
        numbers.setdefault(one.dtype, []).append(number)
    return list(numbers.values())


def _cost(unit: Unit) -> int:
    """About the work of a unit: n³ for every factor, and its entries."""
    regions = unit.layout.regions
    solved = sum(
        region.blocks * factor.size**3 for region in regions for factor in region.factors if not factor.diagonal
    )
    return solved + sum(one.numel() for one in unit.parameters)


def _models(unit: Unit, recipe: Recipe) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, bool]]]]:
    """For every parameter of a unit: name -> (what is kept, on no device, and whether it is cut into rows)."""
    stands = tuple(torch.empty(one.shape, dtype=one.dtype, device="meta") for one in unit.parameters)
    bare = replace(unit, operand=replace(unit.operand, parameters=stands), parameters=unit.parameters)
    structure = Structure(recipe, None, unit.operand.joined, unit.lead.dtype, torch.device("meta"))
    bucket = Bucket([bare], recipe, structure)
    for parameter, record in bucket.records():
        names = {name: value for name, value in record.items() if name not in COUNTERS}
        yield (
            parameter,
            {name: (value, name not in bucket.specs or bucket.specs[name].rows) for name, value in names.items()},
        )


def _check(unit: Unit, recipe: Recipe) -> None:
    """Refuse what needs more of a unit than one rank has."""
    block = block_for(unit.layout, recipe, bool(unit.operand.joined))
    why = ""
    if not all(isinstance(one, DTensor) for one in unit.parameters):
        why = "a weight and the bias joined to it are not both sharded; use join_bias=False"
    elif recipe.moment.extra and recipe.root.exponent:
        why = f"moments of={recipe.moment.of!r}, labels={recipe.moment.labels!r} need another pass over the graph"
    elif recipe.rule.model is not None:
        why = f"{type(recipe.rule.model).__name__} models the loss along the whole step"
    elif block is not None and block.recalls and recipe.moment.listens:
        why = f"{type(block).__name__} hears layers in bases that only one rank has"
    if why:
        raise ValueError(
            f"{unit.name} is sharded, which this recipe can't be: {why}. Use DistributedDataParallel instead"
        )
