"""Two quasi-Newton solvers that keep their estimates of inverses: Broyden's method for roots, L-BFGS for minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import check_choice, check_count, check_number
from .health import warn
from .quasi_newton import BroydenInverse, LbfgsInverse

Map = Callable[[Tensor], Tensor]


def check_every(name: str, value: Any) -> None:
    """Refuse what is neither a whole number from 1 nor None.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a whole number of iterations from 1, or None, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no number above 0; settings here are no callables of the step.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """
    if callable(value):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    check_number(name, value, strict=True)


@dataclass(frozen=True)
class Broyden:
    """How Broyden's method is run.

    Args:
        iterations: at most.
        memory: most rank-one pairs of a sample.
        tolerance: a sample is solved when ‖g(z)‖ <= tolerance · scale.
        relative: the scale is ‖g‖ at the start (for an adjoint equation at v = 0); otherwise d^½, d being the entries of a
            sample. (Authors' code stops on one norm of the whole batch; here samples do not see each other.)
        update: ``"secant"``: B⁻¹y = s along every step; ``"adjoint"``: σᵀB = σᵀJ with σ the new residual, which needs a
            product with Jᵀ, as the authors use with outer-problem awareness.
        outer_every: iterations between the extra updates of outer-problem awareness, where a gradient of the outer problem
            is given; ``None``: never.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """

    iterations: int = 40
    memory: int = 27
    tolerance: float = 1e-5
    relative: bool = False
    update: Literal["secant", "adjoint"] = "secant"
    outer_every: int | None = 5

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("memory", self.memory)
        check_positive("tolerance", self.tolerance)
        check_choice("relative", self.relative, (True, False))
        check_choice("update", self.update, ("secant", "adjoint"))
        check_every("outer_every", self.outer_every)


@dataclass(frozen=True)
class Root:
    """Where Broyden's method ended.

    Attributes:
        solution: of all iterates of a sample the one with the least residual, ``[n, d]``.
        residuals: ‖g(solution)‖, ``[n]``.
        iterations: until the sample was solved or given up, ``[n]`` int64.
        converged: ``[n]`` bool.
        inverse: the estimate of J⁻¹.
    """

    solution: Tensor
    residuals: Tensor
    iterations: Tensor
    converged: Tensor
    inverse: BroydenInverse


@torch.no_grad()
def broyden(
    function: Map,
    start: Tensor,
    settings: Broyden | None = None,
    *,
    inverse: BroydenInverse | None = None,
    pull: Callable[[Tensor, Tensor], Tensor] | None = None,
    outer: Map | None = None,
    scale: Tensor | None = None,
) -> Root:
    """Solve g(z) = 0 for every sample by z <- z - B⁻¹ g(z), without line search (Broyden 1965).

    Outer-problem awareness (Ramzi et al. 2022) makes, every ``outer_every`` iterations, an adjoint update in the direction
    that the hypergradient needs, e = B⁻ᵀ ∇L(z), scaled to the last step's norm. (Authors' code, ``adj_broyden.py``, takes
    e = B⁻¹ ∇L(z), untransposed; the update makes eᵀB = eᵀJ, which is of use for ∇Lᵀ J⁻¹ if e is the transposed one.)

    Args:
        function: g, ``[n, d]`` -> ``[n, d]``, sample by sample.
        start: z₀, ``[n, d]``.
        settings: the defaults of :class:`Broyden` if left out.
        inverse: an estimate to start from, which is updated in place; -I if left out.
        pull: (z, σ) -> J(z)ᵀσ; needed for adjoint updates.
        outer: z -> ∇L(z), ``[n, d]``, for outer-problem awareness.
        scale: what the tolerance is multiplied by, ``[n]``, in place of what the settings say.

    Raises:
        ValueError: for shapes that do not fit, g(z₀) that is not finite, or a ``pull`` that is missing.
    """
    settings = settings or Broyden()
    if start.ndim != 2 or not start.numel():
        raise ValueError(f"start must have the shape [samples, entries] and not be empty, got {list(start.shape)}")
    if pull is None and (outer is not None or settings.update == "adjoint"):
        raise ValueError("pull must be given for adjoint updates and outer-problem awareness, got None")
    point, value = start, function(start)
    if value.shape != start.shape:
        raise ValueError(
            f"function must return the shape of its argument, {list(start.shape)}, got {list(value.shape)}"
        )
    norms = value.norm(dim=1)
    if not norms.isfinite().all():
        raise ValueError(
            f"function is not finite at the start, in {int((~norms.isfinite()).sum())} of {len(norms)} samples"
        )
    inverse = inverse or BroydenInverse(start.shape[0], start.shape[1], settings.memory, start)
    if scale is None:
        scale = norms if settings.relative else torch.full_like(norms, math.sqrt(start.shape[1]))
    limit = settings.tolerance * scale
    best, least = point, norms
    active = norms > limit
    iterations = torch.zeros_like(norms, dtype=torch.int64)
    step = torch.zeros_like(start)
    for iteration in range(settings.iterations):
        if not active.any():
            break
        every = settings.outer_every
        if outer is not None and pull is not None and every and iteration and iteration % every == 0:
            wanted = inverse.apply_transposed(outer(point))
            tiny = torch.finfo(start.dtype).tiny
            wanted = wanted * (step.norm(dim=1) / wanted.norm(dim=1).clamp_min(tiny)).unsqueeze(1)
            inverse.update_adjoint(wanted, pull(point, wanted), active)
        step = torch.where(active.unsqueeze(1), -inverse.apply(value), 0.0)
        point = point + step
        new = function(point)
        norms = new.norm(dim=1)
        iterations += active
        active = active & norms.isfinite()
        if settings.update == "adjoint" and pull is not None:
            inverse.update_adjoint(new, pull(point, new), active)
        else:
            inverse.update(step, new - value, active)
        value = torch.where(active.unsqueeze(1), new, value)
        better = active & (norms < least)
        best, least = torch.where(better.unsqueeze(1), point, best), torch.where(better, norms, least)
        active = active & (norms > limit)
    return Root(best, least, iterations, least <= limit, inverse)


@dataclass(frozen=True)
class Lbfgs:
    """How L-BFGS is run.

    Args:
        iterations: at most.
        memory: most pairs, those of outer-problem awareness among them.
        tolerance: it ends when ‖∇f(x)‖ <= tolerance · scale.
        relative: the scale is ‖∇f‖ at the start; otherwise d^½.
        outer_every: iterations between the extra pairs of outer-problem awareness, where a gradient of the outer problem is
            given; ``None``: never.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """

    iterations: int = 1000
    memory: int = 30
    tolerance: float = 1e-5
    relative: bool = False
    outer_every: int | None = 5

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("memory", self.memory)
        check_positive("tolerance", self.tolerance)
        check_choice("relative", self.relative, (True, False))
        check_every("outer_every", self.outer_every)


@dataclass(frozen=True)
class Minimum:
    """Where L-BFGS ended.

    Attributes:
        solution: of the shape of the start.
        value: f(solution).
        residual: ‖∇f(solution)‖.
        iterations: done.
        evaluations: of f and its gradient, those for extra pairs among them.
        converged: whether the tolerance was met.
        inverse: the estimate of the inverse Hessian.
    """

    solution: Tensor
    value: float
    residual: float
    iterations: int
    evaluations: int
    converged: bool
    inverse: LbfgsInverse


def lbfgs(
    function: Map,
    start: Tensor,
    settings: Lbfgs | None = None,
    *,
    inverse: LbfgsInverse | None = None,
    outer: Map | None = None,
) -> Minimum:
    """Minimise f by L-BFGS, with steps that satisfy the weak Wolfe conditions (bisection; Lewis & Overton 2013, §2).

    Outer-problem awareness (Ramzi et al. 2022) adds, every ``outer_every`` iterations, the pair
    (e, ∇f(x + e) - ∇f(x)) with e = H ∇L(x), the direction that the hypergradient needs. e has the norm of the last step, and
    at least u^½ max(1, ‖x‖), below which the difference of gradients would drown in rounding (the authors have no floor).

    Args:
        function: f, of x to a 0-d tensor that can be differentiated.
        start: x₀, of any shape.
        settings: the defaults of :class:`Lbfgs` if left out.
        inverse: an estimate to start from, such as that of a neighbouring problem, which is updated in place.
        outer: x -> ∇L(x), of the shape of x, for outer-problem awareness.

    Raises:
        ValueError: where f or its gradient is not finite at the start, or f no scalar.
    """
    settings = settings or Lbfgs()
    shape = start.shape
    evaluations = 0

    def evaluate(vector: Tensor) -> tuple[float, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            argument = vector.detach().reshape(shape).requires_grad_()
            value = function(argument)
            if value.ndim:
                raise ValueError(f"function must return a scalar, got the shape {list(value.shape)}")
            (gradient,) = torch.autograd.grad(value, argument)
        return value.item(), gradient.reshape(-1)

    point = start.detach().reshape(-1)
    value, gradient = evaluate(point)
    if not math.isfinite(value) or not gradient.isfinite().all():
        raise ValueError(
            f"function or its gradient is not finite at the start: {value}, ‖gradient‖ {gradient.norm():.3g}"
        )
    inverse = inverse or LbfgsInverse(settings.memory)
    limit = settings.tolerance * (float(gradient.norm()) if settings.relative else math.sqrt(len(point)))
    iteration, step = 0, torch.zeros_like(point)
    while iteration < settings.iterations and float(gradient.norm()) > limit:
        if outer is not None and settings.outer_every and iteration and iteration % settings.outer_every == 0:
            wanted = inverse.apply(outer(point.reshape(shape)).detach().reshape(-1))
            floor = math.sqrt(torch.finfo(point.dtype).eps) * max(1.0, float(point.norm()))
            length = max(float(step.norm()), floor) / max(float(wanted.norm()), torch.finfo(point.dtype).tiny)
            inverse.update(length * wanted, evaluate(point + length * wanted)[1] - gradient)
        direction = -inverse.apply(gradient)
        if not bool(direction @ gradient < 0):
            direction, inverse.pairs = -gradient, []
        found = _search(evaluate, point, value, gradient, direction)
        if found is None:
            break
        value, new, after = found
        step = new - point
        inverse.update(step, after - gradient)
        point, gradient = new, after
        iteration += 1
    residual = float(gradient.norm())
    converged = residual <= limit
    if not converged:
        warn(
            f"L-BFGS ended after {iteration} iterations with a gradient of norm {residual:.3g}, above the {limit:.3g} asked "
            "for; raise iterations or tolerance, or compute in float64",
            UserWarning,
        )
    return Minimum(point.reshape(shape), value, residual, iteration, evaluations, converged, inverse)


def _search(
    evaluate: Callable[[Tensor], tuple[float, Tensor]],
    point: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    halvings: int = 60,
) -> tuple[float, Tensor, Tensor] | None:
    """A step of the weak Wolfe conditions: (f, x, ∇f), or None where rounding leaves none."""
    slope = float(direction @ gradient)
    low, high, length = 0.0, math.inf, 1.0
    noise = torch.finfo(point.dtype).eps ** (2 / 3) * abs(value)
    for _ in range(halvings):
        new = point + length * direction
        reached, after = evaluate(new)
        # where values are equal to rounding, slopes tell a decrease (approximate Wolfe; Hager & Zhang 2005)
        flat = reached <= value + noise and float(direction @ after) <= -(1 - 2e-4) * slope
        if not (reached <= value + 1e-4 * length * slope or flat):
            high = length
        elif not float(direction @ after) >= 0.9 * slope:
            low = length
        else:
            return reached, new, after
        length = (low + high) / 2 if high < math.inf else 2 * length
    return None
