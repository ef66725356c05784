"""Examples of trainings: a small network, its data, and an optimizer that is made anew for every run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ..ears import TapWarning
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Recipe, Root
from ..routing import Fits, Route, is_weight
from .properties import equal

Build = Callable[[], nn.Module]
Make = Callable[[nn.Module], CurvatureOptimizer]
Target = Recipe | Route | Sequence[Route] | Make
EXAMPLES = 12


def perceptron() -> nn.Module:
    """Linear layers, two of them alike."""
    hidden = [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()]
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), *hidden, nn.Linear(5, 3))


def convolutional() -> nn.Module:
    """A convolution, a norm, and a linear layer without bias."""
    convolution = nn.Conv1d(2, 4, 3, padding=1)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), convolution, nn.Tanh(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3, bias=False)
    )


def builder(target: Target) -> Make:
    """What makes an optimizer from a network.

    Raises:
        TypeError: for what is neither a recipe nor routes nor callable.
    """
    if isinstance(target, Recipe):
        where = Fits(target.cut) if target.axes is None else is_weight
        diagonal = Recipe("... |", Moment(beta=0.99, debias=True), Root(0.5, Damping(1e-6)))
        return lambda model: CurvatureOptimizer(model, [Route(target, where=where), Route(diagonal)], lr=0.01)
    if isinstance(target, (Route, list, tuple)):
        return lambda model: CurvatureOptimizer(model, target, lr=0.01)
    if not callable(target):
        raise TypeError(
            f"expected a Recipe, a Route, several, or a function from a model to an optimizer, got {target!r}"
        )
    return target


def name_of(target: Target) -> str:
    """How a message calls it."""
    if isinstance(target, Recipe):
        return f"the recipe on {str(target.partition)!r}"
    if isinstance(target, (Route, list, tuple)):
        routes = (target,) if isinstance(target, Route) else target
        return "the table " + "; ".join(f"{route} -> {str(route.recipe.partition)!r}" for route in routes)
    return getattr(target, "__name__", repr(target))


@dataclass(frozen=True)
class Training:
    """One example: a network, its data, and an optimizer that is made anew for every run.

    Attributes:
        make: the optimizer.
        build: the network.
        seed: of weights and data.
        steps: how many.
    """

    make: Make
    build: Build
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"a network of {getattr(self.build, '__name__', 'yours')!r}, {self.steps} steps, seed {self.seed}"

    def start(
        self, dtype: torch.dtype = torch.float64, frozen: Sequence[str] = ()
    ) -> tuple[nn.Module, CurvatureOptimizer]:
        """A fresh network and its optimizer.

        Args:
            dtype: of the parameters.
            frozen: names of parameters that do not train.
        """
        state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        model = self.build().to(dtype)
        torch.set_rng_state(state)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TapWarning)
            optimizer: Any = self.make(model)
        if not isinstance(optimizer, CurvatureOptimizer):
            raise TypeError(f"expected a CurvatureOptimizer, got {type(optimizer).__name__}")
        return model, optimizer

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[12, 6]`` and classes."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + number)
        inputs = torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(0, 3, (EXAMPLES,), generator=generator)

    def step(
        self, model: nn.Module, optimizer: CurvatureOptimizer, number: int, factor: float = 1.0, spoil: float = 0.0
    ) -> None:
        """One step on one batch; the loss is multiplied by a factor, the inputs have something added."""
        inputs, targets = self.batch(number)
        inputs = (inputs + spoil).to(next(model.parameters()).dtype)

        def closure() -> Tensor:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = F.cross_entropy(outputs.double(), targets) * factor
            optimizer.observe(outputs, "categorical", loss=loss)
            loss.backward(retain_graph=optimizer.needs_graph)
            return loss.detach()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TapWarning)
            optimizer.step(closure)

    def run(self, model: nn.Module, optimizer: CurvatureOptimizer, steps: range) -> dict[str, Tensor]:
        """Train; returns the parameters by name."""
        for number in steps:
            self.step(model, optimizer, number)
        return values(model)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Compare parameters by name."""
    for name, value in wanted.items():
        equal(found[name][None], value[None], tolerance, f"{name} {what}")


def networks(make: Make, model: Build | None) -> list[Build]:
    """The given network, or those of the kit's own that an optimizer can be made for.

    Raises:
        ValueError, TypeError: of the optimizer, where there are none.
    """
    fitting: list[Build] = []
    refused: Exception | None = None
    for build in (model,) if model is not None else (perceptron, convolutional):
        try:
            Training(make, build, 0, 1).start()
        except ValueError as error:
            refused = error
        else:
            fitting.append(build)
    if refused is not None and not fitting:
        raise refused
    return fitting


@st.composite
def trials(draw: st.DrawFn, make: Make, builds: Sequence[Build]) -> Training:
    """Draw a training."""
    return Training(make, draw(st.sampled_from(list(builds))), draw(st.integers(0, 99)), draw(st.integers(1, 4)))
