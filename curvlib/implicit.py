"""Hypergradients of implicit problems, from the inverse that the forward solve has estimated (SHINE).

A fixed point z* = f(z*, θ) or a minimum x* = argmin_x h(x, θ) is a root of some g(·, θ) = 0: of f - z, of ∇h. A loss L there
has

::

    dL/dθ = ∂L/∂θ + vᵀ ∂g/∂θ,        vᵀ = -∇Lᵀ J⁻¹,        J the Jacobian of g

and a quasi-Newton solver of g = 0 holds an estimate B⁻¹ of J⁻¹: vᵀ = -∇Lᵀ B⁻¹ costs no further solve.

Source: Ramzi, Mannel, Bai, Starck, Ciuciu & Moreau, ICLR 2022 (arXiv 2106.00553), and the authors' code (repositories shine
and, for minima, branch shine of hoag).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_choice, check_count
from .health import warn
from .quasi_newton import LbfgsInverse
from .solving import Broyden, Map, Root, broyden, check_positive


def _check_refine(refine: Any, backward: str) -> None:
    if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
        raise ValueError(f"refine must be a whole number of steps from 0, got {refine!r}")
    if refine and backward == "exact":
        raise ValueError(
            f"refine must be 0 where the backward is 'exact', which is solved to tolerance, got {refine!r}"
        )


@dataclass(frozen=True)
class Implicit:
    """How a fixed point is found and differentiated.

    Args:
        forward: Broyden's method for f(z) - z = 0.
        backward: ``"shine"``: v = -B⁻ᵀ∇L; ``"jacobian-free"``: v = ∇L (Fung et al. 2022); ``"exact"``: Jᵀv + ∇L = 0 solved by
            ``adjoint``.
        fallback: with ``"shine"``, samples with ‖v‖ > fallback · ‖∇L‖ take v = ∇L (1.8 in the authors' code); ``None``: none.
        refine: steps of Broyden's method for Jᵀv + ∇L = 0 from v, after the fallback, and, with ``"shine"``, from the
            forward's estimate, transposed. (The authors' code hands it over untransposed.)
        adjoint: how ``"exact"`` solves; its tolerance holds for the refinement, too.

    Raises:
        ValueError: naming the parameter, the value and what is allowed.
    """

    forward: Broyden = field(default_factory=Broyden)
    backward: Literal["exact", "shine", "jacobian-free"] = "shine"
    fallback: float | None = 1.8
    refine: int = 0
    adjoint: Broyden = field(default_factory=lambda: Broyden(100, 100, 1e-5, relative=True))

    def __post_init__(self) -> None:
        check_choice("backward", self.backward, ("exact", "shine", "jacobian-free"))
        if self.fallback is not None:
            check_positive("fallback", self.fallback)
        _check_refine(self.refine, self.backward)
        for name in ("forward", "adjoint"):
            if not isinstance(getattr(self, name), Broyden):
                raise ValueError(f"{name} must be a Broyden, got {getattr(self, name)!r}")
        if self.adjoint.update != "secant":
            raise ValueError(f"update of the adjoint's Broyden must be 'secant', got {self.adjoint.update!r}")


class _System:
    """g(z) = f(z) - z on flattened samples, with products by its transposed Jacobian."""

    def __init__(self, function: Map, shape: torch.Size) -> None:
        self.function, self.shape = function, shape

    def __call__(self, points: Tensor) -> Tensor:
        image = self.function(points.reshape(self.shape))
        if image.shape != self.shape:
            raise ValueError(f"f must return the shape of z, {list(self.shape)}, got {list(image.shape)}")
        return image.reshape(points.shape) - points

    def linearised(self, points: Tensor) -> Map:
        """σ -> Jᵀσ at one point; the graph is built once."""
        with torch.enable_grad():
            argument = points.detach().requires_grad_()
            value = self(argument)

        def pull(vectors: Tensor) -> Tensor:
            return torch.autograd.grad(value, argument, vectors, retain_graph=True)[0]

        return pull

    def pull(self, points: Tensor, vectors: Tensor) -> Tensor:
        return self.linearised(points)(vectors)


def fixed_point(
    function: Map, start: Tensor, settings: Implicit | None = None, *, outer: Map | None = None
) -> tuple[Tensor, Root]:
    """A z with z = f(z) for every sample, that can be differentiated by all that f depends on.

    The solve is outside autograd; what is returned is one more f(z*), whose incoming gradient is replaced by v. Gradients of
    first order only. f must be deterministic, must depend on z, and must not mix samples (the estimate is of each sample's
    own Jacobian, so no batch statistics).

    Args:
        function: f, ``[n, ...]`` -> the same shape.
        start: z₀, ``[n, ...]``.
        settings: the defaults of :class:`Implicit` if left out.
        outer: z ``[n, ...]`` -> ∇L(z) ``[n, ...]``, for outer-problem awareness; it can only be used in training, where the
            loss is known before the fixed point is.

    Returns:
        z, ``[n, ...]``, and how the solve went: residuals, iterations and the estimate, on samples of d entries.

    Raises:
        ValueError: for shapes that do not fit, or f that is not finite at z₀.

    Warns:
        UserWarning: where samples did not reach the tolerance; they are returned at their least residual.
    """
    settings = settings or Implicit()
    if start.ndim < 2 or not start.numel():
        raise ValueError(f"start must have samples, then entries, and not be empty, got the shape {list(start.shape)}")
    system = _System(function, start.shape)
    flat = start.detach().reshape(len(start), -1)
    root = broyden(
        system,
        flat,
        settings.forward,
        pull=system.pull,
        outer=None if outer is None else lambda z: outer(z.reshape(start.shape)).reshape(z.shape),
    )
    _report("the fixed point", root, settings.forward.iterations)
    point = function(root.solution.reshape(start.shape))
    if point.requires_grad:
        point.register_hook(lambda gradient: _turned(gradient, system, root, settings))
    return point, root


def _turned(gradient: Tensor, system: _System, root: Root, settings: Implicit) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("a fixed point has gradients of first order only; leave create_graph=True out")
    return adjoint(gradient.reshape(len(gradient), -1), system, root, settings).reshape(gradient.shape)


@torch.no_grad()
def adjoint(gradient: Tensor, system: Any, root: Root, settings: Implicit) -> Tensor:
    """Find v of vᵀ = -∇Lᵀ J⁻¹, by the backward of the settings.

    Args:
        gradient: ∇L, ``[n, d]``.
        system: with ``linearised(z)``, a function σ -> J(z)ᵀσ on ``[n, d]``.
        root: where J is taken, and the estimate.
        settings: see :class:`Implicit`.

    Returns:
        v, ``[n, d]``.

    Raises:
        ValueError: for a gradient that is not finite.

    Warns:
        UserWarning: where ``"exact"`` did not reach its tolerance.
    """
    sizes = gradient.norm(dim=1)
    if not sizes.isfinite().all():
        raise ValueError(
            f"the gradient at the fixed point is not finite, in {int((~sizes.isfinite()).sum())} of {len(sizes)} samples"
        )
    first, inverse = gradient, None
    if settings.backward == "exact":
        first = torch.zeros_like(gradient)
    elif settings.backward == "shine":
        first = -root.inverse.apply_transposed(gradient)
        if settings.fallback is not None:
            too_long = ~(first.norm(dim=1) <= settings.fallback * sizes)
            first = torch.where(too_long.unsqueeze(1), gradient, first)
        if settings.refine:
            inverse = root.inverse.transposed().widened(root.inverse.memory + settings.refine)
    if settings.backward != "exact" and not settings.refine:
        return first
    pull = system.linearised(root.solution)
    how = settings.adjoint if settings.backward == "exact" else replace(settings.adjoint, iterations=settings.refine)
    solved = broyden(
        lambda v: pull(v) + gradient, first, how, inverse=inverse, scale=sizes if settings.adjoint.relative else None
    )
    if settings.backward == "exact":
        _report("the adjoint equation", solved, how.iterations)
    return solved.solution


def _report(what: str, root: Root, iterations: int) -> None:
    if not root.converged.all():
        failed = int((~root.converged).sum())
        warn(
            f"{failed} of {len(root.converged)} samples did not reach the tolerance of {what} within {iterations} "
            f"iterations; the largest residual is {float(root.residuals.max()):.3g}. Raise iterations, memory or "
            "tolerance, or make f a contraction",
            UserWarning,
        )


class DeepEquilibrium(nn.Module):
    """A layer of infinite depth: z with z = layer(z, x) (Bai, Kolter & Koltun 2019).

    Args:
        layer: of (z ``[n, ...]``, x) to the shape of z.
        settings: see :class:`Implicit`.
        start: x -> z₀; zeros of the shape of x by default.

    Attributes:
        root: how the last solve went; ``None`` before the first.
    """

    root: Root | None

    def __init__(
        self, layer: Callable[[Tensor, Tensor], Tensor], settings: Implicit | None = None, start: Map | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.settings = settings or Implicit()
        self.start = start or torch.zeros_like
        self.root = None

    def forward(self, x: Tensor, outer: Map | None = None) -> Tensor:
        """Find z ``[n, ...]``; ``outer`` as in :func:`fixed_point`."""
        point, self.root = fixed_point(lambda z: self.layer(z, x), self.start(x), self.settings, outer=outer)
        return point


Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Hypergradient:
    """The gradient of an outer loss by the parameters of an inner one.

    Attributes:
        value: dL/dθ, of the shape of θ.
        direction: q, the estimate of H⁻¹ ∇L, of the shape of x.
        residual: ‖H q - ∇L‖ / ‖∇L‖ where conjugate gradients were run, otherwise ``None``.
        products: how many with H were taken.
    """

    value: Tensor
    direction: Tensor
    residual: float | None
    products: int


def hypergradient(
    inner: Objective,
    outer: Objective,
    theta: Tensor,
    solution: Tensor,
    estimate: LbfgsInverse | None = None,
    *,
    backward: Literal["exact", "shine", "jacobian-free"] = "shine",
    refine: int = 0,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> Hypergradient:
    """Differentiate L(x*(θ), θ) by θ, where x*(θ) minimises h(x, θ).

    ::

        dL/dθ = ∂L/∂θ - (∂²h/∂x∂θ)ᵀ q,        q = H⁻¹ ∇L,        H = ∂²h/∂x²

    with q by conjugate gradients (``"exact"``; HOAG, Pedregosa 2016), by the estimate of :func:`~curvlib.solving.lbfgs`
    (``"shine"``), or q = ∇L (``"jacobian-free"``).

    Args:
        inner: h, of (x, θ) to a 0-d tensor, twice differentiable.
        outer: L, of (x, θ) to a 0-d tensor.
        theta: θ, of any shape.
        solution: x*, of any shape.
        estimate: of H⁻¹ on flattened x, for ``"shine"``.
        backward: which q.
        refine: steps of conjugate gradients from q.
        tolerance: of ‖H q - ∇L‖ / ‖∇L‖.
        iterations: most conjugate gradients for ``"exact"``.

    Raises:
        ValueError: naming the parameter, the value and what is allowed; where the curvature along a direction is not
            positive, so that x* is no strict minimum; where gradients are not finite.

    Warns:
        UserWarning: where ``"exact"`` did not reach its tolerance.
    """
    check_choice("backward", backward, ("exact", "shine", "jacobian-free"))
    check_positive("tolerance", tolerance)
    check_count("iterations", iterations)
    _check_refine(refine, backward)
    if backward == "shine" and estimate is None:
        raise ValueError("estimate must be the inverse of the inner solve for backward 'shine', got None")
    with torch.enable_grad():
        x, parameter = solution.detach().requires_grad_(), theta.detach().requires_grad_()
        wanted, direct = torch.autograd.grad(outer(x, parameter), (x, parameter), materialize_grads=True)
        (slope,) = torch.autograd.grad(inner(x, parameter), x, create_graph=True)
    if not wanted.isfinite().all() or not slope.isfinite().all():
        names = [name for name, one in (("outer", wanted), ("inner", slope)) if not one.isfinite().all()]
        raise ValueError(f"the gradient of {' and '.join(names)} at the solution is not finite")

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(slope, x, vector.reshape(x.shape), retain_graph=True)[0].reshape(-1)

    flat = wanted.reshape(-1)
    direction = flat if backward != "exact" else torch.zeros_like(flat)
    if backward == "shine" and estimate is not None:
        direction = estimate.apply(flat)
    residual, products = None, 0
    if backward == "exact" or refine:
        steps = iterations if backward == "exact" else refine
        direction, residual, products = _conjugate_gradients(product, flat, direction, tolerance, steps)
        if backward == "exact" and residual > tolerance:
            warn(
                f"conjugate gradients ended after {iterations} iterations at a relative residual of {residual:.3g}; raise "
                "iterations or tolerance, or compute in float64",
                UserWarning,
            )
    direction = direction.reshape(x.shape)
    (mixed,) = torch.autograd.grad(slope, parameter, direction, materialize_grads=True)
    return Hypergradient(direct - mixed, direction, residual, products)


def _conjugate_gradients(
    product: Map, wanted: Tensor, start: Tensor, tolerance: float, iterations: int
) -> tuple[Tensor, float, int]:
    """Solve H q = wanted; q, the relative residual, and how many products that took."""
    size = max(float(wanted.norm()), torch.finfo(wanted.dtype).tiny)
    point, products = start, int(bool(start.any()))
    rest = wanted - product(start) if products else wanted
    towards, square = rest, rest @ rest
    for _ in range(iterations):
        if float(square.sqrt()) <= tolerance * size:
            break
        image = product(towards)
        products += 1
        curvature = towards @ image
        if not bool(curvature > 0):
            raise ValueError(
                f"the inner problem must be strictly convex at the solution, got a curvature of {float(curvature):.3g} along "
                "a direction of conjugate gradients"
            )
        length = square / curvature
        point, rest = point + length * towards, rest - length * image
        before, square = square, rest @ rest
        towards = rest + (square / before) * towards
    return point, float(square.sqrt()) / size, products
