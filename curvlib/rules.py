"""Rules: what becomes of the preconditioned direction. Momentum, grafting, clipping.

Everything here works on lists of tensors. A list is *packed* when it holds one tensor ``[n, *shape]`` for n operands, and
otherwise holds one tensor for each operand. A *gate* is a 0-d bool tensor on the device: where it is False nothing that
is averaged changes (see :func:`gated`), without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import number
from .moments import Weight
from .precision import flush_subnormals_
from .recipe import Clip, Grafting, Momentum

Tensors = list[Tensor] | tuple[Tensor, ...]


def gated(value: float, neutral: float, gate: Tensor | None) -> Weight:
    """``value`` where the gate is open, ``neutral`` where it is shut; without a gate just ``value``."""
    if gate is None:
        return value
    wanted, harmless = (gate.new_full((), one, dtype=torch.float64) for one in (value, neutral))
    return torch.where(gate, wanted, harmless)


def apply_momentum(
    buffer: Tensors, value: Tensors, rule: Momentum, step: int, packed: bool, gate: Tensor | None
) -> Tensors:
    """Average ``value`` into ``buffer`` and return what is to be used in its place.

    Args:
        buffer: the running average, updated in place.
        value: gradients or directions; not changed.
        rule: kind and strength.
        step: from 0.
        packed: see the module; a packed average is about to be multiplied by matrices, and is kept from subnormals.
        gate: see the module.
    """
    beta = number(rule.beta)
    first = rule.kind == "heavy-ball" and step == 0
    gain = 1.0 if first else 1 - (beta if rule.kind == "ema" else number(rule.dampening))
    mixed: Tensors | None = None
    if rule.mix is not None:
        mixed = torch._foreach_add(torch._foreach_mul(buffer, number(rule.mix)), value, alpha=1 - number(rule.mix))
    if packed and gate is None:
        for average, new in zip(buffer, value, strict=True):
            flush_subnormals_(_averaged(average, new, beta, gain))
    else:
        torch._foreach_mul_(buffer, gated(beta, 1.0, gate))
        torch._foreach_add_(buffer, value, alpha=gain)
        for one in buffer if packed else ():
            flush_subnormals_(one)
    if mixed is not None:
        return mixed
    result: Tensors = buffer
    if rule.nesterov:
        ahead = gain if rule.kind == "ema" else 1.0
        result = torch._foreach_add(torch._foreach_mul(buffer, beta), value, alpha=ahead)
    if rule.kind == "ema" and rule.debias:
        result = torch._foreach_div(result, 1 - beta ** (step + 1))
    return result


def _averaged(average: Tensor, new: Tensor, beta: float, gain: float) -> Tensor:
    """β m + gain g, in place; in one pass over memory where there is an operation for it."""
    if gain == 1:
        return torch.add(new, average, alpha=beta, out=average)
    if gain == 1 - beta:
        return average.lerp_(new, gain)
    return average.mul_(beta).add_(new, alpha=gain)


def graft(
    direction: Tensors,
    reference: Tensors,
    gradient: Tensors,
    second: Tensors | None,
    rule: Grafting,
    step: int,
    packed: bool,
    gate: Tensor | None,
) -> Tensors:
    """The direction with the norm of a diagonal method's, operand by operand.

    Args:
        direction: the preconditioned directions; not changed.
        reference: what was preconditioned (the gradient, or its momentum).
        gradient: whose squares the diagonal method averages.
        second: that average, updated in place; ``None`` for ``"sgd"``.
        rule: the diagonal method.
        step: from 0.
        packed: see the module.
        gate: see the module.
    """
    target: Tensors = reference
    if second is not None:
        beta = 1.0 if rule.kind == "adagrad" else number(rule.beta)
        gain = 1.0 if rule.kind == "adagrad" else 1 - beta
        torch._foreach_mul_(second, gated(beta, 1.0, gate))
        torch._foreach_addcmul_(second, gradient, gradient, value=gain)
        scale = 1 - beta ** (step + 1) if rule.kind == "adam" else 1.0
        target = list(torch._foreach_div(second, scale))
        torch._foreach_sqrt_(target)
        torch._foreach_add_(target, number(rule.eps))
        for one, denominator in zip(reference, target, strict=True):
            torch.div(one, denominator, out=denominator)
    wanted, present = operand_norms(target, packed), operand_norms(direction, packed)
    del target
    ratios = [
        torch.where(have > 0, want / have, 0.0).to(one.dtype)
        for want, have, one in zip(wanted, present, direction, strict=True)
    ]
    if packed:
        ratios = [ratio.view(-1, *[1] * (one.ndim - 1)) for ratio, one in zip(ratios, direction, strict=True)]
    scaled: Tensors = torch._foreach_mul(direction, ratios)
    return scaled


_RUN = 1 << 12


def operand_norms(tensors: Tensors, packed: bool) -> list[Tensor]:
    """The Frobenius norm of every operand: ``[n]`` for a packed tensor, 0-d otherwise."""
    # Sums of squares are taken in double precision: an almost undamped direction may be large before it is grafted.
    if packed:
        return [_row_norms(one.flatten(1) if one.ndim > 1 else one[:, None]) for one in tensors]
    return [torch.linalg.vector_norm(one, dtype=torch.float64) for one in tensors]


def _row_norms(rows: Tensor) -> Tensor:
    quick = _quick_norms(rows) if rows.is_cpu and rows.dtype == torch.float32 else None
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) if quick is None else quick


def _quick_norms(rows: Tensor) -> Tensor | None:
    """In single precision on a CPU, six to thirty times as fast; or none, where a square leaves its range."""
    whole = rows.shape[1] // _RUN * _RUN  # in runs, since rounding adds up along them
    runs = [torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _RUN)), dim=2)] if whole else []
    runs += [torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)] if whole < rows.shape[1] else []
    norms = torch.linalg.vector_norm(torch.cat(runs, 1), dim=1) if runs else rows.new_zeros(len(rows))
    return norms if ((norms > 1e-15) & (norms < 1e15)).all() else None


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """The inner product, without a copy where both lie alike."""
    if one.is_contiguous() and other.is_contiguous():
        return torch.dot(one.flatten(), other.flatten())
    if one.ndim == 2:
        return torch.linalg.vecdot(one, other).sum()
    return (one * other).sum()


def clip_size(clip: Clip, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Weight]]) -> Tensor:
    """What a clip limits: the squared norm of all directions, or lr² Σ directionᵀ gradient; 0-d, on the first one's device.

    Args:
        clip: kind and limit.
        pairs: (directions, what was preconditioned, lr) of all parameters that share the clip.
    """
    device = next((one.device for directions, _, _ in pairs for one in directions), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    for directions, gradients, lr in pairs:
        for direction, gradient in zip(directions, gradients, strict=True):
            other = direction if clip.kind == "norm" else gradient.to(direction.dtype)
            size = _inner(direction, other).to(total)
            total = total + (size if clip.kind == "norm" else size * lr**2)
    return total


def clip_scale(clip: Clip, size: Tensor) -> Tensor:
    """The one factor, at most 1, by which all directions of a clip of this size are shrunk; 0-d."""
    limit = number(clip.limit)
    ratio = limit / size.sqrt() if clip.kind == "norm" else (limit / size.clamp_min(0)).sqrt()
    return torch.where(ratio < 1, ratio, torch.ones_like(ratio))
