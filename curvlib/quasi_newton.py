"""Quasi-Newton estimates of inverses: of a Jacobian by Broyden's updates, of a Hessian by those of BFGS and L-BFGS.

The solvers of :mod:`curvlib.solving` make them; what they have learnt while they solved stays of use:
:mod:`curvlib.implicit` differentiates with it. The batched updates at the end are those of K-BFGS' blocks, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_count, check_number


class BroydenInverse:
    """B⁻¹ = -I + U Vᵀ, an estimate of the inverse of a Jacobian, for every sample of a batch.

    It holds at most ``memory`` pairs of a column of U and one of V; a new pair takes the place of the oldest, which is
    dropped *before* the new one is computed, so that the last condition asked for holds exactly. (Authors' code,
    ``broyden.py``, computes the new pair with the oldest still there and then overwrites it.)

    Args:
        samples: n.
        size: d, the entries of a sample.
        memory: most pairs of a sample, from 1.
        like: of the dtype and on the device that the estimate shall have.

    Raises:
        ValueError: for counts that are none.

    Source: Broyden 1965; Ramzi et al. 2022 (SHINE), whose code writes the estimate in this form.
    """

    def __init__(self, samples: int, size: int, memory: int, like: Tensor) -> None:
        for name, value in (("samples", samples), ("size", size), ("memory", memory)):
            check_count(name, value)
        self.left = like.new_zeros(samples, memory, size)
        self.right = like.new_zeros(samples, memory, size)
        self.updates = 0

    @property
    def memory(self) -> int:
        """Most pairs of a sample."""
        return self.left.shape[1]

    def transposed(self) -> BroydenInverse:
        """B⁻ᵀ = -I + V Uᵀ, with a memory of its own."""
        other = BroydenInverse(*self._sizes(), self.left)
        other.left, other.right, other.updates = self.right.clone(), self.left.clone(), self.updates
        return other

    def widened(self, memory: int) -> BroydenInverse:
        """The same estimate with room for more pairs.

        Args:
            memory: most pairs of a sample; no fewer than now.

        Raises:
            ValueError: where it is fewer.
        """
        check_number("memory", memory, low=self.memory)
        samples, size, _ = self._sizes()
        other = BroydenInverse(samples, size, memory, self.left)
        turn = -(self.updates % self.memory) if self.updates > self.memory else 0  # the oldest comes first
        other.left[:, : self.memory] = self.left.roll(turn, 1)
        other.right[:, : self.memory] = self.right.roll(turn, 1)
        other.updates = min(self.updates, self.memory)
        return other

    def _sizes(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.left.shape[2], self.left.shape[1]

    def apply(self, vectors: Tensor) -> Tensor:
        """B⁻¹ x: ``[n, d]`` -> ``[n, d]``."""
        return self._product(self.left, self.right, vectors)

    def apply_transposed(self, vectors: Tensor) -> Tensor:
        """B⁻ᵀ x: ``[n, d]`` -> ``[n, d]``."""
        return self._product(self.right, self.left, vectors)

    def _product(self, left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
        used = min(self.updates, self.memory)
        inner = torch.bmm(right[:, :used], vectors.unsqueeze(2))
        return torch.bmm(left[:, :used].mT, inner).squeeze(2) - vectors

    def dense(self) -> Tensor:
        """B⁻¹, ``[n, d, d]``."""
        return self.left.mT @ self.right - torch.eye(self.left.shape[2], dtype=self.left.dtype, device=self.left.device)

    def update(self, step: Tensor, change: Tensor, where: Tensor | None = None) -> None:
        """Make it the nearest estimate with B⁻¹ y = s, by Broyden's first, or good, update.

        ::

            B⁻¹ <- B⁻¹ + (s - B⁻¹y) vᵀ / vᵀy,       vᵀ = sᵀB⁻¹

        A sample keeps its pairs where vᵀy is zero to rounding, or the new pair would not be finite.

        Args:
            step: s, ``[n, d]``.
            change: y, of the function along s, ``[n, d]``.
            where: which samples, ``[n]`` bool; all by default.
        """
        place = self._make_room(where)
        right = self.apply_transposed(step)
        left = step - self.apply(change)
        self._put(place, left, right, (right * change).sum(1), right.norm(dim=1) * change.norm(dim=1), where)

    def update_adjoint(self, direction: Tensor, image: Tensor, where: Tensor | None = None) -> None:
        """Make it the nearest estimate with σᵀB = σᵀJ, by the adjoint Broyden update.

        ::

            B⁻¹ <- B⁻¹ + B⁻¹σ (σ - b)ᵀ / bᵀσ,       bᵀ = σᵀJ B⁻¹

        (Schlenkrich, Griewank & Walther 2010, as in the authors' ``adj_broyden.py``.)

        Args:
            direction: σ, ``[n, d]``.
            image: Jᵀσ, ``[n, d]``.
            where: which samples, ``[n]`` bool; all by default.
        """
        place = self._make_room(where)
        pulled = self.apply_transposed(image)
        scale = pulled.norm(dim=1) * direction.norm(dim=1)
        self._put(place, self.apply(direction), direction - pulled, (pulled * direction).sum(1), scale, where)

    def _make_room(self, where: Tensor | None) -> tuple[int, Tensor, Tensor]:
        """Take the oldest pair out, and hand it over for samples that will want it back."""
        slot = self.updates % self.memory
        oldest = slot, self.left[:, slot].clone(), self.right[:, slot].clone()
        self.right[:, slot] = 0
        self.updates += 1
        return oldest

    def _put(
        self,
        place: tuple[int, Tensor, Tensor],
        left: Tensor,
        right: Tensor,
        divisor: Tensor,
        scale: Tensor,
        where: Tensor | None,
    ) -> None:
        slot, old_left, old_right = place
        sound = divisor.abs() > torch.finfo(divisor.dtype).eps * scale
        right = right / torch.where(sound, divisor, 1.0).unsqueeze(1)
        sound &= left.isfinite().all(1) & right.isfinite().all(1)
        if where is not None:
            sound &= where
        self.left[:, slot] = torch.where(sound.unsqueeze(1), left, old_left)
        self.right[:, slot] = torch.where(sound.unsqueeze(1), right, old_right)


class LbfgsInverse:
    """H, an estimate of the inverse of a Hessian from the last pairs of a step s and a change y of the gradient.

    ::

        H <- (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ,     ρ = 1 / sᵀy,      from H = γI, γ = sᵀy / yᵀy of the newest pair

    (Nocedal & Wright 2006, Algorithm 7.4 and (7.20); authors' code of SHINE, ``lbfgs.py``, starts from γ = 1.)

    Args:
        memory: most pairs; the oldest goes first.

    Raises:
        ValueError: for a memory that is no whole number from 1.
    """

    def __init__(self, memory: int) -> None:
        check_count("memory", memory)
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, step: Tensor, change: Tensor) -> bool:
        """Take a pair, unless sᵀy is not positive beyond rounding; says whether it did.

        Args:
            step: s, ``[d]``.
            change: y, ``[d]``.
        """
        inner = step @ change
        if not bool(inner > torch.finfo(step.dtype).eps * step.norm() * change.norm()) or not bool(inner.isfinite()):
            return False
        self.pairs = [*self.pairs, (step, change)][-self.memory :]
        return True

    @property
    def scale(self) -> float:
        """γ; 1 without a pair."""
        if not self.pairs:
            return 1.0
        step, change = self.pairs[-1]
        return float(step @ change / (change @ change))

    def apply(self, vector: Tensor) -> Tensor:
        """H x, in the compact form that K-BFGS(L) has, too: ``[d]`` -> ``[d]``.

        H is γ times the estimate from the identity with the steps s/γ.
        """
        if not self.pairs:
            return vector
        steps, changes = (torch.stack(one)[None] for one in zip(*self.pairs, strict=True))
        column = vector[None, :, None]
        return (self.scale * (column + compact(steps / self.scale, changes, column))).view(vector.shape)

    def dense(self, like: Tensor) -> Tensor:
        """H, ``[d, d]``, by the recursion.

        Args:
            like: ``[d]``, of the dtype and on the device that H shall have.
        """
        identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
        dense = self.scale * identity
        for step, change in self.pairs:
            left = identity - torch.outer(step, change) / (step @ change)
            dense = left @ dense @ left.mT + torch.outer(step, step) / (step @ change)
        return dense


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """A vector for every matrix, ``[B, f, g]``, ``[B, g]`` -> ``[B, f]``."""
    return torch.bmm(matrices, vectors[..., None])[..., 0]


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products, ``[..., f]`` -> ``[..., 1]``."""
    return (left * right).sum(-1, keepdim=True)


def usable(s: Tensor, y: Tensor) -> Tensor:
    """Which pairs may update an inverse, ``[B]``."""
    product = dot(s, y)[..., 0]
    finite = s.isfinite().all(-1) & y.isfinite().all(-1) & (1 / product).isfinite()
    return (product > 0) & finite


def bfgs_(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """H <- H + (ρ² yᵀHy + ρ) s sᵀ - ρ (s (Hy)ᵀ + (Hy) sᵀ), ρ = 1 / sᵀy, in place where the pair can be used.

    Returns:
        Which are finite then, ``[B]``; others stay as they were.
    """
    good = usable(s, y)[:, None]
    s, y = torch.where(good, s, 0.0), torch.where(good, y, 0.0)
    rho = torch.where(good, 1 / torch.where(good, dot(s, y), 1.0), 0.0)
    hy = times(inverse, y)
    along = (rho**2 * dot(y, hy) + rho) * s - rho * hy  # H + along sᵀ - ρ s (Hy)ᵀ
    new = inverse.baddbmm(along[..., None], s[:, None]).baddbmm_(s[..., None], (rho * hy)[:, None], alpha=-1)
    sound = new.flatten(1).isfinite().all(1)
    inverse.copy_(torch.where(sound[:, None, None], new, inverse))
    return sound


def compact(s: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """(H - I) times columns, with H the BFGS inverse of pairs in order of age, from the identity (Byrd et al. 1994, Th. 2.2).

    Args:
        s: ``[B, W, f]``; rows that are zero are no pairs.
        y: ``[B, W, f]``.
        columns: ``[B, f, c]``.
    """
    products = s @ y.mT  # W W
    diagonal = products.diagonal(dim1=1, dim2=2)
    upper = products.triu() + torch.where(diagonal == 0, 1.0, 0.0).diag_embed()
    first, second = s @ columns, y @ columns
    inner = torch.linalg.solve_triangular(upper, first, upper=True)
    middle = (y @ y.mT + diagonal.diag_embed()) @ inner - second
    top = torch.linalg.solve_triangular(upper.mT, middle, upper=False)
    return s.mT @ top - y.mT @ inner
