"""Signals: what a layer's weight is made of, in one form for every layer kind.

The gradient of one example is a sum over shared positions t of products of what came in and what went out::

    g[n, …] = Σ_t δ[n, t, output axes] a[n, t, input axes]

with a the layer's input and δ the gradient of its output. A position is a place of a sequence, of an image, or one of
several calls. An axis that both carry (a group, a norm's channel) is multiplied entry by entry. A :class:`Tap` says how a
layer kind is read in this form, and users register their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Index:
    """Inputs that choose one entry of an axis each: a one-hot tensor ``[n, t, size]`` that is not written out.

    Attributes:
        where: ``[n, t]``, whole numbers; a negative one chooses nothing.
        size: entries of the axis.
    """

    where: Tensor
    size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The one-hot tensor."""
        chosen = torch.zeros((*self.where.shape, self.size), dtype=dtype, device=self.where.device)
        return chosen.scatter_(-1, self.where.clamp_min(0)[..., None], (self.where >= 0).to(dtype)[..., None])


Input = Tensor | Index


@dataclass(frozen=True)
class Tap:
    """How a layer kind is read.

    Args:
        output: axes of δ, among those of the weight.
        input: axes of a.
        read_output: (module, gradient of its output) -> δ ``[n, t, *output axes]``.
        read_input: (module, its input) -> a ``[n, t, *input axes]``.
        weight: the parameter that is the product of both; every other parameter of the layer that has δ's axes is a
            bias, the sum of δ.
        available: (module) -> why it can't be read, or an empty text.
    """

    output: str
    input: str
    read_output: Callable[[Any, Tensor], Tensor]
    read_input: Callable[[Any, Tensor], Input]
    weight: str = "weight"
    available: Callable[[Any], str] = lambda module: ""


@dataclass(frozen=True)
class Signal:
    """What one call of a layer, or several calls with the same examples, says of a parameter.

    Attributes:
        delta: ``[n, t, *delta_axes]``, the gradient of the loss of the whole batch at the output.
        delta_axes: their names.
        input: ``[n, t, *input_axes]``; ``None`` for a bias, whose input is 1.
        input_axes: their names.
        weight: ``[n, t]``, 1 where a position counts and 0 where it is padding; ``None`` where all count.
        gain: how many examples (or positions) each one stands for, after thinning.
        constant: one more entry of the input's last axis that is not written out, the input of a joined bias.
    """

    delta: Tensor
    delta_axes: tuple[str, ...]
    input: Input | None = None
    input_axes: tuple[str, ...] = ()
    weight: Tensor | None = None
    gain: float = 1.0
    constant: float | None = None

    @property
    def positions(self) -> int:
        """Shared positions of each example."""
        return self.delta.shape[1]

    def written(self) -> Signal:
        """With the constant entry written out."""
        if self.constant is None or not isinstance(self.input, Tensor):
            return self
        column = self.input.new_full((*self.input.shape[:-1], 1), self.constant)
        return replace(self, input=torch.cat([self.input, column], -1), constant=None)

    def cast(self, dtype: torch.dtype) -> Signal:
        """In the dtype of the statistics, with padding set to zero."""
        if self.weight is not None and self.constant is not None:
            return self.written().cast(dtype)
        delta, given = self.delta.to(dtype), self.input
        if isinstance(given, Tensor):
            given = given.to(dtype)
        if self.weight is not None:
            weight = self.weight.to(dtype)
            delta = delta * _over(weight, delta)
            if isinstance(given, Index):
                given = replace(given, where=torch.where(self.weight > 0, given.where, -1))
            elif given is not None:
                given = given * _over(weight, given)
        return replace(self, delta=delta, input=given)

    def part(self, first: int, last: int) -> Signal:
        """Some of the examples."""
        return self._map(lambda one: one[first:last])

    def thinned(self, stride: int, offset: int, over_positions: bool) -> Signal:
        """Every ``stride``-th example, or position where examples have several and these are taken one by one."""
        dim = 1 if over_positions and self.positions > 1 else 0
        total = self.delta.shape[dim]
        stride = min(stride, total)
        if stride <= 1:
            return self
        first = offset % stride
        thin = self._map(lambda one: one[first::stride] if dim == 0 else one[:, first::stride])
        return replace(thin, gain=self.gain * total / thin.delta.shape[dim])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        given = self.input
        if isinstance(given, Index):
            given = replace(given, where=change(given.where))
        elif given is not None:
            given = change(given)
        weight = None if self.weight is None else change(self.weight)
        return replace(self, delta=change(self.delta), input=given, weight=weight)


def _weight(signal: Signal) -> Tensor:
    return signal.delta.new_ones(signal.delta.shape[:2]) if signal.weight is None else signal.weight


def _over(weight: Tensor, value: Tensor) -> Tensor:
    return weight.view(*weight.shape, *[1] * (value.ndim - 2))


def joined(signals: Sequence[Signal]) -> Signal:
    """Calls with the same examples, as more positions.

    Raises:
        ValueError: where the batches differ.
    """
    if len(signals) == 1:
        return signals[0]
    signals = [one.written() for one in signals]
    first = signals[0]
    sizes = sorted({one.delta.shape[0] for one in signals})
    if len(sizes) > 1:
        raise ValueError(f"was called with batches of {' and '.join(map(str, sizes))} in one backward pass")
    given: Input | None = None
    chosen = [one.input.where for one in signals if isinstance(one.input, Index)]
    dense = [one.input for one in signals if isinstance(one.input, Tensor)]
    if isinstance(first.input, Index):
        given = replace(first.input, where=torch.cat(chosen, 1))
    elif first.input is not None:
        given = torch.cat(dense, 1)
    weight = None
    if any(one.weight is not None for one in signals):
        weight = torch.cat([_weight(one) for one in signals], 1)
    return replace(first, delta=torch.cat([one.delta for one in signals], 1), input=given, weight=weight)


# -- readers ----------------------------------------------------------------------------------------------------------


def features_last(value: Tensor, features: int = 1) -> Tensor:
    """``[n, positions…, features…]`` -> ``[n, t, features…]``; without an example dimension n is 1."""
    if value.ndim == features:
        return value[None, None]
    if value.ndim == features + 1:
        return value[:, None]
    return value.flatten(1, value.ndim - features - 1)


def channels_first(value: Tensor, spatial: int | None = None) -> Tensor:
    """``[n, channels, positions…]`` -> ``[n, t, channels]``."""
    value = value[None] if spatial is not None and value.ndim == spatial + 1 else value
    return value.flatten(2).transpose(1, 2) if value.ndim > 2 else value[:, None]


def patches(
    value: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    mode: str,
) -> Tensor:
    """What each output position of a convolution sees: ``[n, channels, *positions, *kernel]``, a view."""
    value = F.pad(value, list(padding), mode="constant" if mode == "zeros" else mode) if any(padding) else value
    value = value.contiguous()
    n, channels, *sizes = value.shape
    count = [
        (size - reach * (width - 1) - 1) // step + 1
        for size, width, step, reach in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    strides = value.stride()
    steps = [one * step for one, step in zip(strides[2:], stride, strict=True)]
    reaches = [one * reach for one, reach in zip(strides[2:], dilation, strict=True)]
    return value.as_strided((n, channels, *count, *kernel), (*strides[:2], *steps, *reaches))


def _conv_input(module: Any, value: Tensor) -> Tensor:
    """``[n, t, (g) i, *kernel]``."""
    spatial = len(module.kernel_size)
    value = value[None] if value.ndim == spatial + 1 else value
    if module.transposed:
        seen = _upsampled(module, value)
    else:
        padding = module._reversed_padding_repeated_twice
        mode = module.padding_mode
        seen = patches(value, module.kernel_size, module.stride, module.dilation, padding, mode)
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    seen = seen.permute(order).flatten(1, spatial)  # n t channels k…
    return seen.unflatten(2, (module.groups, -1)) if module.groups > 1 else seen


def _upsampled(module: Any, value: Tensor) -> Tensor:
    """A transposed convolution is a convolution of the input with zeros between its entries, its kernel reversed."""
    spatial = len(module.kernel_size)
    spread = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], module.stride, strict=True)]
    wide = value.new_zeros((*value.shape[:2], *spread))
    steps: list[Any] = [slice(None, None, step) for step in module.stride]
    wide[(..., *steps)] = value
    padding: list[int] = []
    for dim in reversed(range(spatial)):
        edge = module.dilation[dim] * (module.kernel_size[dim] - 1) - module.padding[dim]
        padding += [edge, edge + module.output_padding[dim]]
    ones = [1] * spatial
    seen = patches(wide, module.kernel_size, ones, module.dilation, padding, "zeros")
    return seen.flip(tuple(range(-spatial, 0)))


def _conv_output(module: Any, delta: Tensor) -> Tensor:
    """``[n, t, (g) o]``."""
    flat = channels_first(delta, len(module.kernel_size))
    return flat.unflatten(2, (module.groups, -1)) if module.groups > 1 else flat


def conv_tap(module: Any) -> Tap:
    """Convolutions of any dimension, transposed or not, with groups."""
    group = "g " if module.groups > 1 else ""
    return Tap(f"{group}o", f"{group}i k...", _conv_output, _conv_input)


def _embedding_input(module: Any, value: Tensor) -> Index:
    where = features_last(value, 0)
    if module.padding_idx is not None:
        where = torch.where(where == module.padding_idx, -1, where)
    return Index(where, module.num_embeddings)


def _no_frequency(module: Any) -> str:
    return "its gradient is scaled by frequency" if module.scale_grad_by_freq else ""


def _features(module: Any) -> int:
    return len(module.normalized_shape)


def _layer_norm_input(module: Any, value: Tensor) -> Tensor:
    normal = F.layer_norm(value, module.normalized_shape, None, None, module.eps)
    return features_last(normal, _features(module))


def _rms_norm_input(module: Any, value: Tensor) -> Tensor:
    return features_last(F.rms_norm(value, module.normalized_shape, None, module.eps), _features(module))


def _group_norm_input(module: Any, value: Tensor) -> Tensor:
    return channels_first(F.group_norm(value, module.num_groups, None, None, module.eps))


def _instance_norm_input(module: Any, value: Tensor) -> Tensor:
    spatial = module._get_no_batch_dim() - 1
    value = value[None] if value.ndim == spatial + 1 else value
    tracked = module.track_running_stats and not module.training
    mean, variance = (module.running_mean, module.running_var) if tracked else (None, None)
    return channels_first(F.instance_norm(value, mean, variance, None, None, not tracked, 0.0, module.eps))


def _batch_norm_input(module: Any, value: Tensor) -> Tensor:
    if module.training:
        raise ValueError("was read in evaluation mode when it was attached, but runs in training mode; attach it anew")
    normal = F.batch_norm(value, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return channels_first(normal)


def _batch_statistics(module: Any) -> str:
    if module.training or module.running_mean is None:
        return "batch normalisation in training mode mixes examples"
    return ""


LINEAR_TAP = Tap("o", "i", lambda _, delta: features_last(delta), lambda _, value: features_last(value))
EMBEDDING_TAP = Tap("d", "v", lambda _, delta: features_last(delta), _embedding_input, available=_no_frequency)
_LAST = Tap("c k...", "c k...", lambda module, delta: features_last(delta, _features(module)), _layer_norm_input)
_CHANNEL = Tap("c", "c", lambda _, delta: channels_first(delta), _group_norm_input)

NORM_TAPS: Mapping[type, Tap] = {
    nn.LayerNorm: _LAST,
    nn.RMSNorm: replace(_LAST, read_input=_rms_norm_input),
    nn.GroupNorm: _CHANNEL,
    nn.modules.instancenorm._InstanceNorm: replace(
        _CHANNEL,
        read_output=lambda module, delta: channels_first(delta, module._get_no_batch_dim() - 1),
        read_input=_instance_norm_input,
    ),
    nn.modules.batchnorm._BatchNorm: replace(_CHANNEL, read_input=_batch_norm_input, available=_batch_statistics),
}
"""Norms whose examples do not mix; batch normalisation is one of them only in evaluation mode."""
