"""Labels sampled from the model's own predictive distribution, for a true Fisher instead of an empirical one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .recipe import check_choice


@torch.no_grad()
def sample_labels(
    logits: Tensor,
    likelihood: Literal["categorical", "bernoulli", "gaussian"],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw labels from what the model predicts.

    Args:
        logits: the model's outputs: ``[..., classes]`` for ``"categorical"``, any shape otherwise.
        likelihood: ``"categorical"``: softmax over the last dimension; ``"bernoulli"``: sigmoid of every entry;
            ``"gaussian"``: unit variance around the output, the likelihood of half a squared error.
        generator: for reproducible draws.

    Returns:
        Class numbers ``[...]``, or labels of the outputs' shape and dtype.
    """
    check_choice("likelihood", likelihood, ("categorical", "bernoulli", "gaussian"))
    if likelihood == "categorical":
        flat = logits.softmax(-1).reshape(-1, logits.shape[-1])
        return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(logits.sigmoid(), generator=generator)
    noise = torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
    return logits + noise
