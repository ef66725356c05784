"""Passes: what is evaluated beyond the training loss' own backward pass.

Moments, models and blocks declare what they rest on; what several of them need is evaluated once.

========== =============================================== ======================================================
pass       what is evaluated                               where the loop allows it
========== =============================================== ======================================================
`drawn`    the gradient for labels drawn from the model    ``observe(outputs, likelihood)``
`outputs`  the outputs as a linear function of parameters  ``observe(outputs, likelihood)``
`probed`   z ⊙ Hz with random signs z (Hutchinson)         ``observe(loss=loss)``, or ``backward(create_graph=True)``
`loss`     the gradient with its graph, for products Hv    ``observe(loss=loss)``, or ``backward(create_graph=True)``
`again`    the same batch at the new parameters            ``step(closure)``, see :class:`~curvlib.blocks.QuasiNewtonBlock`
========== =============================================== ======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ears import TapError
from .labels import Likelihood, seeds
from .quadratic import Linearised, linearise
from .recipe import Recipe
from .units import Unit


@dataclass
class Slopes:
    """The gradient of one batch's loss with its graph, kept until the step.

    Attributes:
        gradients: by parameter.
    """

    gradients: Mapping[Tensor, Tensor]

    def bend(self, parameters: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
        """The product vᵀHv, 0-d, with H the block of these parameters."""
        pairs = [(p, v, self.gradients[p]) for p, v in zip(parameters, vectors, strict=True) if p in self.gradients]
        bent = [(p, v, g) for p, v, g in pairs if g.requires_grad]
        if not bent:
            return vectors[0].new_zeros(())
        ends, leaves, given = ([one[place] for one in bent] for place in (2, 0, 1))
        try:
            products = torch.autograd.grad(ends, leaves, given, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise TapError(
                "the step differentiates the loss once more, but its graph is gone: call loss.backward(retain_graph=True), "
                "or loss.backward(retain_graph=optimizer.needs_graph) whatever the optimizer"
            ) from error
        found = [(v * one).sum() for (_, v, _), one in zip(bent, products, strict=True) if one is not None]
        return sum(found, vectors[0].new_zeros(()))


@dataclass
class Passes:
    """What was evaluated since the last step.

    Attributes:
        drawn: sums over examples of gradients for drawn labels, by parameter.
        examples: how many examples these are of.
        outputs: linearised batches.
        probed: sums of z ⊙ Hz, by parameter.
        probes: how many of these.
        slopes: gradients with their graphs.
    """

    drawn: dict[Tensor, Tensor] = field(default_factory=dict)
    examples: int = 0
    outputs: list[Linearised] = field(default_factory=list)
    probed: dict[Tensor, Tensor] = field(default_factory=dict)
    probes: int = 0
    slopes: list[Slopes] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything, in place: wrappers of an optimizer keep what they were given."""
        self.drawn, self.outputs, self.probed, self.slopes = {}, [], {}, []
        self.examples = self.probes = 0

    def draw(
        self,
        outputs: Tensor,
        parameters: Sequence[Tensor],
        likelihood: Likelihood,
        mask: Tensor | None,
        generator: torch.Generator,
        scale: float,
    ) -> None:
        """Add the gradients of labels drawn for these outputs."""
        (seed,) = seeds(outputs, likelihood, "sampled", mask, generator, scale)
        found = torch.autograd.grad(outputs, parameters, seed.to(outputs.dtype), retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            _add(self.drawn, parameter, gradient)
        self.examples += outputs.shape[0]

    def linearise(
        self,
        outputs: Tensor,
        parameters: Sequence[Tensor],
        likelihood: Likelihood,
        mask: Tensor | None,
        scale: float,
    ) -> None:
        """Keep the outputs as a linear function of the parameters."""
        self.outputs.append(linearise(outputs, parameters, likelihood, mask, scale))

    def differentiate(
        self, loss: Tensor, parameters: Sequence[Tensor], pooled: Mapping[Tensor, Recipe], generator: torch.Generator
    ) -> Slopes:
        """Differentiate a loss with its graph, and probe its Hessian for some of the parameters.

        Args:
            loss: a number, with its graph.
            parameters: all of them.
            pooled: those whose moment is of the Hessian's diagonal, with their recipes.
            generator: of the signs.
        """
        wanted = [one for one in parameters if one.requires_grad]
        with torch.enable_grad():
            found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        gradients = {p: g for p, g in zip(wanted, found, strict=True) if g is not None}
        if pooled:
            self.probe(gradients, pooled, generator)
        return Slopes(gradients)

    def probe(
        self, gradients: Mapping[Tensor, Tensor], pooled: Mapping[Tensor, Recipe], generator: torch.Generator
    ) -> None:
        """Add z ⊙ Hz for some of the parameters, from gradients with their graph."""
        bent = {p: g for p, g in gradients.items() if g.requires_grad and p in pooled}
        signs = [rademacher(one, generator) for one in bent]
        products: Sequence[Tensor | None] = []
        if bent:
            products = torch.autograd.grad(list(bent.values()), list(bent), signs, retain_graph=True, allow_unused=True)
        for parameter, z, product in zip(bent, signs, products, strict=True):
            if product is not None:
                _add(self.probed, parameter, _pooled(z * product, pooled[parameter].moment.pooling))
        self.probes += 1

    def given(
        self, units: Mapping[Unit, Recipe], factor: Callable[[Unit], float | Tensor]
    ) -> dict[str, dict[Tensor, Tensor]]:
        """What takes the gradient's place in the moments of some units: pass -> parameter -> tensor of the mean loss.

        Args:
            units: the units whose statistics are due.
            factor: what a gradient of the unit is divided by, so that it is of the mean loss.

        Raises:
            TapError: where they are due, and nothing was observed.
        """
        asked = {unit: recipe.moment.extra for unit, recipe in units.items()}
        for extra, count, call in (
            ("drawn", self.examples, "observe(outputs, likelihood) between the forward pass and backward"),
            ("probed", self.probes, "observe(loss=loss) before backward, or loss.backward(create_graph=True)"),
        ):
            missing = [unit.name for unit, one in asked.items() if one == extra and not count]
            if missing:
                what = {"drawn": "drawn labels", "probed": "the Hessian's diagonal"}[extra]
                raise TapError(f"statistics of {what} are due: call optimizer.{call}; {', '.join(missing[:8])}")
        means = {parameter: total / self.examples for parameter, total in self.drawn.items()}
        owners = {parameter: unit for unit in units for parameter in unit.operand.parameters}
        probed = {p: total / factor(owners[p]) for p, total in self.probed.items() if p in owners}
        return {"drawn": means, "probed": probed}


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of the shape and dtype of a tensor."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * drawn - 1).to(like.dtype)


def _add(sums: dict[Tensor, Tensor], parameter: Tensor, value: Tensor | None) -> None:
    if value is not None:
        wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        sums[parameter] = sums[parameter] + wide if parameter in sums else wide


def _pooled(value: Tensor, pooling: str | None) -> Tensor:
    """The mean over a kernel, in every place of it."""
    if pooling is None or value.ndim < 3:
        return value
    value = value.abs() if pooling == "absolute" else value
    return value.mean(tuple(range(2, value.ndim)), keepdim=True).expand_as(value)
