"""What a filter assumes and what it believes: dynamics and observations; normal distributions over parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Number, check_choice, check_number, number
from .labels import LIKELIHOODS, Likelihood
from .low_rank import gram, root_of_one_plus, truncated, whitened

Inflation = Literal["bayesian", "simple", "hybrid"]


@dataclass(frozen=True)
class Dynamics:
    """How parameters move between observations (Chang et al. 2023; inflation as in its authors' code).

    Before a prediction, an inflation α > 0 tempers what was learned; with N(m₀, η⁻¹ I) the prior, moved along::

        "bayesian"   Λ ← (Λ + α η I) / (1 + α),   m ← m + α η / (1 + α) Λ⁻¹ (m₀ - m)
        "hybrid"     Λ as above, m stays
        "simple"     Λ ← Λ / (1 + α), m stays

    Args:
        gamma: factor γ of the parameters, above 0, up to 1.
        q: variance that a step adds to every parameter.
        steady_state: q is (1 - γ²) σ₀² of the prior variance σ₀² instead, which then stays as it is.
        inflation: α.
        kind: of inflation.

    All numbers may be callables of the number of updates so far.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """

    gamma: Number = 1.0
    q: Number = 0.0
    steady_state: bool = False
    inflation: Number = 0.0
    kind: Inflation = "bayesian"

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, strict=True)
        if not callable(self.gamma) and self.gamma > 1:
            raise ValueError(f"gamma must be a number above 0 and up to 1, got {self.gamma!r}")
        check_number("q", self.q)
        check_choice("steady_state", self.steady_state, (False, True))
        check_number("inflation", self.inflation)
        check_choice("kind", self.kind, ("bayesian", "simple", "hybrid"))
        if self.steady_state and self.q != 0.0:
            raise ValueError(f"q must be 0 with steady_state, which sets it, got {self.q!r}")


@dataclass(frozen=True)
class Observation:
    """What is observed: the mean h and the covariance R of an example's observation, given the model's outputs z.

    ::

        "gaussian"      h = z,            R = variance · I
        "categorical"   h = softmax(z),   R = diag(h) - h hᵀ + eps I
        "bernoulli"     h = sigmoid(z),   R = diag(h (1 - h)) + eps I

    The first two are those of the paper and of its authors' code, where eps is 1e-3 (without it R is singular); for the
    last one the code clips h to [1e-4, 1 - 1e-4] instead, which makes confident examples' Jacobians zero.

    Args:
        likelihood: of the observations.
        variance: R of a Gaussian.
        adaptive: estimate the variance of a Gaussian: the running mean over examples of ‖y - h(x, m)‖² / C at the mean
            after their update, at least 1e-6 (authors' code); the first update has ``variance``.
        eps: added to R of the other two.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """

    likelihood: Likelihood = "gaussian"
    variance: Number = 1.0
    adaptive: bool = False
    eps: Number = 1e-3

    def __post_init__(self) -> None:
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_number("variance", self.variance, strict=True)
        check_choice("adaptive", self.adaptive, (False, True))
        check_number("eps", self.eps, strict=True)
        if self.adaptive and self.likelihood != "gaussian":
            raise ValueError(f"adaptive must be False unless the likelihood is 'gaussian', got {self.likelihood!r}")

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean h for outputs ``[n, ...]``."""
        if self.likelihood == "gaussian":
            return outputs
        return outputs.softmax(-1) if self.likelihood == "categorical" else outputs.sigmoid()

    def covariance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The covariance R ``[n, C, C]`` for h ``[n, C]``, with the variance of a Gaussian."""
        if self.likelihood == "gaussian":
            return torch.diag_embed(variance.expand_as(mean))
        if self.likelihood == "bernoulli":
            return torch.diag_embed(mean * (1 - mean) + number(self.eps))
        return torch.diag_embed(mean + number(self.eps)) - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def target(self, observed: Tensor, mean: Tensor) -> Tensor:
        """What h is compared with, in its shape.

        Raises:
            ValueError: for observations that do not fit h.
        """
        if self.likelihood == "categorical":
            if mean.ndim != 2:
                raise ValueError(f"outputs must be [n, classes] for 'categorical', got {list(mean.shape)}")
            whole = not observed.is_floating_point() and observed.dtype != torch.bool
            if not whole or observed.shape != mean.shape[:1]:
                raise ValueError(
                    f"observations must be class numbers [{len(mean)}] of an integer dtype, "
                    f"got {list(observed.shape)} of {observed.dtype}"
                )
            if observed.min() < 0 or observed.max() >= mean.shape[1]:
                raise ValueError(f"observations must be class numbers from 0 to {mean.shape[1] - 1}, got {observed}")
            return F.one_hot(observed.long(), mean.shape[1]).to(mean)
        if observed.shape != mean.shape and not (observed.ndim == 1 and observed.numel() == mean.numel()):
            raise ValueError(
                f"observations must have the outputs' shape {list(mean.shape)}, got {list(observed.shape)}"
            )
        if not observed.isfinite().all():
            rows = (~observed.reshape(len(mean), -1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"observations must be finite, got NaN or infinity in rows {rows}; nothing was changed")
        if self.likelihood == "bernoulli" and (observed.min() < 0 or observed.max() > 1):
            raise ValueError(f"observations must lie in [0, 1] for 'bernoulli', got {observed}")
        return observed.reshape(mean.shape).to(mean)


class Gaussian(ABC):
    """A covariance Λ⁻¹ of P parameters, and what a filter does with it; nothing is changed in place."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The precision Λ ``[P, P]``."""

    @abstractmethod
    def solve(self, vector: Tensor) -> Tensor:
        """Λ⁻¹ v, for ``[P]`` or ``[P, k]``."""

    @abstractmethod
    def variances(self) -> Tensor:
        """The diagonal of Λ⁻¹, ``[P]``."""

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``[count, P]`` of N(0, Λ⁻¹)."""

    @abstractmethod
    def inflated(self, alpha: float, added: float) -> Self:
        """(Λ + added · I) / (1 + alpha)."""

    @abstractmethod
    def predicted(self, gamma: float, q: float) -> Self:
        """(γ² Λ⁻¹ + q I)⁻¹."""

    @abstractmethod
    def conditioned(self, rows: Tensor, residual: Tensor) -> tuple[Self, Tensor]:
        """Λ + Jᵀ J for rows J ``[k, P]``, and the step (Λ + Jᵀ J)⁻¹ Jᵀ r of the mean for residuals r ``[k]``."""


@dataclass(frozen=True, eq=False)
class LowRankPrecision(Gaussian):
    """Λ = diag(Υ) + W Wᵀ.

    Args:
        diagonal: Υ, positive: ``[P]``, or one number ``[]`` for all, the spherical version.
        basis: W ``[P, L]``.

    Raises:
        ValueError: for shapes that do not fit, and numbers of the diagonal that are not positive.
    """

    diagonal: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.diagonal.shape not in ((), self.basis.shape[:1]):
            raise ValueError(
                f"diagonal and basis must be [P] or [], and [P, L], got {list(self.diagonal.shape)} "
                f"and {list(self.basis.shape)}"
            )
        if (self.diagonal <= 0).any():
            raise ValueError(f"diagonal must be positive, got {self.diagonal.min().item():g}")

    def dense(self) -> Tensor:
        """The precision Λ ``[P, P]``."""
        return torch.diag(self.diagonal.expand(len(self.basis))) + self.basis @ self.basis.mT

    def solve(self, vector: Tensor) -> Tensor:
        """Λ⁻¹ v = Υ⁻¹ v - Υ⁻¹ W (I + Wᵀ Υ⁻¹ W)⁻¹ Wᵀ Υ⁻¹ v, for ``[P]`` or ``[P, k]``."""
        matrix = vector.reshape(len(self.basis), -1)
        scaled = matrix / self.diagonal.unsqueeze(-1)
        white = self._whitened()
        return (scaled - white.mT @ (white @ matrix)).view(vector.shape)

    def variances(self) -> Tensor:
        """The diagonal of Λ⁻¹, ``[P]``."""
        least = (self.diagonal + self.basis.square().sum(1)).reciprocal()  # (Λ⁻¹)ᵢᵢ ≥ 1 / Λᵢᵢ, whatever rounding says
        return torch.maximum(self.diagonal.reciprocal() - self._whitened().square().sum(0), least)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``[count, P]``: Λ⁻¹ (Υ^½ a + W b) with a and b standard normal."""
        like: dict[str, Any] = {"dtype": self.basis.dtype, "device": self.basis.device, "generator": generator}
        size, memory = self.basis.shape
        own = torch.randn(size, count, **like) * self.diagonal.sqrt().unsqueeze(-1)
        return self.solve(own + self.basis @ torch.randn(memory, count, **like)).mT

    def inflated(self, alpha: float, added: float) -> Self:
        """(Λ + added · I) / (1 + alpha)."""
        return replace(self, diagonal=(self.diagonal + added) / (1 + alpha), basis=self.basis / (1 + alpha) ** 0.5)

    def predicted(self, gamma: float, q: float) -> Self:
        """(γ² Λ⁻¹ + q I)⁻¹, for which the form is closed, so that nothing is lost (Chang et al. 2023, predict step).

        ::

            Υ' = (γ² / Υ + q)⁻¹,   C = (I + q Wᵀ (Υ'/Υ) W)⁻¹,   W' = γ (Υ'/Υ) W C^½

        The paper takes the Cholesky factor of C; here it is the inverse of that of C⁻¹, which gives the same W' W'ᵀ.
        """
        moved = (gamma**2 / self.diagonal + q).reciprocal()
        ratio = (moved / self.diagonal).unsqueeze(-1)
        root = _sound_root(q * gram(self.basis, self.basis * ratio))
        basis = torch.linalg.solve_triangular(root, gamma * (self.basis * ratio).mT.double(), upper=False).mT
        return replace(self, diagonal=moved, basis=basis.to(self.basis.dtype))

    def conditioned(self, rows: Tensor, residual: Tensor) -> tuple[Self, Tensor]:
        """Λ + Jᵀ J back in L columns, and the exact step of the mean (Chang et al. 2023, update step).

        With W̃ = [W, Jᵀ] the step is Υ⁻¹ W̃ (I + W̃ᵀ Υ⁻¹ W̃)⁻¹ [0; r], the paper's gain times the residual with a product
        less to cancel. W̃ᵀ W̃ = V S² Vᵀ, so W̃ V are the left singular vectors times S: the first L columns stay, the
        squares of the others are added to Υ, which keeps the diagonal of Λ, or dropped if Υ is one number. All in float64.
        """
        memory = self.basis.shape[1]
        wide = torch.cat([self.basis, rows.mT], 1).double()
        scaled = wide / self.diagonal.unsqueeze(-1)
        late = F.pad(residual, (memory, 0)).unsqueeze(-1).double()
        weights = torch.cholesky_solve(late, _sound_root(gram(wide, scaled)))
        basis, rest = truncated(wide, memory)
        diagonal = self.diagonal + rest.to(self.diagonal.dtype) if self.diagonal.ndim else self.diagonal
        return replace(self, diagonal=diagonal, basis=basis.to(rows.dtype)), (scaled @ weights).squeeze(-1).to(
            rows.dtype
        )

    def _whitened(self) -> Tensor:
        """T ``[L, P]`` with Λ⁻¹ = Υ⁻¹ - Tᵀ T."""
        return whitened(self.diagonal.view(-1), self.basis)


@dataclass(frozen=True, eq=False)
class DenseCovariance(Gaussian):
    """Λ⁻¹ as it is, ``[P, P]``.

    Args:
        matrix: symmetric and positive definite.

    Raises:
        ValueError: for a matrix that is not square.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"matrix must be [P, P], got {list(self.matrix.shape)}")

    def dense(self) -> Tensor:
        """The precision Λ ``[P, P]``."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix))

    def solve(self, vector: Tensor) -> Tensor:
        """Λ⁻¹ v, for ``[P]`` or ``[P, k]``."""
        return self.matrix @ vector

    def variances(self) -> Tensor:
        """The diagonal of Λ⁻¹, ``[P]``."""
        return self.matrix.diagonal().clone()

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``[count, P]`` of N(0, Λ⁻¹)."""
        normal = torch.randn(
            count, len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device, generator=generator
        )
        return normal @ torch.linalg.cholesky(self.matrix).mT

    def inflated(self, alpha: float, added: float) -> Self:
        """(Λ + added · I) / (1 + alpha), of which the inverse is (1 + alpha) (I + added · Σ)⁻¹ Σ."""
        system = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device) + added * self.matrix
        return replace(self, matrix=_symmetric((1 + alpha) * torch.linalg.solve(system, self.matrix)))

    def predicted(self, gamma: float, q: float) -> Self:
        """γ² Σ + q I."""
        moved = gamma**2 * self.matrix
        moved.diagonal().add_(q)
        return replace(self, matrix=moved)

    def conditioned(self, rows: Tensor, residual: Tensor) -> tuple[Self, Tensor]:
        """Joseph's form, (I - K J) Σ (I - K J)ᵀ + K Kᵀ with K = Σ Jᵀ (I + J Σ Jᵀ)⁻¹: an error of K counts squared."""
        product = rows @ self.matrix
        gain = torch.cholesky_solve(product, _sound_root(product @ rows.mT)).mT
        less = self.matrix - gain @ product
        matrix = less - (less @ rows.mT) @ gain.mT + gain @ gain.mT
        return replace(self, matrix=_symmetric(matrix)), gain @ residual


def _sound_root(matrix: Tensor) -> Tensor:
    """The Cholesky factor of I + a positive semidefinite matrix.

    Raises:
        LinAlgError: where it is not finite.
    """
    root = root_of_one_plus(matrix)
    if not root.isfinite().all():
        raise torch.linalg.LinAlgError("a product of the Jacobian overflows")
    return root


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
