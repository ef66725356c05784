"""The optimizer: torch.optim.Optimizer's contract around the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import engine
from .health import Health, check_finite, health_of
from .layers import Slot, describe
from .precision import full_precision
from .recipe import Recipe, check_choice, check_number, resolve
from .routing import Route, Table, as_table
from .storage import COUNTERS, Storage, check_record, structural
from .units import Unit, build_units

Tables = Callable[..., Table]
_OWN = ("_recipe", "_settings", "_schedules", "_steps", "_slots", "_masked")


@dataclass(frozen=True)
class _Tables:
    """The tables made from some settings, their form without numbers, and the step if they are good for it only."""

    key: list[tuple[Any, ...]]
    tables: list[Table]
    form: list[tuple[Recipe, ...]]
    step: int | None


class CurvatureOptimizer(torch.optim.Optimizer):
    """A routing table of recipes as a torch optimizer.

    Args:
        params: a model, or what torch optimizers take: parameters, groups, or (name, parameter) pairs. From a model the
            layers' kinds and names are known; from parameters alone axes are named by rank.
        recipe: a :class:`Recipe`, a sequence of :class:`Route`, or a function that makes one from ``settings``.
        lr: step size: a number, a tensor, or a callable of the step.
        weight_decay: of each group; decoupled or L2 as the recipe's rule says.
        maximize: ascend instead.
        reduction: what ``.grad`` holds: ``"mean"``, the gradient of the mean of per-example losses; ``"sum"``, of their
            sum, with the number of examples told by ``optimizer.batch_size = n`` before each step; or a number by which
            it is divided. After this every statistic and direction is of the mean loss.
        model: the model whose layers name the parameters' axes, where ``params`` are its parameters.
        settings: further group settings, handed to a ``recipe`` that is a function: numbers, or callables of the step,
            of which the group shows the current number.

    Raises:
        ValueError, TypeError, PartitionError: naming the parameter, the value and what is allowed.

    Attributes:
        batch_size: examples behind the current gradients, for ``reduction="sum"``.
        on_nonfinite: ``"auto"``: a non-finite gradient raises :class:`NonFiniteGradient` before anything changes on a
            CPU, and masks the step on an accelerator; ``"raise"`` or ``"mask"`` everywhere.
    """

    _storage: Storage
    _units: list[Unit] | None
    _cache: _Tables | None

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        recipe: Recipe | Route | Sequence[Route] | Tables,
        lr: float | Tensor | Callable[[int], float] = 1e-3,
        *,
        weight_decay: float | Callable[[int], float] = 0.0,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = [(name, parameter) for name, parameter in params.named_parameters()]
            if not params:
                raise ValueError(f"{type(model).__name__} has no parameters to optimize")
        self._recipe = recipe if callable(recipe) else as_table(recipe)
        self._settings = tuple(settings)
        self._schedules: list[dict[str, Callable[[int], Any]]] = []
        self._steps = 0
        self._slots: dict[Tensor, Slot] = {}
        self._masked: dict[str, Tensor] = {}
        self.batch_size: int | None = None
        self.on_nonfinite: Literal["auto", "raise", "mask"] = "auto"
        self._forget()
        universal = dict(lr=lr, weight_decay=weight_decay, maximize=maximize, reduction=reduction)
        super().__init__(params, {**universal, **settings})
        if model is not None:
            self.attach(model)
        self._tables()
        self._all_units()

    # -- groups and settings --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; callable settings become schedules, of which the group shows the current number."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        schedules = {name: value for name, value in group.items() if name != "params" and _is_schedule(value)}
        group.update({name: schedule(self._steps) for name, schedule in schedules.items()})
        group["steps"] = self._steps
        self._schedules.append(schedules)
        self._units = None
        try:
            self._check_group(group)
            if self._cache is not None:  # the constructor looks at all groups together, when it knows the model
                self._all_units()
        except (ValueError, TypeError):
            self.param_groups.pop()
            self._schedules.pop()
            self._units = None
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name, parameter in zip(group.get("param_names", group["params"]), group["params"], strict=True):
            if parameter.is_complex():
                label = name if isinstance(name, str) else f"of shape {list(parameter.shape)}"
                raise ValueError(f"parameter {label} is complex; optimize torch.view_as_real of it instead")
        check_number("lr", group["lr"] if not isinstance(group["lr"], Tensor) else group["lr"].item())
        check_number("weight_decay", group["weight_decay"])
        if not isinstance(group["reduction"], str):
            check_number("reduction", group["reduction"], strict=True)
        else:
            check_choice("reduction", group["reduction"], ("mean", "sum"))

    def _tables(self) -> list[Table]:
        """Each group's routing table with this step's numbers; equal tables are one object."""
        key = [tuple(group[name] for name in self._settings) for group in self.param_groups]
        if self._cache is not None and self._cache.key == key and self._cache.step in (None, self._steps):
            return self._cache.tables
        if callable(self._recipe):
            written = [as_table(self._recipe(**dict(zip(self._settings, values, strict=True)))) for values in key]
        else:
            written = [self._recipe] * len(key)
        tables = [tuple(resolve(route, self._steps) for route in table) for table in written]
        equal: dict[Recipe, Recipe] = {}
        tables = [
            tuple(replace(route, recipe=equal.setdefault(route.recipe, route.recipe)) for route in table)
            for table in tables
        ]
        form = [tuple(structural(route.recipe) for route in table) for table in tables]
        if self._cache is not None and form != self._cache.form:
            self._units = None
        self._cache = _Tables(key, tables, form, None if tables == written else self._steps)
        return tables

    # -- routing --------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Learn the layers of a model: kinds, axes, and which bias belongs to which weight.

        Raises:
            ValueError: if the model holds none of the parameters.
        """
        slots = describe(model)
        if not any(parameter in slots for group in self.param_groups for parameter in group["params"]):
            raise ValueError(f"{type(model).__name__} holds none of this optimizer's parameters")
        self._slots = slots
        self._units = None

    def detach(self) -> None:
        """Forget the model; axes are named by rank again."""
        self._slots = {}
        self._units = None

    def _all_units(self) -> list[Unit]:
        tables = self._tables()
        if self._units is None:
            self._units = build_units(self.param_groups, self._slots, tables)
        return self._units

    def routing(self) -> dict[str, str]:
        """Parameter name -> its partition, and why: the route that took it.

        A joined bias says so.
        """
        result = {}
        for unit, recipe in self._recipes().items():
            result[unit.name] = f"{recipe.partition} (route {unit.route}: {unit.why})"
            for slot in unit.slots[1:]:
                result[slot.name] = f"joined to {unit.name}"
        return result

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: re-evaluates the model under grad and returns the loss.

        Raises:
            NonFiniteGradient: by parameter name, before anything changes (see ``on_nonfinite``).
            RuntimeError: for sparse gradients, by parameter name.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._schedule()
        active = [unit for unit in self._all_units() if unit.active()]
        gate = self._check_gradients(active)
        settings = [self._group_settings(group) for group in self.param_groups]
        recipes = self._bind(active)
        with full_precision():
            engine.advance(self._storage.buckets, recipes, settings, gate)
        self._steps += 1
        for group in self.param_groups:
            group["steps"] = self._steps
        return loss

    def _schedule(self) -> None:
        for group, schedules in zip(self.param_groups, self._schedules, strict=True):
            for name, schedule in schedules.items():
                group[name] = schedule(self._steps)
            if schedules:
                self._check_group(group)

    def _group_settings(self, group: dict[str, Any]) -> dict[str, Any]:
        factor = {"mean": 1.0, "sum": self.batch_size}.get(group["reduction"], group["reduction"])
        if factor is None:
            raise ValueError("reduction='sum' needs the number of examples: set optimizer.batch_size before the step")
        chosen = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
        return {**chosen, "reduction_factor": float(factor)}

    def _recipes(self) -> dict[Unit, Recipe]:
        """Every unit's recipe with this step's numbers."""
        units, tables = self._all_units(), self._tables()
        return {unit: tables[unit.groups[0]][unit.route].recipe for unit in units}

    def _bind(self, active: Sequence[Unit] = ()) -> dict[Unit, Recipe]:
        """Make sure that what is active, or has a record, has packed state; returns every unit's recipe."""
        recipes = self._recipes()
        wanted = set(active)
        members = [unit for unit in recipes if unit in wanted or unit.lead in self.state]
        if not self._storage.holds(members, self.state):
            self._storage.bind([(unit, recipes[unit]) for unit in members], self.state)
        return recipes

    def _check_gradients(self, active: list[Unit]) -> Tensor | None:
        """Report non-finite gradients by name, or return the gate that masks this step."""
        named = [
            (slot.name, parameter.grad)
            for unit in active
            for slot, parameter in zip(unit.slots, unit.operand.parameters, strict=True)
            if parameter.grad is not None
        ]
        for name, gradient in named:
            if gradient.layout != torch.strided:
                raise RuntimeError(f"{name} has a sparse gradient; use sparse=False in its layer")
        return check_finite(named, self.on_nonfinite, self._masked)

    @torch.no_grad()
    def warm_start(self, batches: Iterable[Any], closure: Callable[[Any], Tensor]) -> int:
        """Fill the statistics with their running mean over a pass of batches, weights untouched.

        The MBF and TNT authors start so, with labels sampled from the model (see :func:`curvlib.sample_labels`). Moments
        of the momentum start where they are.

        Args:
            batches: anything to iterate.
            closure: from a batch to its loss; gradients are taken here.

        Returns:
            The number of batches.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.grad for parameter in parameters]
        count = 0
        try:
            for batch in batches:
                for parameter in parameters:
                    parameter.grad = None
                with torch.enable_grad():
                    closure(batch).backward()
                self._warm(count)
                count += 1
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        return count

    def _warm(self, number: int) -> None:
        active = [unit for unit in self._all_units() if unit.active()]
        gate = self._check_gradients(active)
        settings = [self._group_settings(group) for group in self.param_groups]
        recipes = self._bind(active)
        with full_precision():
            engine.warm(self._storage.buckets, recipes, settings, gate, number)

    # -- what it knows --------------------------------------------------------------------------------------------

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
        recipes = self._bind()
        for bucket in self._storage.buckets:
            for row, unit in enumerate(bucket.units):
                if unit.lead is parameter and bucket.block is not None:
                    recipe = recipes[unit]
                    state = {name: value[row : row + 1] for name, value in bucket.state.items() if name in bucket.specs}
                    _, updates, warm = bucket.counters[row].tolist()
                    scale = recipe.moment.scale(updates, bool(warm))
                    dense = bucket.block.dense(state, recipe, scale)[0]
                    index = torch.arange(dense.shape[0]).view(unit.layout.shape)
                    order = torch.cat([window.flatten() for window in unit.operand.windows(index)]).to(dense.device)
                    return dense[order][:, order]
        what = (
            type(target).__name__
            if parameter is None or isinstance(target, nn.Module)
            else f"shape {list(target.shape)}"
        )
        raise ValueError(
            f"no curvature is held for {what}: it had no gradient yet, is joined to its weight, or needs none"
        )

    def health(self) -> Health:
        """Refreshed residuals, kept roots and masked steps, by parameter name."""
        self._bind()
        return health_of(self._storage.buckets, self._masked)

    def memory(self) -> dict[str, int]:
        """Bytes of optimizer state by role: statistics, roots, momentum, …; ``workspace`` holds packed gradients."""
        self._bind()
        total: dict[str, int] = {}
        for bucket in self._storage.buckets:
            for role, size in bucket.nbytes().items():
                total[role] = total.get(role, 0) + size
        return total

    # -- saving ---------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; statistics keep the dtype in which they were saved.

        Raises:
            ValueError: for a checkpoint of another recipe or model, naming the parameter; nothing is changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: Any, final: dict[str, Any]) -> None:
            self._check_checkpoint(final)
            loaded.update(final)

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._restore(loaded)

    def _check_checkpoint(self, state_dict: Mapping[str, Any]) -> None:
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        # Another number of parameters is refused by torch itself, in its own words.
        records = {one: state_dict["state"].get(number, {}) for one, number in zip(mine, saved, strict=False)}
        for unit, recipe in self._recipes().items():
            check_record(unit, recipe, [records.get(one, {}) for one in unit.operand.parameters], "this checkpoint")

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        """Undo torch's cast of statistics to the parameters' dtype, fill in newer settings, and bind anew."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if name in COUNTERS else parameter.device
                    self.state[parameter][name] = value.detach().clone().to(device)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._steps = max((group.setdefault("steps", 0) for group in self.param_groups), default=0)
        self._forget()

    def _forget(self) -> None:
        """Drop everything that can be derived again."""
        self._storage = Storage()
        self._units = None
        self._cache = None

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
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> CurvatureOptimizer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, (group, table) in enumerate(zip(self.param_groups, self._tables(), strict=True)):
            shown = {name: value for name, value in group.items() if name not in ("params", "param_names", "steps")}
            lines.append(
                f"  group {number}: {len(group['params'])} parameters, "
                + ", ".join(f"{k}={v}" for k, v in shown.items())
            )
            lines += [f"    {route} -> {route.recipe.partition}" for route in table]
        return "\n".join([*lines, ")"])


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, Tensor, Recipe))
