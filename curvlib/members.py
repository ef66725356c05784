"""Members: the units of a bucket that step together, with lists and views that are kept from step to step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_not
from typing import TypeVar

import torch
from torch import Tensor

from .rules import Tensors
from .storage import Bucket

T = TypeVar("T")
_GRADIENT = attrgetter("grad")


class Members:
    """Rows of a bucket that step together, with the tensors that belong to them; kept from step to step.

    Attributes:
        rows: numbers of their units in the bucket.
        whole: whether these are all of it.
        units: theirs.
        parameters: every parameter, one unit after the other.
        groups: the number of each parameter's group.
        used: these numbers.
        index: the rows on the device, where they are not all.
    """

    def __init__(self, bucket: Bucket, rows: list[int]) -> None:
        self.rows, self.whole = rows, len(rows) == len(bucket.units)
        self.units = [bucket.units[row] for row in rows]
        self.parameters = [one for unit in self.units for one in unit.operand.parameters]
        self.groups = [group for unit in self.units for group in unit.groups]
        self.used = set(self.groups)
        self._all = _places(self.groups, range(len(self.groups)))
        self.index = None if self.whole else torch.tensor(rows, device=bucket.structure.device)
        self._packed = bucket.packed
        self._pointers: list[int] = []
        self._views: list[Tensor] = []
        # Views of what stays where it is are cut once.
        lasting = [bucket.workspace, *(one for name in bucket.like for one in bucket.state[name])]
        self._kept = [(one, self._windows(one)) for one in lasting if one is not None and bucket.packed and self.whole]

    def gradients(self) -> list[Tensor | None]:
        """Of every parameter, as they lie."""
        return gradients_of(self.parameters)

    def by_group(self, gradients: Sequence[Tensor | None]) -> dict[int, list[int]]:
        """For each group the places of those parameters that have a gradient."""
        if all(map(is_not, gradients, repeat(None))):
            return self._all
        return _places(self.groups, (place for place, gradient in enumerate(gradients) if gradient is not None))

    def views(self) -> list[Tensor]:
        """Every parameter with the dimensions of its window, for as long as it lies where it lay."""
        if not self._packed:
            return self.parameters
        pointers = [one.data_ptr() for one in self.parameters]
        if pointers != self._pointers:
            detached = ([one.detach() for one in unit.operand.parameters] for unit in self.units)
            pairs = zip(self.units, detached, strict=True)
            self._views = [view for unit, mine in pairs for view in unit.operand.views(mine)]
            self._pointers = pointers
        return self._views

    def windows(self, tensors: Tensors) -> list[Tensor]:
        """Operands cut into their parameters: a view for every one."""
        if not self._packed:
            return list(tensors)
        (packed,) = tensors
        known = next((windows for one, windows in self._kept if one is packed), None)
        return self._windows(packed) if known is None else known

    def _windows(self, packed: Tensor) -> list[Tensor]:
        pairs = zip(self.units, packed.unbind(), strict=True)
        return [window for unit, one in pairs for window in unit.operand.windows(one)]


def _places(groups: Sequence[int], there: Iterable[int]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place in there:
        places.setdefault(groups[place], []).append(place)
    return places


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters, as they lie."""
    return list(map(_GRADIENT, parameters))


def picked(column: Sequence[T], places: Sequence[int]) -> list[T]:
    """Those at some places."""
    return list(column) if len(places) == len(column) else [column[place] for place in places]


def members_of(bucket: Bucket, rows: list[int]) -> Members:
    """Those of these rows, as they were the last time if they were together then."""
    known: Members | None = bucket.members.get(rows[0])
    if known is None or known.rows != rows:
        known = bucket.members[rows[0]] = Members(bucket, rows)
    return known
