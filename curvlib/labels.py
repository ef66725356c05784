"""Labels from the model: drawn from its own predictive distribution, or all of them at once in closed form.

A *seed* is what is pulled back through the network instead of the gradient of the loss. Drawn labels give the seed of one
draw; the exact labels give one seed for each column of a root S of the Hessian of the negative log-likelihood, H = S Sᵀ,
so that the sum of the seeds' second moments is the generalised Gauss-Newton matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_choice

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


@torch.no_grad()
def sample_labels(logits: Tensor, likelihood: Likelihood, generator: torch.Generator | None = None) -> Tensor:
    """Draw labels from what the model predicts.

    Args:
        logits: the model's outputs: ``[..., classes]`` for ``"categorical"``, any shape otherwise.
        likelihood: ``"categorical"``: softmax over the last dimension; ``"bernoulli"``: sigmoid of every entry;
            ``"gaussian"``: unit variance around the output, the likelihood of half a squared error.
        generator: for reproducible draws.

    Returns:
        Class numbers ``[...]``, or labels of the outputs' shape and dtype.
    """
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "categorical":
        flat = _drawable(logits.softmax(-1)).reshape(-1, logits.shape[-1])
        return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(_drawable(logits.sigmoid()), generator=generator)
    noise = torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
    return logits + noise


def _drawable(probability: Tensor) -> Tensor:
    """Probabilities with one half for what is not finite: drawing from NaN aborts an accelerator; the gradient tells."""
    return torch.where(probability.isfinite(), probability, 0.5)


@torch.no_grad()
def seeds(
    logits: Tensor,
    likelihood: Likelihood,
    labels: Literal["sampled", "exact"],
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
) -> Iterator[Tensor]:
    """Seeds whose pulled-back second moments, summed, are the curvature of every example's loss.

    Args:
        logits: ``[n, ..., classes]`` for ``"categorical"``, ``[n, ...]`` otherwise.
        likelihood: of the outputs of one position, or entry; an example's are independent.
        labels: ``"sampled"``: one seed, the gradient for drawn labels, whose second moment has the curvature as its mean;
            ``"exact"``: one seed for each output of an example.
        mask: ``[n]`` or ``[n, ...]``, true where a position counts.
        generator: for reproducible draws.
        scale: the loss of an example is this times its negative log-likelihood, summed over positions.

    Yields:
        Tensors of the shape of ``logits``, in float32 or better.
    """
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    weight = math.sqrt(scale) * _mask(logits, mask, likelihood)
    if labels == "sampled":
        drawn = sample_labels(logits, likelihood, generator)
        yield weight * _gradient(logits, drawn, likelihood)
        return
    if likelihood == "categorical":
        root = logits.softmax(-1).sqrt()  # column c of diag(√p) - p √pᵀ is √p_c (e_c - p)
        for entry in _entries(logits.flatten(1)):
            places = entry.view(logits[0].shape)
            chosen = (root * places).sum(-1, keepdim=True)
            yield weight * chosen * (places - root.square())
        return
    spread = torch.ones_like(logits)
    if likelihood == "bernoulli":
        probability = logits.sigmoid()
        spread = (probability * (1 - probability)).sqrt()
    for entry in _entries(logits.flatten(1)):
        yield weight * spread * entry.view(logits[0].shape)


@torch.no_grad()
def hessian_product(
    logits: Tensor, vector: Tensor, likelihood: Likelihood, mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """H v, with H the Hessian of the negative log-likelihood of every example; arguments as for :func:`seeds`."""
    weight = scale * _mask(logits, mask, likelihood)
    if likelihood == "gaussian":
        return weight * vector
    if likelihood == "bernoulli":
        probability = logits.sigmoid()
        return weight * probability * (1 - probability) * vector
    probability = logits.softmax(-1)
    return weight * probability * (vector - (probability * vector).sum(-1, keepdim=True))


def _entries(flat: Tensor) -> Iterator[Tensor]:
    """The unit vectors of one example's outputs."""
    for number in range(flat.shape[1]):
        unit = torch.zeros_like(flat[0])
        unit[number] = 1.0
        yield unit


def _gradient(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """The gradient of the negative log-likelihood."""
    if likelihood == "categorical":
        return logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])
    return (logits.sigmoid() if likelihood == "bernoulli" else logits) - labels


def _mask(logits: Tensor, mask: Tensor | None, likelihood: Likelihood) -> Tensor | float:
    if mask is None:
        return 1.0
    places = logits.shape[:-1] if likelihood == "categorical" else logits.shape
    if mask.ndim < 1 or mask.shape != places[: mask.ndim]:
        raise ValueError(f"mask has shape {list(mask.shape)}; the outputs have positions {list(places)}")
    return mask.to(logits.dtype).view(*mask.shape, *[1] * (logits.ndim - mask.ndim))
