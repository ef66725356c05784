"""How an optimizer is saved: checkpoints, pickles and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_group, resolve
from .distributed import Exchange
from .layers import Reading, Slot
from .passes import Passes
from .routing import Table, meaning
from .storage import COUNTERS, check_record
from .taps import Taps
from .units import Unit, build_units

if TYPE_CHECKING:
    from .sharding import Shards

_OWN = ("_recipe", "_settings", "_amendments", "_schedules", "_steps", "_seed", "_slots", "_masked", "_told")


def shapes_of(parameters: Iterable[Tensor]) -> str:
    """Shapes in a word that a checkpoint can hold: "4×6, 3"."""
    return ", ".join("×".join(map(str, one.shape)) or "1" for one in parameters)


class Saving(torch.optim.Optimizer):
    """The part of an optimizer that is saved and restored."""

    _steps: int
    _slots: dict[Tensor, Slot]
    _readings: dict[Tensor, list[Reading]]
    _taps: Taps
    _passes: Passes
    _exchange: Exchange | None
    _shards: Shards | None
    _tables: Callable[[], list[Table]]
    _written: Callable[[Iterable[Mapping[str, Any]]], list[Table]]
    _all_units: Callable[[], list[Unit]]
    _expect: Callable[[], None]
    _forget: Callable[[], None]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; statistics keep the dtype in which they were saved. Of shards on all ranks together.

        Raises:
            ValueError: for a checkpoint of another recipe or model, naming the parameter; nothing is changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            self._check_checkpoint(final)
            if self._shards is not None:
                numbers = self._numbers([number for group in final["param_groups"] for number in group["params"]])
                final = {**final, "state": self._shards.settled(final["state"], numbers)}
            loaded.update(final)
            return final

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._restore(loaded)
        self._all_units()
        self._expect()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: plain tensors and numbers. Of shards DTensors, made by all ranks together."""
        self._tables()  # what settings mean may have changed since the last step
        packed = super().state_dict()
        if self._shards is not None:
            numbers = self._numbers([number for group in packed["param_groups"] for number in group["params"]])
            packed["state"] = self._shards.shown(packed["state"], numbers)
        return packed

    def _numbers(self, numbers: Sequence[Any]) -> dict[Tensor, Any]:
        """Every parameter with what a checkpoint calls it."""
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        return dict(zip(mine, numbers, strict=True))

    def _check_checkpoint(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what does not fit the settings that it brings along."""
        loaded = state_dict["param_groups"]
        if [len(group["params"]) for group in loaded] != [len(group["params"]) for group in self.param_groups]:
            return  # torch refuses that itself, in its own words
        groups = [
            {**own, **{name: value for name, value in saved.items() if name not in ("params", "param_names")}}
            for own, saved in zip(self.param_groups, loaded, strict=True)
        ]
        for group in groups:
            check_group(group)
        steps = max((int(group.get("steps", 0)) for group in loaded), default=0)
        tables = [tuple(resolve(route, steps) for route in table) for table in self._written(groups)]
        for number, (own, saved, table) in enumerate(zip(self.param_groups, loaded, tables, strict=True)):
            names = own.get("param_names") or [f"parameter {at} of group {number}" for at in range(len(own["params"]))]
            shapes = shapes_of(own["params"])
            pairs = zip(names, shapes.split(", "), saved.get("shapes", shapes).split(", "), strict=False)
            if wrong := [
                f"{name} should have shape {mine}, there is {one}" for name, mine, one in pairs if mine != one
            ]:
                raise ValueError(
                    f"this checkpoint belongs to another recipe or model: {'; '.join(wrong[:8])}; nothing was changed"
                )
            if saved.get("recipe", meaning(table)) != meaning(table):
                raise ValueError(
                    f"this checkpoint belongs to another recipe: group {number} was saved by [{saved['recipe']}], "
                    f"here it is [{meaning(table)}]; nothing was changed"
                )
        numbers = self._numbers([number for group in loaded for number in group["params"]])
        for unit in build_units(groups, self._slots, tables):
            recipe = tables[unit.groups[0]][unit.route].recipe
            recipe = recipe.on_gradients if unit.silent else recipe
            records = [state_dict["state"].get(numbers[one], {}) for one in unit.parameters]
            check_record(unit, recipe, records, "this checkpoint")

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        """Undo torch's cast of statistics to the parameters' dtype, fill in newer settings, and bind anew."""
        numbers = self._numbers([number for group in state_dict["param_groups"] for number in group["params"]])
        for parameter, number in numbers.items():
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if name in COUNTERS else parameter.device
                    self.state[parameter][name] = value.detach().clone().to(device)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._steps = max((group.setdefault("steps", 0) for group in self.param_groups), default=0)
        self._seed = max((group.setdefault("seed", 0) for group in self.param_groups), default=0)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # What torch wraps around an instance (hooks, a scheduler's counting step) stays with that instance.
        state = {
            name: value
            for name, value in self.__dict__.items()
            if name in _OWN or (not name.startswith("_") and name != "step")
        }
        mine = {parameter for group in self.param_groups for parameter in group["params"]}
        state["_slots"] = {parameter: slot for parameter, slot in self._slots.items() if parameter in mine}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_taps" not in self.__dict__:  # a copy hears nothing until it is attached; torch also comes here to load
            self._readings, self._taps, self._passes, self._exchange, self._shards = {}, Taps(), Passes(), None, None
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin
