"""Settings: an optimizer's groups, what of them changes from step to step, and the routing tables made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import check_group, resolve
from .recipe import Recipe
from .routing import Table, as_table, meaning
from .saving import shapes_of
from .storage import structural
from .units import Unit

Tables = Callable[..., Table]


@dataclass(frozen=True)
class _Tables:
    """The tables made from some settings, their form without numbers, and the step if they are good for it only."""

    key: list[tuple[Any, ...]]
    tables: list[Table]
    form: list[tuple[Recipe, ...]]
    step: int | None


class Settings(torch.optim.Optimizer):
    """The part of an optimizer that knows what its groups say."""

    _recipe: Table | Tables
    _settings: tuple[str, ...]
    _amendments: tuple[Callable[[Table], Table], ...]
    _schedules: list[dict[str, Callable[[int], Any]]]
    _steps: int
    _seed: int
    _units: list[Unit] | None
    _cache: _Tables | None
    _resolved: tuple[list[Unit], list[Table], dict[Unit, Recipe]] | None
    _all_units: Callable[[], list[Unit]]
    _expect: Callable[[], None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; callable settings become schedules, of which the group shows the current number."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1:
            group["lr"] = group["lr"].view(())  # [1], which torch takes, too; schedulers fill it in place
        schedules = {name: value for name, value in group.items() if name != "params" and _is_schedule(value)}
        group.update({name: schedule(self._steps) for name, schedule in schedules.items()})
        group["steps"], group["seed"], group["shapes"] = self._steps, self._seed, shapes_of(group["params"])
        self._schedules.append(schedules)
        self._units = None
        try:
            check_group(group)
            if self._cache is not None:  # the constructor looks at all groups together, when it knows the model
                self._all_units()
        except (ValueError, TypeError):
            self.param_groups.pop()
            self._schedules.pop()
            self._units = None
            raise

    @property
    def seed(self) -> int:
        """Of the labels and signs that are drawn; checkpoints have it."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed
        for group in self.param_groups:
            group["seed"] = seed

    def _written(self, groups: Iterable[Mapping[str, Any]]) -> list[Table]:
        """The routing tables of some groups' settings, with callables of the step as they are."""
        settings = [{name: group[name] for name in self._settings} for group in groups]
        written = [as_table(self._recipe(**one)) if callable(self._recipe) else self._recipe for one in settings]
        for change in self._amendments:
            written = [change(table) for table in written]
        return written

    def _tables(self) -> list[Table]:
        """Each group's routing table with this step's numbers; equal tables are one object."""
        key = [tuple(group[name] for name in self._settings) for group in self.param_groups]
        if self._cache is not None and self._cache.key == key and self._cache.step in (None, self._steps):
            return self._cache.tables
        written = self._written(self.param_groups)
        tables = [tuple(resolve(route, self._steps) for route in table) for table in written]
        equal: dict[Recipe, Recipe] = {}
        tables = [
            tuple(replace(route, recipe=equal.setdefault(route.recipe, route.recipe)) for route in table)
            for table in tables
        ]
        form = [tuple(structural(route.recipe) for route in table) for table in tables]
        if self._cache is not None and form != self._cache.form:
            self._units = None
        for group, table in zip(self.param_groups, tables, strict=True):
            group["recipe"] = meaning(table)
        self._cache = _Tables(key, tables, form, None if tables == written else self._steps)
        return tables

    def amend(self, change: Callable[[Table], Table]) -> None:
        """Change the routing tables of this optimizer: such as any method's, to a variant of it.

        Args:
            change: from a table to another one; a function of a module, or a ``partial`` of one, so that the optimizer can
                still be pickled.

        Raises:
            RuntimeError: after the first step.
            ValueError, TypeError, PartitionError: where the changed table is refused; then nothing is changed.
        """
        if self.state:
            raise RuntimeError("amend changes what a step keeps; call it before the first step")
        before = self._amendments
        self._amendments, self._cache, self._units = (*before, change), None, None
        try:
            self._all_units()
        except (ValueError, TypeError):
            self._amendments, self._cache, self._units = before, None, None
            self._all_units()
            raise
        self._expect()

    def _schedule(self) -> None:
        for group, schedules in zip(self.param_groups, self._schedules, strict=True):
            for name, schedule in schedules.items():
                group[name] = schedule(self._steps)
            if schedules:
                check_group(group)

    def _recipes(self) -> dict[Unit, Recipe]:
        """Every unit's recipe with this step's numbers; on gradients where its layers can't be heard."""
        units, tables = self._all_units(), self._tables()
        if self._resolved is None or self._resolved[0] is not units or self._resolved[1] is not tables:
            self._resolved = (units, tables, self._resolve(units, tables))
        return self._resolved[2]

    @staticmethod
    def _resolve(units: Sequence[Unit], tables: Sequence[Table]) -> dict[Unit, Recipe]:
        recipes = {unit: tables[unit.groups[0]][unit.route].recipe for unit in units}
        silent: dict[Recipe, Recipe] = {}
        return {
            unit: silent.setdefault(recipe, recipe.on_gradients) if unit.silent else recipe
            for unit, recipe in recipes.items()
        }


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, Tensor, Recipe))
