"""How an optimizer listens to layers: whose signals it needs, what it is told, what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import engine
from .blocks import Means, Sums
from .checks import check_choice, check_number
from .ears import TapError, TapWarning
from .health import warn
from .labels import LIKELIHOODS, Likelihood, seeds
from .layers import Reading, Slot
from .models import Model, decide
from .passes import Passes, Slopes
from .phases import phase
from .precision import full_precision
from .quadratic import Minimum
from .ranks import Ranks
from .recipe import Recipe
from .routing import Table
from .taps import Taps
from .units import Lineup, Unit


class Listening(Ranks):
    """The part of an optimizer that hears layers, by its taps."""

    param_groups: list[dict[str, Any]]
    state: Any
    loss_scale: float | Callable[[], float]
    seed: int
    _steps: int
    _slots: dict[Tensor, Slot]
    _readings: dict[Tensor, list[Reading]]
    _units: list[Unit] | None
    _taps: Taps
    _told: frozenset[str]
    _passes: Passes

    def _listen(self, tables: Sequence[Table]) -> None:
        recipes = {unit: tables[unit.groups[0]][unit.route].recipe for unit in self._units or ()}
        listening = {unit: recipe for unit, recipe in recipes.items() if recipe.moment.listens and recipe.root.exponent}
        ears = [(unit, recipe) for unit, recipe in listening.items() if unit.lead in self._readings and not unit.silent]
        self._taps.listen(ears, self._readings)
        self._taps.count_always = any(group["reduction"] == "sum" for group in self.param_groups)
        silent = {unit: recipe for unit, recipe in listening.items() if unit.silent}
        if not {unit.name for unit in silent} <= self._told:
            self._told |= {unit.name for unit in silent}
            hint = "" if self._slots else ". Give the model, as in KFAC(model), or call attach(model)"
            said = []
            for plain, what in ((False, "moments of the batch gradient are used"), (True, "nothing is preconditioned")):
                mine = [unit for unit, recipe in silent.items() if (recipe.on_gradients.root.exponent == 0) == plain]
                listed = "; ".join(f"{unit.name}: {unit.silent}" for unit in mine)
                said += [f"{what} where layers can't be heard: {listed}"] if mine else []
            warn(". And ".join(said) + hint, TapWarning)

    def _signal_factor(self, reduction: float | Tensor, scale: float | Tensor | None) -> float | Tensor:
        """What the output gradients are divided by, so that they are of the mean loss."""
        if scale is None and hasattr(self, "found_inf") and self.loss_scale == 1.0 and self._taps.ears:
            raise TapError(
                "a GradScaler unscaled the gradients before the step, but not what the layers said: set "
                "optimizer.loss_scale = scaler.get_scale once"
            )
        given = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        return reduction if scale is not None else reduction * given

    def _mute(self) -> None:
        """Route what turned out to be shared by all examples to the moments of gradients, and say so."""
        shared, self._taps.shared = self._taps.shared, {}
        for lead, reason in shared.items():
            if self.state.get(lead):
                raise TapError(
                    f"{self._slots[lead].name}: {reason}, though it was heard before; route it to a recipe with of='gradient'"
                )
            self._slots[lead] = replace(self._slots[lead], silent=reason)
        if shared:
            self._units = None
            self._all_units()

    def _heard(self, active: Sequence[Unit], settings: Sequence[Mapping[str, Any]]) -> dict[Unit, Means]:
        """What was heard, as means over examples of the second moments of their gradients."""
        recipes, means = self._recipes(), dict[Unit, Means]()
        deaf = [unit.name for unit in active if recipes[unit].moment.listens and unit.lead not in self._taps.ears]
        if deaf and any(recipes[unit].root.exponent for unit in active if unit.name in deaf):
            raise TapError(f"a copied or unpickled optimizer hears nothing: call attach(model); {', '.join(deaf[:8])}")
        uneven = self._exchange is not None and self._exchange.uneven
        heard: Mapping[Unit, Sums] = self._taps.heard(active, self._totals if uneven else None)
        for unit, sums in heard.items():
            group = settings[unit.groups[0]]
            factor = group["signal_factor"] / sums.scale
            self._taps.ears[unit.lead].scale = group["signal_factor"] / group["loss_factor"]
            sign = -1.0 if group["maximize"] else 1.0
            if isinstance(sums.examples, float) and sums.examples == 0:  # only other ranks called this layer
                means[unit] = {name: (value, 0.0) for name, value in sums.tensors.items()}
            elif recipes[unit].moment.labels == "data":
                means[unit] = sums.means(sums.examples / factor**2, sign / factor)
            else:
                means[unit] = sums.means(1 / sums.examples, 1 / sums.examples)
        return means if self._exchange is None else self._shared(means, heard)

    def _only_prepares(self, lineup: Lineup) -> bool:
        """Whether a step of size zero along no gradient, of which nothing was heard, only creates the state.

        Distributed checkpoints of torch take such a step to find out what an optimizer keeps.
        """
        if not (lineup.asks and self._taps.silent and all(float(group["lr"]) == 0 for group in self.param_groups)):
            return False
        return not any(one.grad is not None and one.grad.any() for one in self._parameters())

    def _expect(self) -> None:
        """Tell the taps whose statistics are due at the next step."""
        if not self._taps.ears:
            return
        due = {}
        for unit, recipe in self._recipes().items():
            if unit.lead in self._taps.ears:
                record = self.state.get(unit.lead, {})
                step = int(record.get("step", 0))
                due[unit.lead] = (step, recipe.schedule.takes_statistics(step), record)
        self._taps.expect(due)

    def observe(
        self,
        outputs: Tensor | None = None,
        likelihood: Likelihood | None = None,
        *,
        loss: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> None:
        """Look at the model's outputs, or at the loss, before ``backward``; does nothing where nothing is due.

        With ``labels="sampled"`` or ``"exact"`` outputs pull labels from the model back through the network. With any
        labels they tell the number of examples and which positions are padding. Moments of the Hessian and step sizes of
        layers differentiate the loss twice.

        Args:
            outputs: ``[examples, ...]``, with their graph: logits, or means of a Gaussian.
            likelihood: ``"categorical"`` (over the last dimension), ``"bernoulli"``, ``"gaussian"`` (unit variance).
            loss: the number of which ``backward`` is about to be called, with its graph.
            mask: ``[examples]`` or ``[examples, positions...]``, true where something counts.
            generator: of the drawn labels and signs; by default they follow from ``optimizer.seed`` and the number of the
                step.
            scale: an example's loss is this times its negative log-likelihood summed over positions: 2 / outputs for a
                mean squared error, 1 / positions for a mean over a sequence.

        Raises:
            ValueError: for an unknown or missing likelihood, a mask that does not fit, a loss that is no number.
            TapError: where the layers are not in the graph of the outputs.
        """
        if outputs is None and loss is None:
            raise ValueError("observe takes outputs=, loss=, or both; got neither")
        self._all_units()
        if self._taps.pausing:
            return
        if self._taps.abandoned:  # gradients were dropped and no backward pass came
            self._taps.abandon()
            self._passes.clear()
        self._taps.renew()
        with phase("statistics"):
            if outputs is not None:
                self._observe_outputs(outputs, likelihood, mask, generator, scale)
            if loss is not None:
                self._observe_loss(loss, generator)
        observed = loss if outputs is None else outputs
        assert observed is not None
        self._taps.wait(observed)

    def _observe_outputs(
        self,
        outputs: Tensor,
        likelihood: Likelihood | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
        scale: float,
    ) -> None:
        if mask is not None and (mask.dtype != torch.bool or mask.ndim < 1 or mask.shape[0] != outputs.shape[0]):
            raise ValueError(
                f"mask must be bool with {outputs.shape[0]} examples first, got {mask.dtype} of shape {list(mask.shape)}"
            )
        self._taps.declare(outputs, mask)
        if self._taps.repeating:
            return
        if self._models("outputs"):
            known = self._likelihood(likelihood, "a quadratic model")
            with self._taps.paused():
                self._passes.linearise(outputs, self._parameters(), known, mask, scale)
        drawn = [one for unit in self._extra("drawn") for one in unit.operand.parameters if one.requires_grad]
        if drawn:
            known = self._likelihood(likelihood, "labels='sampled'")
            generator = generator or self._generator(outputs.device)
            with self._taps.paused():
                self._passes.draw(outputs, drawn, known, mask, generator, scale)
            self._taps.observed += 1
        asked: tuple[Literal["sampled", "exact"], ...] = ("sampled", "exact")
        for labels in asked:
            if not self._taps.asks(labels):
                continue
            known = self._likelihood(likelihood, f"labels={labels!r}")
            check_number("scale", scale, strict=True)
            generator = generator or self._generator(outputs.device)
            self._taps.pull(outputs, seeds(outputs, known, labels, mask, generator, scale), labels)

    def _observe_loss(self, loss: Tensor, generator: torch.Generator | None) -> None:
        probed = {p: recipe for unit, recipe in self._extra("probed").items() for p in unit.operand.parameters}
        models = self._models("loss")
        if self._taps.repeating or not (probed or models):
            return
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"loss must be a number with its graph, got shape {list(loss.shape)}, grad_fn {loss.grad_fn}"
            )
        with self._taps.paused():
            slopes = self._passes.differentiate(
                loss, self._parameters(), probed, generator or self._generator(loss.device, everywhere=True)
            )
        if models:
            self._passes.slopes.append(slopes)
        self._taps.observed += 1

    def _look_back(self) -> None:
        """Take what gradients with a graph say, after ``backward(create_graph=True)``, where no loss was observed."""
        probed = {p: recipe for unit, recipe in self._extra("probed").items() for p in unit.operand.parameters}
        probes, slopes = bool(probed) and not self._passes.probes, self._models("loss") and not self._passes.slopes
        if not (probes or slopes):
            return
        graded = {p: p.grad for p in self._parameters() if p.grad is not None and p.grad.requires_grad}
        if not graded:
            return
        scale = getattr(self, "grad_scale", None)
        with self._taps.paused(), torch.enable_grad():
            gradients = graded if scale is None else {p: g / scale.to(g) for p, g in graded.items()}
            if probes:
                lead = next(iter(gradients))
                self._passes.probe(gradients, probed, self._generator(lead.device, everywhere=True))
            if slopes:
                self._passes.slopes.append(Slopes(gradients))

    def _extra(self, name: str) -> dict[Unit, Recipe]:
        """The units whose moments rest on a pass of this name, where these are due."""
        return {
            unit: recipe
            for unit, recipe in self._recipes().items()
            if recipe.moment.extra == name
            and recipe.root.exponent
            and recipe.schedule.takes_statistics(int(self.state.get(unit.lead, {}).get("step", 0)))
        }

    def _given(self, active: Sequence[Unit], settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[Tensor, Tensor]]:
        """What other passes found in the place of gradients, of the mean loss to be minimised."""
        due = {**self._extra("drawn"), **self._extra("probed")}
        wanted = {unit: recipe for unit, recipe in due.items() if unit in set(active)}

        def factor(unit: Unit) -> float | Tensor:
            group = settings[unit.groups[0]]
            return -group["loss_factor"] if group["maximize"] else group["loss_factor"]

        given = self._passes.given(wanted, factor) if wanted else {}
        if self._exchange is None:
            return given
        weights = {"drawn": float(self._passes.examples), "probed": 1.0}
        for name, found in given.items():
            # The same parameters in the same order on all ranks, whatever this one's graph had.
            mine = [p for unit, one in wanted.items() if one.moment.extra == name for p in unit.operand.parameters]
            zero = {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in mine}
            values = self._exchange.mean([(found.get(p, zero[p]), weights[name]) for p in mine]) if mine else []
            given[name] = dict(zip(mine, values, strict=True))
        return given

    @staticmethod
    def _likelihood(likelihood: Likelihood | None, what: str) -> Likelihood:
        if likelihood is None:
            raise ValueError(f"{what} needs a likelihood, one of {', '.join(map(repr, LIKELIHOODS))}")
        check_choice("likelihood", likelihood, LIKELIHOODS)
        return likelihood

    @property
    def needs_graph(self) -> bool:
        """Whether the step differentiates an observed loss once more, so that ``backward`` must retain its graph."""
        return bool(self._models("loss"))

    def paused(self) -> AbstractContextManager[None]:
        """Hear nothing in this context: for backward passes that are not of the training loss."""
        return self._taps.paused()

    def _generator(self, device: torch.device, everywhere: bool = False) -> torch.Generator:
        """The randomness of one observation: of nothing but the seed, the step, which one of the step it is, and the rank.

        Args:
            device: where it draws.
            everywhere: the same on all ranks.
        """
        number = (self.seed * 1_000_003 + self._steps) * 1_009 + self._taps.observed
        if self._exchange is not None and not everywhere:
            number += self._exchange.rank * 1_000_000_007
        return torch.Generator(device).manual_seed(number)

    def _decide(
        self, finished: list[engine.Direction], settings: Sequence[Mapping[str, Any]], gate: Tensor | None
    ) -> list[Minimum]:
        """Let models of the loss decide step sizes, where rules have one; what they promise."""
        models = {model: None for one in finished if (model := one.cohort.recipe.rule.model) is not None}
        given = self._passes, self._parameters(), settings, gate, self._exchange
        return [found for model in models if (found := decide(model, finished, *given)) is not None]

    def _adapt(self, promised: Sequence[Minimum], before: Any, closure: Callable[[], Any] | None) -> None:
        """Compare the loss after the step with what the models promised, and change the damping of the groups."""
        due = [one for one in promised if one.due(self._steps + 1)]
        if not due:
            return
        if closure is None:
            raise TapError("a damping that adapts to the loss needs step(closure)")
        gradients = [parameter.grad for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.grad = None
        with self._taps.paused(), torch.enable_grad():
            after = float(torch.as_tensor(closure()).detach())
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        for one in due:
            for group in self.param_groups:
                if "damping" in group:
                    group["damping"] = one.adapted(group["damping"], float(before), after)

    def _follows(self, active: Sequence[Unit], closure: Callable[[], Any] | None) -> list[Unit]:
        """The units that look at the same batch once more after this step.

        Raises:
            TapError: where there is no closure to do so.
        """
        if not self._taps.ears:
            return []
        recipes = self._recipes()
        ears = [self._taps.ears[unit.lead] for unit in active if unit.lead in self._taps.ears]
        mine = [ear.unit for ear in ears if ear.due and ear.block.again and recipes[ear.unit].root.exponent]
        if mine and (closure is None or not self._steps_itself):
            how = (
                "call optimizer.step(closure)"
                if self._steps_itself
                else "a Preconditioner does not take the step itself"
            )
            names = ", ".join(unit.name for unit in mine[:8])
            raise TapError(f"the blocks of {names} look at the same batch once more after the step; {how}")
        return mine

    def _follow(
        self,
        units: Sequence[Unit],
        finished: Sequence[engine.Direction],
        settings: Sequence[Mapping[str, Any]],
        closure: Callable[[], Any],
        gate: Tensor | None,
    ) -> None:
        """Look at the same batch at the new parameters, and let blocks learn from the step."""
        gradients = [parameter.grad for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.grad = None
        try:
            with self._taps.again():
                with torch.enable_grad():
                    closure()
                heard = self._heard(units, settings)
        finally:
            for parameter, gradient in zip(self._parameters(), gradients, strict=True):
                parameter.grad = gradient
        with full_precision():
            engine.follow(finished, heard, gate)

    def _models(self, needs: str) -> list[Model]:
        """The models by which rules step that rest on a pass of this name."""
        models = (recipe.rule.model for recipe in self._recipes().values())
        return [model for model in models if model is not None and model.needs == needs]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def gated(heard: Mapping[Unit, Means], gate: Tensor) -> dict[Unit, Means]:
    """What was heard, zero where the gate is shut: what is not finite must not even be multiplied by zero."""
    return {
        unit: {
            name: (torch.where(gate.to(value.device), value, 0.0), factor) for name, (value, factor) in means.items()
        }
        for unit, means in heard.items()
    }


def evidence(value: Tensor) -> Tensor:
    """What is not finite where a sum of second moments is not: of matrices their diagonals."""
    return value.diagonal(dim1=-2, dim2=-1) if value.ndim > 1 and value.shape[-1] == value.shape[-2] else value
