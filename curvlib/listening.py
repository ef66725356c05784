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
from .quadratic import Linearised, Minimum, adapted, linearise, minimise
from .recipe import Quadratic, Recipe
from .routing import Table
from .taps import Taps
from .units import Unit


class Listening:
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
    _seen: list[Linearised]
    _drawn: dict[Tensor, Tensor]
    _drawn_examples: int

    def _all_units(self) -> list[Unit]:
        raise NotImplementedError

    def _recipes(self) -> dict[Unit, Recipe]:
        raise NotImplementedError

    def _listen(self, tables: Sequence[Table]) -> None:
        recipes = {unit: tables[unit.groups[0]][unit.route].recipe for unit in self._units or ()}
        listening = {unit: recipe for unit, recipe in recipes.items() if recipe.moment.listens and recipe.root.exponent}
        ears = [(unit, recipe) for unit, recipe in listening.items() if unit.lead in self._readings and not unit.silent]
        self._taps.listen(ears, self._readings)
        self._taps.count_always = any(group["reduction"] == "sum" for group in self.param_groups)
        silent = {unit.name: unit.silent for unit in listening if unit.silent}
        if not set(silent) <= self._told:
            self._told |= set(silent)
            listed = "; ".join(f"{name}: {reason}" for name, reason in silent.items())
            hint = "" if self._slots else ". Give the model, as in KFAC(model), or call attach(model)"
            warn(f"moments of the batch gradient are used where layers can't be heard: {listed}{hint}", TapWarning)

    def _signal_factor(self, reduction: float | Tensor, scale: float | Tensor | None) -> float | Tensor:
        """What the output gradients are divided by, so that they are of the mean loss."""
        given = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if scale is None and hasattr(self, "found_inf") and given == 1.0 and self._taps.ears:
            raise TapError(
                "a GradScaler unscaled the gradients before the step, but not what the layers said: set "
                "optimizer.loss_scale = scaler.get_scale once"
            )
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
        recipes, means = self._recipes(), {}
        deaf = [unit.name for unit in active if recipes[unit].moment.listens and unit.lead not in self._taps.ears]
        if deaf and any(recipes[unit].root.exponent for unit in active if unit.name in deaf):
            raise TapError(f"a copied or unpickled optimizer hears nothing: call attach(model); {', '.join(deaf[:8])}")
        heard: Mapping[Unit, Sums] = self._taps.heard(active)
        for unit, sums in heard.items():
            factor = settings[unit.groups[0]]["signal_factor"]
            own = recipes[unit].moment.labels == "data"
            means[unit] = sums.means(
                sums.examples / factor**2 if own else 1 / sums.examples, 1 / factor if own else 1 / sums.examples
            )
        return means

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
        outputs: Tensor,
        likelihood: Likelihood | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> None:
        """Look at the model's outputs, between the forward pass and ``backward``; does nothing where nothing is due.

        With ``labels="sampled"`` or ``"exact"`` this pulls labels from the model back through the network. With any
        labels it tells the number of examples and which positions are padding.

        Args:
            outputs: ``[examples, ...]``, with their graph: logits, or means of a Gaussian.
            likelihood: ``"categorical"`` (over the last dimension), ``"bernoulli"``, ``"gaussian"`` (unit variance).
            mask: ``[examples]`` or ``[examples, positions...]``, true where something counts.
            generator: of the drawn labels; by default they follow from ``optimizer.seed`` and the number of the step.
            scale: an example's loss is this times its negative log-likelihood summed over positions: 2 / outputs for a
                mean squared error, 1 / positions for a mean over a sequence.

        Raises:
            ValueError: for an unknown or missing likelihood, or a mask that does not fit.
            TapError: where the layers are not in the graph of the outputs.
        """
        self._all_units()
        if self._taps.pausing:
            return
        if mask is not None and (mask.dtype != torch.bool or mask.ndim < 1 or mask.shape[0] != outputs.shape[0]):
            raise ValueError(
                f"mask must be bool with {outputs.shape[0]} examples first, got {mask.dtype} of shape {list(mask.shape)}"
            )
        self._taps.declare(outputs, mask)
        if self._models():
            self._seen = [] if self._taps.stale else self._seen
            known = self._likelihood(likelihood, "a quadratic model")
            with self._taps.paused():
                self._seen.append(linearise(outputs, self._parameters(), known, mask, scale))
        self._draw(outputs, likelihood, mask, generator, scale)
        asked: tuple[Literal["sampled", "exact"], ...] = ("sampled", "exact")
        for labels in asked:
            if not self._taps.asks(labels):
                continue
            known = self._likelihood(likelihood, f"labels={labels!r}")
            check_number("scale", scale, strict=True)
            generator = generator or self._generator(outputs.device)
            self._taps.pull(outputs, seeds(outputs, known, labels, mask, generator, scale), labels)

    def _draws(self) -> list[Unit]:
        """The units whose statistics are of the gradient of drawn labels, where these are due."""
        return [
            unit
            for unit, recipe in self._recipes().items()
            if recipe.moment.drawn
            and recipe.root.exponent
            and recipe.schedule.takes_statistics(int(self.state.get(unit.lead, {}).get("step", 0)))
        ]

    def _draw(
        self,
        outputs: Tensor,
        likelihood: Likelihood | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
        scale: float,
    ) -> None:
        """Add the gradients of labels drawn for these outputs."""
        parameters = [one for unit in self._draws() for one in unit.operand.parameters if one.requires_grad]
        if not parameters:
            return
        known = self._likelihood(likelihood, "labels='sampled'")
        (seed,) = seeds(outputs, known, "sampled", mask, generator or self._generator(outputs.device), scale)
        with self._taps.paused():
            found = torch.autograd.grad(
                outputs, parameters, seed.to(outputs.dtype), retain_graph=True, allow_unused=True
            )
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                held = self._drawn.get(parameter, 0.0)
                self._drawn[parameter] = held + gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        self._drawn_examples += outputs.shape[0]
        self._taps.observed += 1

    def _drawn_means(self, active: Sequence[Unit]) -> dict[Tensor, Tensor]:
        """The gradients of the mean loss of drawn labels, by parameter.

        Raises:
            TapError: where they are due, and nothing was observed.
        """
        wanted = set(active)
        missing = [unit.name for unit in self._draws() if unit in wanted and not self._drawn_examples]
        if missing:
            raise TapError(
                "statistics of drawn labels are due: call optimizer.observe(outputs, likelihood) between the forward pass "
                f"and backward; {', '.join(missing[:8])}"
            )
        return {parameter: total / self._drawn_examples for parameter, total in self._drawn.items()}

    def _redraw(self) -> None:
        """Start anew."""
        self._drawn, self._drawn_examples = {}, 0

    @staticmethod
    def _likelihood(likelihood: Likelihood | None, what: str) -> Likelihood:
        if likelihood is None:
            raise ValueError(f"{what} needs a likelihood, one of {', '.join(map(repr, LIKELIHOODS))}")
        check_choice("likelihood", likelihood, LIKELIHOODS)
        return likelihood

    def paused(self) -> AbstractContextManager[None]:
        """Hear nothing in this context: for backward passes that are not of the training loss."""
        return self._taps.paused()

    def _generator(self, device: torch.device) -> torch.Generator:
        """The randomness of one observation: of nothing but the seed, the step, and which one of the step it is."""
        number = (self.seed * 1_000_003 + self._steps) * 1_009 + self._taps.observed
        return torch.Generator(device).manual_seed(number)

    def _minimise(self, finished: list[engine.Direction]) -> dict[Quadratic, Minimum]:
        """Let models of the loss decide step size and momentum, where rules have one."""
        models = {one.cohort.recipe.rule.model for one in finished} - {None}
        if models and not self._seen:
            raise TapError("a quadratic model of the loss needs optimizer.observe(outputs, likelihood) at every step")
        found = {
            model: minimise(model, finished, self._seen, self._parameters()) for model in models if model is not None
        }
        self._seen = []
        return found

    def _adapt(self, found: Mapping[Quadratic, Minimum], before: Any, closure: Callable[[], Any] | None) -> None:
        """Compare the loss after the step with what the model promised, and change the damping of the groups."""
        due = {m: one for m, one in found.items() if m.adapt_every and (self._steps + 1) % m.adapt_every == 0}
        if not due:
            return
        if closure is None:
            raise TapError("a damping that adapts to the loss needs step(closure)")
        gradients = [parameter.grad for parameter in self._parameters()]
        for parameter in self._parameters():
            parameter.grad = None
        with self._taps.paused(), torch.enable_grad():
            after = float(closure())
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        for model, minimum in due.items():
            for group in self.param_groups:
                if "damping" in group:
                    group["damping"] = adapted(group["damping"], model, float(before), after, float(minimum.decrease))

    def _models(self) -> list[Recipe]:
        """The recipes that step by a model of the loss."""
        return [recipe for recipe in self._recipes().values() if recipe.rule.model is not None]

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def evidence(value: Tensor) -> Tensor:
    """What is not finite where a sum of second moments is not: of matrices their diagonals."""
    return value.diagonal(dim1=-2, dim2=-1) if value.ndim > 1 and value.shape[-1] == value.shape[-2] else value
