"""The quadratic model of the loss that KFAC's paper steps by (Martens & Grosse 2015, §6.5 to §7).

With Δ the preconditioned descent direction, δ₀ the last update, and F the exact Fisher of the batch::

    M(δ) = ½ δᵀ(F + λI)δ + ∇hᵀδ + h,        δ = α Δ + μ δ₀,        (α, μ) = argmin M
    ρ    = (h(θ + δ) - h(θ)) / (M(δ) - h)   every T steps: λ <- ω λ if ρ > 3/4, λ / ω if ρ < 1/4,   ω = rate^T

F is never formed: δᵀFδ' = 1/N Σ_n (Jδ)ᵀ H (Jδ'), with J δ by differentiating Jᵀu, which is linear in u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import Number, check_number, check_period, number
from .distributed import Exchange
from .ears import TapError
from .engine import Direction
from .labels import Likelihood, hessian_product
from .models import Model, decide

Vectors = list[Tensor | None]


@dataclass(frozen=True)
class Quadratic(Model):
    """Step size and momentum that minimise a quadratic model of the loss, see :mod:`curvlib.quadratic`.

    Needs ``optimizer.observe(outputs, likelihood)`` at every step, and for ``adapt_every`` also ``step(closure)``.

    Args:
        damping: λ of the model.
        momentum: combine with the last update.
        adapt_every: T, in steps, of the Levenberg-Marquardt rule that changes the group's ``damping``; ``None`` for never.
        rate: ω^(1/T).
    """

    combines: ClassVar[bool] = True

    damping: Number = 1e-2
    momentum: bool = True
    adapt_every: int | None = None
    rate: float = 19 / 20

    def __post_init__(self) -> None:
        check_number("damping", self.damping)
        check_number("rate", self.rate, high=1.0, strict=True)
        if self.adapt_every is not None:
            check_period("adapt_every", self.adapt_every)


@dataclass
class Linearised:
    """The outputs of one batch as a linear function of the parameters, kept until the step.

    Attributes:
        outputs: ``[n, ...]``, without graph.
        seed: u, of the shape of ``outputs``.
        pulled: Jᵀu for every parameter, a function of u.
        likelihood: of the outputs.
        mask: see :meth:`CurvatureOptimizer.observe`.
        scale: see :meth:`CurvatureOptimizer.observe`.
    """

    outputs: Tensor
    seed: Tensor
    pulled: Sequence[Tensor | None]
    likelihood: Likelihood
    mask: Tensor | None
    scale: float

    def push(self, vectors: Vectors) -> Tensor:
        """J v, of the shape of the outputs."""
        pairs = [(one, v) for one, v in zip(self.pulled, vectors, strict=True) if one is not None and v is not None]
        with torch.enable_grad():
            total = sum(((one * v).sum() for one, v in pairs), self.seed.new_zeros(()))
        (image,) = torch.autograd.grad(total, self.seed, retain_graph=True)
        return image

    def product(self, image: Tensor) -> Tensor:
        """H J v of the mean loss."""
        product = hessian_product(self.outputs, image, self.likelihood, self.mask, self.scale)
        return product / self.outputs.shape[0]


def linearise(
    outputs: Tensor, parameters: Sequence[Tensor], likelihood: Likelihood, mask: Tensor | None, scale: float
) -> Linearised:
    """Differentiate the outputs by all parameters; costs one backward pass whose graph is kept."""
    seed = torch.zeros_like(outputs, requires_grad=True)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.enable_grad():
        found = torch.autograd.grad(outputs, wanted, seed, create_graph=True, retain_graph=True, allow_unused=True)
    pulled = dict(zip(wanted, found, strict=True))
    return Linearised(outputs.detach(), seed, [pulled.get(one) for one in parameters], likelihood, mask, scale)


@dataclass
class Minimum:
    """Where the model has its minimum.

    Attributes:
        model: of which.
        alpha: α; 0-d.
        mu: μ; 0-d, zero without an earlier update.
        decrease: M(δ) - h; 0-d, negative.
    """

    model: Quadratic
    alpha: Tensor
    mu: Tensor
    decrease: Tensor

    def due(self, step: int) -> bool:
        """Whether the loss after the step of this number, from 1, changes the damping."""
        return self.model.adapt_every is not None and step % self.model.adapt_every == 0

    def adapted(self, damping: float, before: float, after: float) -> float:
        """λ after the loss was compared before and after the step."""
        return adapted(damping, self.model, before, after, float(self.decrease))


@decide.register(Quadratic)
def _(
    model: Quadratic,
    finished: Sequence[Direction],
    passes: Any,
    parameters: Sequence[Tensor],
    settings: Sequence[Any],
    gate: Tensor | None,
    exchange: Exchange | None = None,
) -> Minimum | None:
    if not passes.outputs:
        raise TapError("a quadratic model of the loss needs optimizer.observe(outputs, likelihood) at every step")
    if gate is not None and not bool(gate):
        return None
    return minimise(model, finished, passes.outputs, parameters, exchange)


def minimise(
    model: Quadratic,
    finished: Sequence[Direction],
    seen: Sequence[Linearised],
    parameters: Sequence[Tensor],
    exchange: Exchange | None = None,
) -> Minimum:
    """Find α and μ for all directions whose rule has this model, and write αΔ + μδ₀ in their place.

    Args:
        model: λ, and whether there is momentum.
        finished: this step's directions.
        seen: the linearised batches.
        parameters: in the order in which these were differentiated.
        exchange: the ranks over whose batches the model is the mean.
    """
    mine = [one for one in finished if one.cohort.recipe.rule.model == model]
    place = {parameter: index for index, parameter in enumerate(parameters)}
    steps: list[Vectors] = [[None] * len(parameters) for _ in range(2)]
    inner = torch.zeros(2, 2, dtype=torch.float64)
    slope = torch.zeros(2, dtype=torch.float64)
    for one in mine:
        for piece, last in zip(one.pieces, one.last(), strict=True):
            index, pair = place[piece.source], (-piece.direction, last)
            for row, vector in enumerate(pair):
                steps[row][index] = vector.reshape(piece.source.shape)
                slope[row] += (vector * piece.gradient).sum().double().cpu()
                for column, other in enumerate(pair):
                    inner[row, column] += (vector * other).sum().double().cpu()
    inner *= number(model.damping)
    fisher = torch.zeros_like(inner)
    for batch in seen:
        images = [batch.push(vectors) for vectors in steps]
        for column, image in enumerate(images):
            product = batch.product(image)
            for row, other in enumerate(images):
                fisher[row, column] += (other * product).sum().double().cpu() / len(seen)
    inner += fisher if exchange is None else exchange.mean([(fisher, 1.0)])[0]
    used = 2 if model.momentum and bool(inner[1, 1] > 0) else 1
    weights = torch.zeros(2, dtype=torch.float64)
    solved = torch.linalg.lstsq(inner[:used, :used], -slope[:used, None], driver="gelsd").solution[:, 0]
    weights[:used] = torch.where(solved.isfinite(), solved, 0.0)
    for one in mine:
        one.combine(float(weights[0]), float(weights[1]))
    return Minimum(model, weights[0], weights[1], weights @ slope + weights @ inner @ weights / 2)


def adapted(damping: float, model: Quadratic, before: float, after: float, decrease: float) -> float:
    """λ after comparing what the loss did with what the model promised (Levenberg-Marquardt)."""
    assert model.adapt_every is not None
    rate = model.rate**model.adapt_every
    ratio = (after - before) / decrease if decrease < 0 else 0.0
    if ratio > 0.75:
        return damping * rate
    return damping / rate if not ratio >= 0.25 else damping
