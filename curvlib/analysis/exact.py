"""Exact curvature by brute force: per-example Jacobians, nothing of the engine.

With J_n ``[K, D]`` the Jacobian of the outputs of example n, H_n ``[K, K]`` the Hessian of its loss with respect to them, and
g_n the gradient of its loss::

    labels="exact"      F = 1/N Σ J_nᵀ H_n J_n               the generalised Gauss-Newton matrix, or type-2 Fisher
    labels="data"       F = 1/N Σ g_n g_nᵀ                   the empirical Fisher
    labels="sampled"    as "data", with labels drawn from the model, and scaled so that the mean over draws is "exact"

Rows and columns are the parameters in the model's order, each in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checks import check_choice, check_count
from ..labels import Likelihood, sample_labels
from ..recipe import Labels
from .objective import Objective, Of, double_differentiable, flat, pullback, unflat

LIMIT = 2 * 2**30
"""Bytes that a dense matrix may take, unless a call allows more."""

_WORK = 2**28  # bytes of per-example Jacobians at once


def fisher(
    objective: Objective,
    labels: Labels = "exact",
    of: Of | Sequence[Of] | None = None,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    limit: int = LIMIT,
) -> Tensor:
    """The Fisher information matrix of a network, or of some of its parameters.

    Args:
        objective: model, loss and data.
        labels: see the module.
        of: a module, a parameter, the name of either, or several; ``None`` for the whole network.
        samples: of labels for each example, for ``"sampled"``.
        generator: for reproducible draws.
        limit: bytes that the matrix may take.

    Returns:
        ``[D, D]``.

    Raises:
        ValueError: where it would be larger, or the loss has no known Hessian; says what to do.
    """
    check_choice("labels", labels, ("data", "sampled", "exact"))
    check_count("samples", samples)
    names = objective.names(of)
    size = objective.numel(names)
    check_size(size, objective.precision, limit)
    total = torch.zeros(size, size, dtype=objective.precision, device=objective.inputs.device)
    if labels == "data":
        for gradients in example_gradients(objective, names):
            total.addmm_(gradients.mT, gradients)
        return total / len(objective)
    likelihood, scale = objective.known(f"labels={labels!r}")
    for jacobian, outputs in jacobians(objective, names):
        if labels == "exact":
            hessian = output_hessian(outputs, likelihood) * scale
            total.addmm_(jacobian.flatten(0, 1).mT, (hessian @ jacobian).flatten(0, 1))
            continue
        for _ in range(samples):
            seed = drawn_gradient(outputs, likelihood, generator) * (scale / samples) ** 0.5
            gradients = torch.einsum("nk,nkd->nd", entries(seed), jacobian)
            total.addmm_(gradients.mT, gradients)
    return (total + total.mT).div_(2 * len(objective))


def hessian(objective: Objective, of: Of | Sequence[Of] | None = None, *, limit: int = LIMIT) -> Tensor:
    """The Hessian of the objective, ``[D, D]``; arguments as for :func:`fisher`."""
    names = objective.names(of)
    values = objective.values(names)
    size = objective.numel(names)
    check_size(size, objective.precision, limit)
    total = torch.zeros(size, size, dtype=objective.precision, device=objective.inputs.device)
    step = max(1, _WORK // (8 * 4 * max(size, objective.inputs[0].numel() * len(objective))))

    def gradient(vector: Tensor) -> Tensor:
        def mean(parameters: dict[str, Tensor]) -> Tensor:
            outputs = objective.outputs(parameters, objective.inputs)
            return torch.vmap(objective.example_loss)(outputs, objective.targets).mean()

        return flat(torch.func.grad(mean)(unflat(vector, values, names)), names)

    with double_differentiable():
        _, pull = pullback(gradient, flat(values, names))
        for start in range(0, size, step):
            units = torch.zeros(min(step, size - start), size, dtype=total.dtype, device=total.device)
            units[:, start:].fill_diagonal_(1.0)
            total[start : start + step] = torch.vmap(pull)(units)
    return (total + total.mT) / 2


def example_gradients(objective: Objective, names: Sequence[str]) -> Iterator[Tensor]:
    """The gradient of every example's loss, ``[n, D]`` for so many examples at once as memory allows."""
    values = objective.values(names)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return objective.example_loss(objective.outputs(parameters, x[None])[0], y)

    batched = torch.vmap(torch.func.grad(loss), (None, 0, 0))
    for inputs, targets in objective.chunks(_chunk(objective, names)):
        with double_differentiable():
            yield flat(batched(values, inputs, targets), names, 1)


def jacobians(objective: Objective, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """(Jacobians ``[n, K, D]`` with K the number of outputs of an example, outputs ``[n, ...]``)."""
    values = objective.values(names)

    def outputs(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        value = objective.outputs(parameters, x[None])[0]
        return value.flatten(), value

    batched = torch.vmap(torch.func.jacrev(outputs, has_aux=True), (None, 0))
    with torch.no_grad():
        count = objective.outputs({}, objective.inputs[:1]).numel()
    for inputs, _ in objective.chunks(_chunk(objective, names, count)):
        with double_differentiable():
            found, value = batched(values, inputs)
        yield flat(found, names, 2), value


def entries(outputs: Tensor) -> Tensor:
    """The outputs of every example in a row, ``[n, K]``, also where an example has a single one without a dimension."""
    return outputs.reshape(len(outputs), -1)


def _chunk(objective: Objective, names: Sequence[str], outputs: int = 1) -> int:
    return max(1, _WORK // (8 * outputs * objective.numel(names)))


@torch.no_grad()
def output_hessian(outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """The Hessian of every example's negative log-likelihood, ``[n, K, K]``, of outputs ``[n, ...]``.

    The likelihood is categorical over the last dimension at every position: diag(p) - p pᵀ; or independent over entries:
    p (1 - p) for ``"bernoulli"``, 1 for ``"gaussian"``.
    """
    if likelihood == "gaussian":
        return torch.ones_like(entries(outputs)).diag_embed()
    if likelihood == "bernoulli":
        p = entries(outputs).sigmoid()
        return (p * (1 - p)).diag_embed()
    p = outputs.softmax(-1)
    blocks = p.diag_embed() - p[..., :, None] * p[..., None, :]  # n … k k
    blocks = blocks.flatten(1, -3) if outputs.ndim > 2 else blocks[:, None]  # n t k k
    t = torch.eye(blocks.shape[1], dtype=p.dtype, device=p.device)
    return torch.einsum("ntkl,ts->ntksl", blocks, t).flatten(3).flatten(1, 2)


@torch.no_grad()
def drawn_gradient(outputs: Tensor, likelihood: Likelihood, generator: torch.Generator | None) -> Tensor:
    """The gradient of the negative log-likelihood of drawn labels with respect to the outputs, of their shape."""
    drawn = sample_labels(outputs, likelihood, generator)
    if likelihood == "categorical":
        p = outputs.softmax(-1)
        return p - torch.zeros_like(p).scatter_(-1, drawn[..., None], 1.0)
    mean = outputs.sigmoid() if likelihood == "bernoulli" else outputs
    return mean - drawn


def check_size(size: int, dtype: torch.dtype, limit: int) -> None:
    """Refuse a dense matrix that is too large.

    Raises:
        ValueError: with its size and the ways out.
    """
    needed = size**2 * dtype.itemsize
    if needed > limit:
        raise ValueError(
            f"a dense matrix of {size:,} parameters takes {needed / 2**30:.3g} GiB, limit is {limit / 2**30:.3g} GiB: take "
            "one layer with of=..., raise limit=..., or use the matrix-free Operator"
        )
