"""What the caller should know, by name: non-finite gradients, roots that were kept, residuals of the last solves."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from .checks import check_choice
from .members import gradients_of, picked
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


_ON_CPU, _LAYOUT = attrgetter("is_cpu"), attrgetter("layout")

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
        parameters: all that have gradients, as long as they do.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._large: list[int] = []
        small: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        for place, one in enumerate(self._parameters):
            if one.numel() > _SMALL or one.ndim == 0:
                self._large.append(place)
            else:
                small.setdefault((one.dtype, one.shape[1:]), []).append(place)
        self._small = [
            (places, torch.empty(sum(len(self._parameters[place]) for place in places), *rest, dtype=dtype))
            for (dtype, rest), places in small.items()
        ]

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(copies.numel() * copies.element_size() for _, copies in self._small)

    def holds(self) -> bool:
        """Whether all is well for sure."""
        gradients = [one for one in gradients_of(self._parameters) if one is not None]
        if len(gradients) < len(self._parameters) or not all(map(_ON_CPU, gradients)):
            return False
        if not set(map(_LAYOUT, gradients)) <= {torch.strided}:
            return False
        large = [gradients[place] for place in self._large]
        if not all(map(Tensor.is_contiguous, large)):
            return False
        flat = [one.view(-1) for one in large]
        for places, copies in self._small:
            torch.cat(picked(gradients, places), out=copies)
            flat.append(copies.view(-1))
        return all(math.isfinite(float(torch.dot(one, one))) for one in flat)


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
