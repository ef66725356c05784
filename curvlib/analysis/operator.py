"""Curvature that is never formed: products with vectors, and what can be estimated from them.

J v is found by differentiating Jᵀu, which is linear in u, so that everything that can be differentiated twice will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..labels import Likelihood, hessian_product
from .exact import LIMIT, check_size, drawn_gradient
from .objective import Objective, Of, double_differentiable, flat, pullback, unflat

Kind = Literal["exact", "data", "sampled", "hessian"]


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes.

    Attributes:
        value: the mean.
        error: its standard error; zero-dimensional or of the shape of the value.
    """

    value: Tensor
    error: Tensor


class Operator:
    """The Fisher information matrix or the Hessian of an objective, as products ``operator @ v``.

    Args:
        objective: model, loss and data.
        kind: ``"exact"``, ``"data"``, ``"sampled"``: the Fisher of these labels, see :mod:`curvlib.analysis.exact`;
            ``"hessian"``.
        of: a module, a parameter, the name of either, or several; ``None`` for the whole network.
        batch: examples at once.
        columns: vectors at once.
        samples: of labels for each example, for ``"sampled"``.
        generator: of drawn labels and of probes; by default both follow from a fixed seed.

    Raises:
        ValueError: where the loss has no known Hessian with respect to the outputs, and one is needed.
    """

    def __init__(
        self,
        objective: Objective,
        kind: Kind = "exact",
        of: Of | Sequence[Of] | None = None,
        *,
        batch: int = 512,
        columns: int = 8,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        check_choice("kind", kind, ("exact", "data", "sampled", "hessian"))
        for name, value in {"batch": batch, "columns": columns, "samples": samples}.items():
            check_count(name, value)
        self.objective, self.kind, self.names = objective, kind, objective.names(of)
        self._values = objective.values(self.names)
        self._batch, self._columns = batch, columns
        self.generator = generator or torch.Generator(objective.inputs.device).manual_seed(0)
        self._known = objective.known(f"kind={kind!r}") if kind in ("exact", "sampled") else None
        self._seeds: list[Tensor] = []
        if kind == "sampled":
            assert self._known is not None
            likelihood, scale = self._known
            with torch.no_grad():
                for inputs, _ in objective.chunks(batch):
                    outputs = objective.outputs({}, inputs)
                    seeds = [drawn_gradient(outputs, likelihood, self.generator) for _ in range(samples)]
                    self._seeds.append(torch.stack(seeds) * (scale / samples) ** 0.5)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D)."""
        size = self.objective.numel(self.names)
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.objective.precision

    def __matmul__(self, other: Tensor) -> Tensor:
        """Products with ``[D]`` or ``[D, m]``."""
        self._check(other)
        columns = other.to(self.dtype).view(self.shape[0], -1).mT
        total = torch.zeros_like(columns)
        with double_differentiable():
            for number, (inputs, targets) in enumerate(self.objective.chunks(self._batch)):
                product = self._product(number, inputs, targets)
                for start in range(0, len(columns), self._columns):
                    part = columns[start : start + self._columns]
                    total[start : start + self._columns] += torch.vmap(product)(part)
        return (total.mT / len(self.objective)).reshape(other.shape)

    def _check(self, other: Tensor) -> None:
        size = self.shape[0]
        if other.ndim not in (1, 2) or other.shape[0] != size:
            raise ValueError(f"expected [{size}] or [{size}, m], got {list(other.shape)}")

    def _product(self, number: int, inputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
        """The map from v to the sum over a chunk's examples of their curvature times v."""
        objective, names, values = self.objective, self.names, self._values
        point = flat(values, names)

        def outputs(vector: Tensor) -> Tensor:
            return objective.outputs(unflat(vector, values, names), inputs)

        def losses(vector: Tensor) -> Tensor:
            return torch.vmap(objective.example_loss)(outputs(vector), targets)

        if self.kind == "hessian":
            return pullback(torch.func.grad(lambda vector: losses(vector).sum()), point)[1]
        if self.kind == "data":
            return _sandwich(losses, point, lambda image: image)
        if self.kind == "sampled":
            seeds = self._seeds[number]  # s n …
            places = tuple(range(2, seeds.ndim))
            return _sandwich(
                lambda vector: (seeds * outputs(vector)).sum(places) if places else seeds * outputs(vector),
                point,
                lambda image: image,
            )
        assert self._known is not None
        likelihood, scale = self._known
        return _exact(outputs, point, likelihood, scale)

    # -- estimates --------------------------------------------------------------------------------------------------

    def probes(self, count: int) -> Tensor:
        """Random signs, ``[D, count]``."""
        check_count("probes", count)
        shape = (self.shape[0], count)
        bits = torch.randint(0, 2, shape, generator=self.generator, device=self.generator.device)
        return (2 * bits - 1).to(self.objective.inputs.device, self.dtype)

    def trace(self, probes: int = 32) -> Estimate:
        """The trace, E zᵀFz (Hutchinson 1990); 0-d."""
        z = self.probes(probes)
        return _estimate((z * (self @ z)).sum(0))

    def diagonal(self, probes: int = 32) -> Estimate:
        """The diagonal, E z ∘ Fz (Bekas et al. 2007), ``[D]``."""
        z = self.probes(probes)
        return _estimate(z * (self @ z))

    def inverse_diagonal(self, damping: float, probes: int = 32, tolerance: float = 1e-6) -> Estimate:
        """The diagonal of the damped inverse, E z ∘ (F + λI)⁻¹z, ``[D]``, all probes solved at once.

        By conjugate gradients: the covariance-free estimate of sparse Bayesian learning (Lin et al. 2022).
        """
        z = self.probes(probes)
        return _estimate(z * self.solve(z, damping, tolerance))

    def solve(self, other: Tensor, damping: float, tolerance: float = 1e-6, iterations: int | None = None) -> Tensor:
        """(F + λI)⁻¹ of ``[D]`` or ``[D, m]`` by conjugate gradients, until ‖residual‖ <= tolerance · ‖other‖.

        Args:
            other: right-hand sides.
            damping: λ, above zero.
            tolerance: of every column.
            iterations: at most so many; by default 10 D.

        Raises:
            ValueError: for λ = 0, where F may be singular.
            RuntimeError: where the tolerance is not reached, for want of iterations or digits, or the matrix turns out not to
                be positive definite.
        """
        self._check(other)
        check_number("damping", damping, strict=True)
        check_number("tolerance", tolerance, strict=True)
        if iterations is not None:
            check_count("iterations", iterations)
        b = other.to(self.dtype).reshape(self.shape[0], -1)
        size = b.norm(dim=0)
        x, left, before = torch.zeros_like(b), iterations or 10 * self.shape[0], float("inf")
        while True:
            residual = b - (self @ x + damping * x)  # the true one: what the recursion carries along drifts
            share = torch.where(size > 0, residual.norm(dim=0) / size, 0.0)
            if bool((share <= tolerance).all()):
                return x.reshape(other.shape)
            worst = share.max().item()
            if not left or not worst < before / 2:
                way = "take a larger damping or tolerance, or dtype=torch.float64" if left else "allow more iterations"
                raise RuntimeError(
                    f"conjugate gradients stand at a relative residual of {worst:.1e} ({self.dtype}): {way}"
                )
            correction, left = self._descend(residual, size * tolerance, damping, left)
            x, before = x + correction, worst

    def _descend(self, residual: Tensor, goal: Tensor, damping: float, left: int) -> tuple[Tensor, int]:
        """(solution, iterations left) of conjugate gradients from zero; columns that are at their goal rest."""
        x, direction, energy = torch.zeros_like(residual), residual, residual.square().sum(0)
        while left and bool((active := energy.sqrt() > goal).any()):
            image = self @ direction + damping * direction
            curvature = (direction * image).sum(0)
            if bool((curvature[active] <= 0).any()):
                raise RuntimeError(f"F + {damping:g} I is not positive definite; take a larger damping, or a Fisher")
            step = torch.where(active, energy / curvature, 0.0)
            x = x + step * direction
            residual = residual - step * image
            before, energy = energy, residual.square().sum(0)
            direction = torch.where(active, residual + energy / before * direction, direction)
            left -= 1
        return x, left

    def extremes(self, iterations: int = 64) -> tuple[float, float]:
        """(least, largest) eigenvalue by the Lanczos process with full reorthogonalisation.

        The largest converges first; both are exact where there are as many iterations as eigenvalues.
        """
        check_count("iterations", iterations)
        q = torch.randn(self.shape[0], generator=self.generator, device=self.generator.device, dtype=torch.float64)
        q = q.to(self.objective.inputs.device, self.dtype)
        basis = [q / q.norm()]
        alphas: list[Tensor] = []
        betas: list[Tensor] = []
        for _ in range(min(iterations, self.shape[0])):
            image = self @ basis[-1]
            alphas.append(basis[-1] @ image)
            held = torch.stack(basis, 1)
            for _ in range(2):  # once more removes what rounding left
                image = image - held @ (held.mT @ image)
            beta = image.norm()
            if beta <= torch.finfo(self.dtype).eps * alphas[0].abs() * 10:
                break
            betas.append(beta)
            basis.append(image / beta)
        diagonal, side = torch.stack(alphas), torch.stack(betas[: len(alphas) - 1]) if len(alphas) > 1 else None
        matrix = diagonal.diag()
        if side is not None:
            matrix = matrix + side.diag(1) + side.diag(-1)
        values = torch.linalg.eigvalsh(matrix.double())
        return values[0].item(), values[-1].item()

    def dense(self, limit: int = LIMIT) -> Tensor:
        """The matrix itself, ``[D, D]``, from products with unit vectors."""
        check_size(self.shape[0], self.dtype, limit)
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.objective.inputs.device)


def _sandwich(
    function: Callable[[Tensor], Tensor], point: Tensor, middle: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The map from v to Jᵀ middle(J v), of a function at a point."""
    value, pull = pullback(function, point)
    _, push = pullback(pull, torch.zeros_like(value))
    return lambda v: pull(middle(push(v)))


def _exact(
    outputs: Callable[[Tensor], Tensor], point: Tensor, likelihood: Likelihood, scale: float
) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        at = outputs(point)
    return _sandwich(outputs, point, lambda image: hessian_product(at, image, likelihood, scale=scale))


def _estimate(draws: Tensor) -> Estimate:
    """Mean and standard error over the last dimension."""
    count = draws.shape[-1]
    error = draws.std(-1) / count**0.5 if count > 1 else torch.full_like(draws[..., 0], torch.inf)
    return Estimate(draws.mean(-1), error)
