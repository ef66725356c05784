"""Shampoo against plain lines, and its direction against a peer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from tests.optimizers.oracles import F64
from tests.optimizers.oracles import Shampoo as Oracle

# Roots of a damped factor carry an error of c·κ·u with κ at most 1/damping; a step adds that, times 20 steps.
DAMPING = 1e-2
TOLERANCE = 20 * 100 * (1 / DAMPING) * torch.finfo(F64).eps


def folded(shape, kernels):
    """The shape on which the oracle works: kernel axes separate, merged, or joined to the inputs."""
    if len(shape) < 3 or kernels == "separate":
        return shape
    size = torch.Size(shape[2:]).numel()
    return (shape[0], shape[1], size) if kernels == "merged" else (shape[0], shape[1] * size)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_shampoo_follows_plain_lines(data):
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3))
    kernels = data.draw(st.sampled_from(["separate", "merged", "inputs"]))
    shared = dict(
        lr=0.05,
        beta=data.draw(st.sampled_from([None, 0.9])),
        damping=DAMPING,
        momentum=data.draw(st.sampled_from([0.0, 0.9])),
        exponent=data.draw(st.sampled_from([0.5, 1.0])),
        grafting=data.draw(st.sampled_from([None, "sgd", "adagrad", "rmsprop", "adam"])),
    )
    relative, heavy, debias = (data.draw(st.booleans()) for _ in range(3))
    block = data.draw(st.sampled_from([None, 2, 3]))
    every, period = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3]))
    decay = data.draw(st.sampled_from([0.0, 0.1]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)) for shape in shapes]
    optimizer = curvlib.Shampoo(
        parameters,
        **shared,
        relative_damping=relative,
        heavy_ball=heavy,
        debias=debias,
        block_size=block,
        kernels=kernels,
        vectors="kronecker",
        statistics_every=every,
        refresh_every=period,
        weight_decay=decay,
    )
    # merged kernel axes are one factor, whose kernels are never cut
    forms = [folded(shape, kernels) for shape in shapes]
    oracles = [
        Oracle(form, **shared, relative=relative, heavy_ball=heavy, block=block, debias=debias, decay=decay)
        for form in forms
    ]
    if kernels == "merged" and block is not None:
        for oracle, shape in zip(oracles, shapes, strict=True):
            if len(shape) >= 3:
                oracle.windows = lambda tensor, oracle=oracle, shape=shape: kernel_windows(oracle, tensor, shape)
    weights = [parameter.detach().clone() for parameter in parameters]
    for step in range(20):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=F64)
            form = forms[number]
            updated = oracles[number].update(
                weights[number].reshape(form), parameter.grad.reshape(form), step % every == 0, step % period == 0
            )
            weights[number] = updated.reshape(parameter.shape)
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=TOLERANCE * 1e2, atol=TOLERANCE * 1e2)


def kernel_windows(oracle, tensor, shape):
    """Blocks with inputs and outputs cut, and the merged kernel axis cut axis by axis: cuts of k1 and k2 make blocks."""
    full = tensor.view(shape)
    windows = {(): full}
    from tests.optimizers.oracles import pieces

    for axis in (0, 1):
        windows = {
            (*key, cut): window.narrow(axis, cut[0], cut[1] - cut[0])
            for key, window in windows.items()
            for cut in pieces(shape[axis], oracle.block)
        }
    return {key: window.flatten(2) for key, window in windows.items()}


def test_the_published_form_of_gupta_is_one_setting():
    weight = nn.Parameter(torch.randn(4, 3, dtype=F64))
    start = weight.detach().clone()
    optimizer = curvlib.Shampoo(
        [weight], lr=0.1, beta=None, damping=1e-3, relative_damping=False, grafting=None, momentum=0, refresh_every=1
    )
    left, right = 1e-3 * torch.eye(4, dtype=F64), 1e-3 * torch.eye(3, dtype=F64)
    from tests.optimizers.oracles import symmetric_power

    for _ in range(10):
        weight.grad = torch.randn(4, 3, dtype=F64)
        left, right = left + weight.grad @ weight.grad.T, right + weight.grad.T @ weight.grad
        start = start - 0.1 * symmetric_power(left, -0.25) @ weight.grad @ symmetric_power(right, -0.25)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start, rtol=1e-10, atol=1e-10)


def test_the_direction_is_a_peers():
    peer = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(6, 5))
    theirs = nn.Parameter(ours.detach().clone())
    # The peer starts its factors at 1e-6 I, sums, and takes the power -1/(2k) of each for k axes, as Gupta et al. do.
    other = peer.Shampoo(
        [theirs], lr=0.1, momentum=0.0, preconditioning_compute_steps=1, matrix_eps=1e-6, weight_decay=0.0
    )
    mine = curvlib.Shampoo(
        [ours], lr=0.1, beta=None, damping=1e-6, relative_damping=False, grafting=None, momentum=0, refresh_every=1
    )
    for _ in range(15):
        gradient = torch.randn(6, 5)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    # κ of 15 summed outer products is about 1e3, float32
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=5e-3, atol=5e-3)


def test_vectors_take_adams_diagonal_by_default():
    weights = [nn.Parameter(torch.randn(5, dtype=F64)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    ours, theirs = curvlib.Shampoo([weights[0]], lr=1e-2), torch.optim.Adam([weights[1]], lr=1e-2)
    for _ in range(20):
        gradient = torch.randn(5, dtype=F64)
        weights[0].grad = weights[1].grad = gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(weights[0].detach(), weights[1].detach(), rtol=1e-12, atol=1e-12)


def test_a_grouped_convolution_has_a_product_for_every_group():
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    optimizer = curvlib.Shampoo(layer, kernels="inputs", beta=None, debias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    layer.bias.grad = torch.randn_like(layer.bias)
    optimizer.step()
    left = optimizer.state[layer.weight]["factor_0_0"]
    grouped = layer.weight.grad.view(2, 3, -1)
    torch.testing.assert_close(left, grouped @ grouped.mT)
