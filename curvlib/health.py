"""What the caller should know, by name: non-finite gradients, roots that were kept, residuals of the last solves."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_choice
from .storage import Bucket

_SMALL = 1 << 13
"""Entries up to which tensors are copied side by side, to be looked at together."""


class NonFiniteGradient(FloatingPointError):
    """A gradient holds NaN or infinity; parameters and state are as before the step.

    Attributes:
        names: the parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"non-finite gradient in {', '.join(names)}; nothing was changed. Lower lr, clip gradients, skip this batch, "
            "or set optimizer.on_nonfinite = 'mask' to skip such steps"
        )


def raises(mode: str, device: torch.device) -> bool:
    """Whether non-finite gradients on a device are an error in this mode, instead of a masked step."""
    return mode == "raise" or (mode == "auto" and device.type == "cpu")


Named = tuple[str, Tensor, float | Tensor | None]
"""A name, a tensor, and by what this is divided before it is squared, where it is."""


def check_finite(named: Sequence[Named], mode: str, masked: dict[str, Tensor]) -> Tensor | None:
    """Report non-finite gradients by name, or return the gate that masks this step on the device.

    Args:
        named: gradients, and whose they are; where they are to be squared, the squares must be finite, too.
        mode: see :class:`~curvlib.CurvatureOptimizer`, ``on_nonfinite``.
        masked: name -> how many steps it masked, counted on the device.

    Raises:
        NonFiniteGradient: where the mode says so.
    """
    check_choice("on_nonfinite", mode, ("auto", "raise", "mask", "off"))
    named = [one for one in named if one[1].numel()]
    if not named or mode == "off":
        return None
    gradients = [gradient for _, gradient, _ in named]
    if raises(mode, gradients[0].device):
        # A finite Euclidean norm is a proof; only a square that overflows needs a second look.
        if not _finite(gradients, 2).all():
            pairs = zip(_fits(named).tolist(), _finite(gradients, torch.inf).tolist(), strict=True)
            bad = [
                name if not finite else f"{name} (its square overflows)"
                for (name, _, divisor), (fits, finite) in zip(named, pairs, strict=True)
                if not finite or (divisor is not None and not fits)
            ]
            if bad:
                raise NonFiniteGradient(bad)
        return None
    flags: dict[str, Tensor] = {}
    squared = [one for one in named if one[2] is not None]
    others = [one for one in named if one[2] is None]
    for some, finite in ((squared, _fits(squared)), (others, _finite([one for _, one, _ in others], torch.inf))):
        for (name, _, _), good in zip(some, finite, strict=True):
            flags[name] = flags[name] & good.to(flags[name].device) if name in flags else good
    for name, good in flags.items():
        masked[name] = masked.get(name, 0) + ~good
    found = list(flags.values())
    return torch.stack([flag.to(found[0].device) for flag in found]).all()


class Proof:
    """The quickest proof on a CPU that gradients and their squares are finite; where it fails, they may still be.

    Large tensors are multiplied by themselves; small ones together, after they are copied side by side.

    Args:
        parameters: that have the gradients; kept from step to step.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._large = [one for one in parameters if one.numel() > _SMALL]
        small: dict[torch.dtype, list[Tensor]] = {}
        for one in parameters:
            if one.numel() <= _SMALL:
                small.setdefault(one.dtype, []).append(one)
        self._small = [(mine, *_side_by_side(mine)) for mine in small.values()]

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(flat.numel() * flat.element_size() for _, flat, _ in self._small)

    def holds(self) -> bool:
        """Whether all is well for sure."""
        large = [one.grad for one in self._large if one.grad is not None]
        small = [[one.grad for one in mine if one.grad is not None] for mine, _, _ in self._small]
        everything = [one for some in (large, *small) for one in some]
        if not all([one.is_cpu and one.layout is torch.strided for one in everything]):
            return False
        if not all([one.is_contiguous() for one in large]):
            return False
        sums = [torch.dot(flat, flat) for flat in (one.view(-1) for one in large)]
        for (_, flat, windows), gradients in zip(self._small, small, strict=True):
            torch._foreach_copy_(windows, gradients)
            sums.append(torch.dot(flat, flat))
        return all(math.isfinite(float(one)) for one in sums)


def _side_by_side(like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    sizes = [one.numel() for one in like]
    flat = torch.empty(sum(sizes), dtype=like[0].dtype)
    return flat, [window.view(one.shape) for window, one in zip(flat.split(sizes), like, strict=True)]


def _finite(gradients: list[Tensor], order: float) -> Tensor:
    """Whether the norm of each gradient is finite, on the first one's device."""
    if not gradients:
        return torch.ones(0, dtype=torch.bool)
    norms = torch._foreach_norm(gradients, order)
    if any([one.dtype is not norms[0].dtype or one.device != norms[0].device for one in norms]):
        norms = tuple(one.to(norms[0].device, torch.float64) for one in norms)
    return torch.stack(norms).isfinite()


def _fits(named: Sequence[Named]) -> Tensor:
    """Whether the squares of each tensor, divided as it will be, add up to a finite number."""
    gradients = [gradient for _, gradient, _ in named]
    divisors = [1.0 if divisor is None else divisor for _, _, divisor in named]
    if all(not isinstance(one, Tensor) and one == 1.0 for one in divisors):
        return _finite(gradients, 2)
    flags = []
    for norm, gradient, divisor in zip(
        torch._foreach_norm(gradients, 2, torch.float64), gradients, divisors, strict=True
    ):
        largest = torch.finfo(torch.promote_types(gradient.dtype, torch.float32)).max ** 0.5
        flags.append(norm / (divisor.to(norm) if isinstance(divisor, Tensor) else divisor) < largest)
    return torch.stack([flag.to(flags[0].device) for flag in flags])


@dataclass(frozen=True)
class Health:
    """The state of an optimizer's roots and steps.

    Attributes:
        residual: parameter -> largest relative residual of its last solves.
        kept: parameter -> how often a failed root was replaced by the previous one; only those above zero.
        masked: parameter -> how many steps its non-finite gradient masked; only those above zero.
    """

    residual: Mapping[str, float]
    kept: Mapping[str, int]
    masked: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether nothing was kept or masked."""
        return not self.kept and not self.masked

    def __str__(self) -> str:
        worst = max(self.residual, key=self.residual.__getitem__, default=None)
        lines = [f"largest residual {self.residual[worst]:.1e} ({worst})" if worst is not None else "no roots solved"]
        lines += [f"{name}: previous root kept {count} times" for name, count in self.kept.items()]
        lines += [f"{name}: non-finite gradient masked {count} steps" for name, count in self.masked.items()]
        return "\n".join(lines)


def health_of(buckets: Iterable[Bucket], masked: Mapping[str, Tensor]) -> Health:
    """Read the diagnostics of all buckets; this waits for the device."""
    residual: dict[str, float] = {}
    kept: dict[str, int] = {}
    for bucket in buckets:
        for name, values in bucket.state.items():
            if not name.startswith(("residual_", "kept_")):
                continue
            for unit, value in zip(bucket.units, values, strict=True):
                if name.startswith("residual_"):
                    worst = float(value.max()) if value.numel() else 0.0
                    residual[unit.name] = max(worst, residual.get(unit.name, 0.0))
                else:
                    kept[unit.name] = kept.get(unit.name, 0) + int(value.sum())
    counts = {name: int(torch.as_tensor(count)) for name, count in masked.items()}
    return Health(
        residual,
        {name: count for name, count in kept.items() if count},
        {name: count for name, count in counts.items() if count},
    )


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the caller's own code: the nearest that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("curvlib", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, level)
