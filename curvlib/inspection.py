"""What an optimizer tells of itself: routes, curvature, health, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, State
from .checks import Flags
from .health import Health, Proof, health_of
from .precision import full_precision
from .recipe import Recipe
from .routing import Table
from .storage import Storage
from .taps import Taps
from .units import Unit

_HIDDEN = ("params", "param_names", "steps", "seed", "recipe", "shapes", *Flags.__annotations__)
"""What a group has and ``repr`` does not show."""


@dataclass(frozen=True, eq=False)
class Held:
    """The curvature held for one unit.

    Attributes:
        unit: its parameters.
        block: the structure.
        recipe: with the numbers of this step.
        state: name -> ``[1, *shape]``, views of what the optimizer holds.
        scale: what the stored average is multiplied by.
    """

    unit: Unit
    block: Block
    recipe: Recipe
    state: State
    scale: float

    def order(self) -> Tensor:
        """Where each entry of the parameters, in row-major order and a joined bias last, lies in the flat operand."""
        index = torch.arange(math.prod(self.unit.layout.shape)).view(self.unit.layout.shape)
        return torch.cat([window.flatten() for window in self.unit.operand.windows(index)])

    def dense(self) -> Tensor:
        """The undamped curvature in the order of the parameters, ``[numel, numel]``."""
        with full_precision():
            dense = self.block.dense(self.state, self.recipe, self.scale)[0]
        order = self.order().to(dense.device)
        return dense[order][:, order]


class Inspection:
    """The questions one can ask an optimizer; it answers from its storage."""

    param_groups: list[dict[str, Any]]
    _storage: Storage
    _masked: dict[str, Tensor]
    _taps: Taps
    _proof: tuple[Any, Proof] | None
    _recipes: Callable[[], dict[Unit, Recipe]]
    _tables: Callable[[], list[Table]]
    _bind: Callable[[], dict[Unit, Recipe]]

    def routing(self) -> dict[str, str]:
        """Parameter name -> its partition, and why: the route that took it.

        A joined bias says so.
        """
        result = {}
        for unit, recipe in self._recipes().items():
            how = "on the batch gradient" if recipe.root.exponent else "not preconditioned"
            reason = f"; {how}: {unit.silent}" if unit.silent else ""
            reason += f"; {unit.passed}" if unit.passed else ""
            result[unit.name] = f"{recipe.partition} (route {unit.route}: {unit.why}{reason})"
            for slot in unit.slots[1:]:
                result[slot.name] = f"joined to {unit.name}"
        return result

    def curvature(self, target: nn.Module | Tensor) -> Tensor:
        """The dense curvature held now, undamped and debiased.

        Args:
            target: a parameter, or a module with one weight.

        Returns:
            ``[numel, numel]``, rows in the parameter's row-major order, a joined bias last.

        Raises:
            ValueError: where there is none.
        """
        parameter = target if isinstance(target, Tensor) else next(iter(target.parameters(recurse=False)), None)
        for held in self.held():
            if held.unit.lead is parameter:
                return held.dense()
        what = (
            type(target).__name__
            if parameter is None or isinstance(target, nn.Module)
            else f"shape {list(target.shape)}"
        )
        raise ValueError(
            f"no curvature is held for {what}: it had no gradient yet, is joined to its weight, or needs none"
        )

    def held(self) -> Iterator[Held]:
        """The curvature of every unit that has some."""
        recipes = self._bind()
        for bucket in self._storage.buckets:
            if bucket.block is None:
                continue
            for row, unit in enumerate(bucket.units):
                state = {name: value[row : row + 1] for name, value in bucket.state.items() if name in bucket.specs}
                _, updates, warm = bucket.counters[row].tolist()
                recipe = recipes[unit]
                yield Held(unit, bucket.block, recipe, state, recipe.moment.scale(updates, bool(warm)))

    def health(self) -> Health:
        """Refreshed residuals, kept roots and masked steps, by parameter name."""
        self._bind()
        return health_of(self._storage.buckets, self._masked)

    def memory(self) -> dict[str, int]:
        """Bytes of optimizer state by role: statistics, roots, momentum, …; in ``workspace``, gradients and signals."""
        self._bind()
        total: dict[str, int] = {}
        for bucket in self._storage.buckets:
            for role, size in bucket.nbytes().items():
                total[role] = total.get(role, 0) + size
        if heard := self._taps.nbytes():
            total["workspace"] = total.get("workspace", 0) + heard
        if self._proof is not None:
            total["workspace"] = total.get("workspace", 0) + self._proof[1].nbytes
        return total

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, (group, table) in enumerate(zip(self.param_groups, self._tables(), strict=True)):
            shown = {name: value for name, value in group.items() if name not in _HIDDEN}
            shown |= {"foreach": False} if group["foreach"] is False else {}
            lines.append(
                f"  group {number}: {len(group['params'])} parameters, "
                + ", ".join(f"{k}={v}" for k, v in shown.items())
            )
            lines += [f"    {route} -> {route.recipe.partition}" for route in table]
        return "\n".join([*lines, ")"])
