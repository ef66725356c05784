"""What a layer sees, recorded in plain lines: by autograd on activations, without a hook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(NamedTuple):
    """Inputs ``[n, t, i + 1]`` with a one appended, outputs and their gradients ``[n, t, o]``, the joined gradient."""

    inputs: Tensor
    outputs: Tensor
    deltas: Tensor
    gradient: Tensor


def layers_of(model):
    """The modules with a weight, in order."""
    return [module for module in model if hasattr(module, "weight")]


def joined(layer):
    """Weight and bias as one matrix ``[o, i + 1]``."""
    return torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1)


def recorded(model, x, y):
    """Every layer of a sequence of linear layers and convolutions, for the mean cross-entropy."""
    inputs, outputs, value = [], [], x
    for module in model:
        if isinstance(module, nn.Linear):
            inputs.append(value.detach()[:, None])
        elif isinstance(module, nn.Conv2d):
            inputs.append(F.unfold(value.detach(), module.kernel_size, padding=module.padding).mT)
        value = module(value)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            outputs.append(value)
    parameters = [p for layer in layers_of(model) for p in (layer.weight, layer.bias)]
    found = torch.autograd.grad(F.cross_entropy(value, y), [*outputs, *parameters])
    deltas, gradients = found[: len(outputs)], found[len(outputs) :]

    def positions(one):
        return one.flatten(2).mT if one.ndim == 4 else one[:, None]

    return [
        Layer(
            torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2),
            positions(h.detach()),
            positions(d),
            torch.cat([weight.flatten(1), bias[:, None]], 1),
        )
        for a, h, d, weight, bias in zip(inputs, outputs, deltas, gradients[0::2], gradients[1::2], strict=True)
    ]
