"""The optimizer: torch.optim.Optimizer's contract around the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import engine
from .blocks import Means
from .checks import Flags
from .distributed import Exchange
from .health import Named, Proof, check_finite, warn
from .inspection import Inspection
from .layers import Reading, Slot, survey
from .listening import Listening, evidence, gated
from .passes import Passes
from .phases import phase
from .precision import full_precision
from .recipe import Recipe
from .routing import Route, RouteWarning, Table, as_table
from .saving import Saving
from .settings import Settings, Tables
from .storage import Storage
from .taps import Taps
from .units import Lineup, Unit, build_units


class CurvatureOptimizer(Listening, Inspection, Saving, Settings):
    """A routing table of recipes as a torch optimizer.

    Args:
        params: a model, or what torch optimizers take: parameters, groups, or (name, parameter) pairs. From a model the
            layers' kinds and names are known; from parameters alone axes are named by rank.
        recipe: a :class:`Recipe`, a sequence of :class:`Route`, or a function that makes one from ``settings``.
        lr: step size: a number, a tensor, or a callable of the step.
        weight_decay: of each group; decoupled or L2 as the recipe's rule says.
        maximize: ascend instead.
        reduction: what ``.grad`` holds: ``"mean"``, the gradient of the mean of per-example losses; ``"sum"``, of their
            sum, with the number of examples heard by the layers or told by ``optimizer.batch_size = n`` before each step;
            or a number by which it is divided, such as that of micro-batches whose mean losses were added up. After this
            every statistic and direction is of the mean loss.
        model: the model whose layers name the parameters' axes, where ``params`` are its parameters.
        foreach: ``False`` steps parameter by parameter, with smaller temporary tensors and more calls; ``None`` and ``True``
            batch all that are alike. Roots are solved together in any case.
        fused: ``None`` or ``False``. Torch's flags may leave open or decline what is not there; asking for it is refused.
        capturable: ``None`` or ``False``.
        differentiable: ``None`` or ``False``.
        settings: further group settings, handed to a ``recipe`` that is a function: numbers, or callables of the step,
            of which the group shows the current number.

    Raises:
        ValueError, TypeError, PartitionError: naming the parameter, the value and what is allowed.

    Attributes:
        batch_size: examples behind the current gradients, for ``reduction="sum"`` where no layer is listened to.
        loss_scale: what else the loss was multiplied by before backward, a number or a function of nothing that tells it:
            ``scaler.get_scale`` where a GradScaler's ``unscale_`` is called before the step, or a trainer clips gradients.
            Gradients do not have it any more, signals do. A GradScaler without ``unscale_`` tells it by itself.
        seed: of the labels and signs that :meth:`observe` draws; with the number of the step it decides them, also after a
            resume.
        on_nonfinite: ``"auto"``: a non-finite gradient raises :class:`NonFiniteGradient` before anything changes on a
            CPU, and masks the step on an accelerator; ``"raise"`` or ``"mask"`` everywhere; ``"off"`` does not look, as
            torch's own optimizers, which saves a pass over the gradients. A masked step changes nothing; on an accelerator,
            where nobody waits to hear of it, schedules and debiasing count it.
    """

    _storage: Storage
    _bound: Lineup | None

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
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **settings: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = [(name, parameter) for name, parameter in params.named_parameters()]
            if not params:
                raise ValueError(f"{type(model).__name__} has no parameters to optimize")
        self._recipe = recipe if callable(recipe) else as_table(recipe)
        self._settings = tuple(settings)
        self._amendments: tuple[Callable[[Table], Table], ...] = ()
        self._schedules: list[dict[str, Callable[[int], Any]]] = []
        self._steps = 0
        self._slots: dict[Tensor, Slot] = {}
        self._readings: dict[Tensor, list[Reading]] = {}
        self._masked: dict[str, Tensor] = {}
        self._taps = Taps()
        self._told: frozenset[str] = frozenset()
        self._passes = Passes()
        self._exchange: Exchange | None = None
        self._shards = None
        self.batch_size: int | None = None
        self.loss_scale: float | Callable[[], float] = 1.0
        self._seed = 0
        self.on_nonfinite: Literal["auto", "raise", "mask", "off"] = "auto"
        self._forget()
        universal = dict(lr=lr, weight_decay=weight_decay, maximize=maximize, reduction=reduction)
        flags = Flags(foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable)
        super().__init__(params, {**universal, **flags, **settings})
        if model is not None:
            self.attach(model)
        self._tables()
        self._all_units()

    # -- routing --------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Learn the layers of a model: kinds, axes, which bias belongs to which weight; and listen to them.

        Attach before the first call of a compiled model.

        Raises:
            ValueError: if the model holds none of the parameters.
        """
        slots, readings = survey(model)
        if not any(parameter in slots for group in self.param_groups for parameter in group["params"]):
            raise ValueError(f"{type(model).__name__} holds none of this optimizer's parameters")
        self._slots, self._readings, self._units = slots, readings, None
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._exchange = Exchange(model.process_group, uneven=model.find_unused_parameters)
        self._all_units()
        self._expect()

    def detach(self) -> None:
        """Forget the model: no hook is left on it, and axes are named by rank again."""
        self._taps.close()
        self._slots, self._readings, self._units, self._taps = {}, {}, None, Taps()

    def _all_units(self) -> list[Unit]:
        tables = self._tables()
        if self._units is None:
            units = build_units(self.param_groups, self._slots, tables)
            if large := [unit for unit in units if unit.passed and unit.name not in self._told]:
                self._told |= {unit.name for unit in large}
                listed = "; ".join(f"{unit.name} gets route {unit.route}, since {unit.passed}" for unit in large)
                warn(f"some parameters are too large: {listed}", RouteWarning)
            self._units = self._placed(units, self._resolve(units, tables))
            self._listen(tables)
        return self._units

    # -- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model under grad and returns the loss; what layers say in it adds to what they said
                before, as gradients do, unless it drops these.

        Raises:
            NonFiniteGradient: by parameter name, before anything changes (see ``on_nonfinite``).
            TapError: where statistics of layers are due and these were not heard, or not observed.
            RuntimeError: for sparse gradients, by parameter name.
        """
        loss = None
        self._taps.wake()
        if closure is not None:
            self._taps.doubt()
            with torch.enable_grad():
                loss = closure()
        overflow = getattr(self, "found_inf", None)
        if overflow is not None and self._shards is not None:
            overflow = 1 - self._shards.agree(overflow == 0).to(overflow)
        if overflow is not None and overflow.device.type == "cpu" and bool(overflow):
            self._masked["the scaled gradients"] = self._masked.get("the scaled gradients", torch.tensor(0)) + 1
            self._taps.settle()
            self._passes.clear()
            return loss
        self._schedule()
        self._mute()
        lineup = self._line_up()
        active = lineup.units
        if self._only_prepares(lineup):
            self._bind(lineup)
            if self._shards is not None:
                self._shards.count(active, self.state, 0)
            return loss
        settings = [self._group_settings(group) for group in self.param_groups]
        with phase("statistics"):
            if lineup.asks:
                self._look_back()
            heard, given = (self._heard(active, settings), self._given(active, settings)) if lineup.asks else ({}, {})
        gate = self._check_gradients(lineup, settings, heard, given)
        if overflow is not None and overflow.device.type != "cpu":
            gate = overflow == 0 if gate is None else gate & (overflow == 0)
        if gate is not None and _known(gate):
            if not bool(gate):
                self._taps.settle()
                self._passes.clear()
                return loss
            gate = None
        heard = heard if gate is None else gated(heard, gate)
        follows = self._follows(active, closure)
        recipes = self._bind(lineup)
        with full_precision():
            buckets, together = self._storage.buckets, self._together(active)
            finished = engine.directions(buckets, recipes, lineup, settings, gate, heard, given, together)
            promised = self._decide(finished, settings, gate)
            self._move(finished, settings, gate)
        if self._shards is not None:
            self._shards.scatter(gradients=not self._steps_itself)
            self._shards.count(active, self.state, 1)
        if follows and closure is not None:
            self._follow(follows, finished, settings, closure, gate)
        engine.settle(finished)
        self._adapt(promised, loss, closure)
        self._taps.settle()
        self._passes.clear()
        self._steps += 1
        for group in self.param_groups:
            group["steps"] = self._steps
        self._expect()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler hands over its scale and what overflowed: where layers are heard and nobody told the scale.

        Otherwise it divides gradients and leaves out steps itself, as trainers that clip or count steps expect.
        """
        return bool(self._taps.ears) and self.loss_scale == 1.0

    def _move(self, finished: list[engine.Direction], settings: Sequence[engine.Group], gate: Tensor | None) -> None:
        engine.advance(finished, settings, gate)

    def _group_settings(self, group: dict[str, Any]) -> dict[str, Any]:
        examples = self.batch_size or self._taps.examples or None
        factor = {"mean": 1.0, "sum": examples}.get(group["reduction"], group["reduction"])
        if factor is None:
            raise ValueError("reduction='sum' needs the number of examples: set optimizer.batch_size before the step")
        scale = getattr(self, "grad_scale", None)
        if isinstance(scale, Tensor) and scale.device.type == "cpu":
            scale = float(scale)
        reduction = float(factor) if scale is None else float(factor) * scale
        chosen = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
        signal = self._signal_factor(reduction, scale)
        return {**chosen, "reduction_factor": reduction, "signal_factor": signal, "loss_factor": float(factor)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; what layers say from now on replaces what they said before.

        What was observed of a forward pass stays, if its backward pass is still to come.
        """
        super().zero_grad(set_to_none)
        self._taps.zeroed()
        if not self._taps.awaited:
            self._passes.clear()

    def _bind(self, lineup: Lineup | None = None) -> dict[Unit, Recipe]:
        """Make sure that what steps, or has a record, has packed state; returns every unit's recipe."""
        recipes = self._recipes()
        if lineup is not None and self._bound is lineup and self._storage.intact(self.state):
            return recipes
        wanted = set() if lineup is None else set(lineup.here)
        members = [unit for unit in recipes if not unit.away and (unit in wanted or unit.lead in self.state)]
        if not self._storage.holds(members, self.state):
            alone = {unit for unit in members if self.param_groups[unit.groups[0]]["foreach"] is False}
            self._storage.bind([(unit, recipes[unit]) for unit in members], self.state, alone)
        self._bound = lineup
        return recipes

    def _check_gradients(
        self,
        lineup: Lineup,
        settings: Sequence[engine.Group],
        heard: Mapping[Unit, Means],
        given: engine.Given,
    ) -> Tensor | None:
        """Report non-finite gradients and signals by name, or return the gate that masks this step."""
        divisors = [group["reduction_factor"] for group in settings]
        if not heard and not given and self._shards is None and self._quickly_proven(lineup, divisors):
            return None
        named: list[Named] = [
            (name, parameter.grad, divisors[group] if squared else None)
            for name, parameter, group, squared in lineup.watched
            if parameter.grad is not None
        ]
        for name, gradient, _ in named:
            if gradient.layout is not torch.strided:
                raise RuntimeError(f"{name} has a sparse gradient; use sparse=False in its layer")
        named += [
            (f"the signals of {unit.name}", evidence(value), None)
            for unit, means in heard.items()
            for value, _ in means.values()
        ]
        for extra, found in given.items():
            named += [
                (f"the {extra} gradient of {name}", found[p], 1.0) for name, p, *_ in lineup.watched if p in found
            ]
        if self._shards is None:
            return check_finite(named, self.on_nonfinite, self._masked)
        return self._shards.finite(partial(check_finite, named, self.on_nonfinite, self._masked), self.on_nonfinite)

    def _quickly_proven(self, lineup: Lineup, divisors: Sequence[Any]) -> bool:
        if self.on_nonfinite not in ("auto", "raise") or any(one != 1.0 for one in divisors):
            return False
        if self._proof is None or self._proof[0] is not lineup:
            self._proof = lineup, Proof([one for _, one, *_ in lineup.watched if one.grad is not None])
        return self._proof[1].holds()

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
        self._mute()
        lineup = self._line_up()
        settings = [self._group_settings(group) for group in self.param_groups]
        heard = self._heard(lineup.units, settings)
        gate = self._check_gradients(lineup, settings, heard, {})
        recipes = self._bind(lineup)
        with full_precision():
            engine.warm(self._storage.buckets, recipes, lineup, settings, gate, heard, number)
        self._taps.settle()

    def _forget(self) -> None:
        """Drop everything that can be derived again."""
        self._storage = Storage()
        self._units = None
        self._cache = None
        self._resolved = None
        self._lineup = None
        self._bound = None
        self._proof = None


def _known(gate: Tensor) -> bool:
    """Whether it costs no waiting to look at a gate; elsewhere a masked step still counts in schedules and debiasing."""
    return gate.device.type == "cpu"
