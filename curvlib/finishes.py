"""Finishes that methods share: signs, clipped and scaled steps, orthogonal matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .checks import Number, check_choice, check_count, check_number, number
from .finish import Finish

QUINTIC = ((3.4445, -4.7750, 2.0315),)
"""Jordan et al. 2024: as fast as possible; singular values end between about 0.7 and 1.2."""

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Amsel et al. 2025: the best polynomial for what each iteration is given; the last one repeats."""

_SAFETY = 1.01  # so that rounding leaves no singular value above the interval that a polynomial is made for


@dataclass(frozen=True)
class Sign(Finish):
    """The sign of every entry."""

    elementwise: ClassVar[bool] = True

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """One of -1, 0 and 1 for every entry."""
        return torch._foreach_sign(list(direction))


@dataclass(frozen=True)
class ClipEntries(Finish):
    """Every entry of scale · d, cut off at ± limit.

    Args:
        limit: largest absolute value.
        scale: what directions are multiplied by first.
    """

    elementwise: ClassVar[bool] = True
    limit: Number = 1.0
    scale: Number = 1.0

    def __post_init__(self) -> None:
        check_number("limit", self.limit, strict=True)
        check_number("scale", self.scale, strict=True)

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Directions whose entries lie within the limit."""
        scaled = torch._foreach_mul(list(direction), number(self.scale))
        return torch._foreach_clamp_max(torch._foreach_clamp_min(scaled, -number(self.limit)), number(self.limit))


@dataclass(frozen=True)
class ClipRms(Finish):
    """d / max(1, RMS(d) / limit) for every parameter (Shazeer & Stern 2018, §6).

    Args:
        limit: largest root mean square.
    """

    limit: Number = 1.0

    def __post_init__(self) -> None:
        check_number("limit", self.limit, strict=True)

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Directions that are no longer than the limit."""
        sizes = [size / number(self.limit) for size in _rms(direction)]
        return torch._foreach_div(list(direction), [size.clamp_min(1.0) for size in sizes])


@dataclass(frozen=True)
class ParameterScale(Finish):
    """max(floor, RMS(w)) d for every parameter (Shazeer & Stern 2018, §8).

    Args:
        floor: least scale.
    """

    floor: Number = 1e-3

    def __post_init__(self) -> None:
        check_number("floor", self.floor)

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Directions in proportion to their parameters."""
        return torch._foreach_mul(list(direction), [size.clamp_min(number(self.floor)) for size in _rms(parameters)])


def _rms(tensors: Sequence[Tensor]) -> list[Tensor]:
    norms = torch._foreach_norm(list(tensors))
    return [norm / math.sqrt(max(1, one.numel())) for norm, one in zip(norms, tensors, strict=True)]


@dataclass(frozen=True)
class Orthogonal(Finish):
    """The nearest (semi-)orthogonal matrix U Vᵀ of every direction U Σ Vᵀ, by an odd polynomial iteration.

    With X the direction over its Frobenius norm, axes from the second merged (Jordan et al. 2024, Muon)::

        X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X

    Equal shapes are iterated in one batch.

    Args:
        iterations: how many.
        coefficients: ``"quintic"``: one (a, b, c) for all of them; ``"polar-express"``: the best for each.
        scale: what the result is multiplied by, for a matrix of r rows and c columns: ``"spectral"``: max(1, r / c)^½, so
            that the step has the same effect on outputs whatever the width; ``"adam"``: 0.2 max(r, c)^½, about the root mean
            square of Adam's steps (Liu et al. 2025); ``None``: 1.
        dtype: ``"bfloat16"`` iterates in it, as the authors do; ``None`` in the direction's.
        eps: least norm that is divided by.
    """

    iterations: int = 5
    coefficients: Literal["quintic", "polar-express"] = "quintic"
    scale: Literal["spectral", "adam"] | None = "spectral"
    dtype: Literal["bfloat16"] | None = "bfloat16"
    eps: float = 1e-7

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_choice("coefficients", self.coefficients, ("quintic", "polar-express"))
        check_choice("scale", self.scale, ("spectral", "adam", None))
        check_choice("dtype", self.dtype, ("bfloat16", None))
        check_number("eps", self.eps, strict=True)

    def __call__(
        self, direction: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Orthogonal directions; what has fewer than two dimensions is left alone."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, one in enumerate(direction):
            if one.ndim > 1 and one.numel():
                alike[one.shape[0], one.numel() // one.shape[0]].append(place)
        result = list(direction)
        for (rows, columns), places in alike.items():
            batch = torch.stack([direction[place].reshape(rows, columns) for place in places])
            solved = self._iterate(batch).to(batch.dtype) * self._scale(rows, columns)
            for place, one in zip(places, solved, strict=True):
                result[place] = one.view(direction[place].shape)
        return result

    def _scale(self, rows: int, columns: int) -> float:
        if self.scale is None:
            return 1.0
        return max(1.0, rows / columns) ** 0.5 if self.scale == "spectral" else 0.2 * max(rows, columns) ** 0.5

    def _iterate(self, batch: Tensor) -> Tensor:
        """``[n, r, c]`` -> the same, orthogonal."""
        x = batch.to(torch.bfloat16) if self.dtype == "bfloat16" else batch
        wide = x.mT if x.shape[1] > x.shape[2] else x
        express = self.coefficients == "polar-express"
        table = POLAR_EXPRESS if express else QUINTIC
        x = wide / (wide.norm(dim=(1, 2), keepdim=True) * (_SAFETY if express else 1.0)).clamp_min(self.eps)
        for number_ in range(self.iterations):
            a, b, c = table[min(number_, len(table) - 1)]
            if express and number_ < len(table) - 1:
                a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if batch.shape[1] > batch.shape[2] else x
