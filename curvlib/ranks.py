"""How an optimizer works with other ranks: means over them, shared refreshes, shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import roots
from .blocks import Means, Sums
from .distributed import Exchange
from .engine import Together
from .recipe import Recipe
from .units import Lineup, Unit

if TYPE_CHECKING:
    from .sharding import Shards


class Ranks:
    """The part of an optimizer that knows of other ranks."""

    param_groups: list[dict[str, Any]]
    _exchange: Exchange | None
    _shards: Shards | None
    _lineup: Lineup | None
    _steps_itself: bool = True
    _all_units: Callable[[], list[Unit]]
    _recipes: Callable[[], dict[Unit, Recipe]]

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that train together: statistics are means over all of them, and refreshes are shared out.

        Given a DistributedDataParallel, or sharded parameters, it is theirs; else ``None`` until it is set. See
        :mod:`curvlib.distributed` and :mod:`curvlib.sharding`. Set by hand, layers may be called on some ranks only; a
        DistributedDataParallel says so by ``find_unused_parameters``.
        """
        return None if self._exchange is None else self._exchange.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._exchange = None if group is None else Exchange(group)

    def traffic(self) -> dict[str, int]:
        """Bytes of this rank's share in all collectives of steps so far.

        ``"statistics"`` and ``"roots"``; of shards also ``"shards"``, and ``"agreed"``, a few numbers a step.
        """
        sent = {} if self._exchange is None else dict(self._exchange.sent)
        return sent if self._shards is None else {**sent, "shards": self._shards.sent, "agreed": self._shards.agreed}

    def _placed(self, units: list[Unit], recipes: Mapping[Unit, Recipe]) -> list[Unit]:
        """The units, those of sharded parameters where they are computed."""
        if not any(hasattr(parameter, "placements") for unit in units for parameter in unit.parameters):
            return units
        if self._shards is None:
            from .sharding import Shards  # as long as all of the rest to import, and rarely needed

            self._shards = Shards(units)
            everyone = self._shards.everyone
            # What is sharded is gathered by all ranks together, who thus call the same layers.
            self._exchange = None if everyone is None else Exchange(everyone, uneven=False)
        return self._shards.place(units, recipes)

    def _line_up(self) -> Lineup:
        """The units that have a gradient; gradients of shards are where they are computed then."""
        units = self._all_units()
        graded = [one.grad is not None for group in self.param_groups for one in group["params"]]
        if self._lineup is None or self._lineup.everyone is not units or self._lineup.graded != graded:
            self._lineup = Lineup(units, graded, self._recipes())
        if self._shards is not None:
            self._shards.gather()
        return self._lineup

    def _together(self, active: Sequence[Unit]) -> Together:
        """What other ranks have a share in."""
        if self._shards is not None:
            clips = dict.fromkeys(self._recipes()[unit].rule.clip for unit in active)
            total = self._shards.total([clip for clip in clips if clip is not None])
            return Together(roots.refresh, total, self._steps_itself)
        return Together(roots.refresh if self._exchange is None else self._exchange.refresh, steps=self._steps_itself)

    def _totals(self, counts: Sequence[float | Tensor]) -> list[float]:
        """Examples of all ranks."""
        assert self._exchange is not None
        device = next(iter(self._all_units())).lead.device
        mine = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=device) for one in counts])
        return list(self._exchange.sum([mine])[0].tolist())

    def _shared(self, means: Mapping[Unit, Means], heard: Mapping[Unit, Sums]) -> dict[Unit, Means]:
        """Means over the examples of all ranks."""
        assert self._exchange is not None
        places = [(unit, name) for unit, one in means.items() for name in one]
        local = []
        for unit, name in places:
            value, factor = means[unit][name]
            sums = heard[unit]
            local.append((value * factor, sums.places if name in sums.of_input else sums.examples))
        shared: dict[Unit, dict[str, tuple[Tensor, float]]] = {unit: {} for unit in means}
        for (unit, name), value in zip(places, self._exchange.mean(local), strict=True):
            shared[unit][name] = (value, 1.0)
        return {unit: one for unit, one in shared.items()}
