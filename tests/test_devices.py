"""On a GPU, where there is one: the same steps as on the CPU, and optimizers that move with their models."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

import curvlib
from curvlib import TapWarning
from tests.optimizers.test_contract import KINDS, closure_of, network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained(kind, model, steps, optimizer=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = kind(model) if optimizer is None else optimizer
        for t in steps:
            optimizer.step(_at(next(model.parameters()).device, optimizer, model, t))
    return optimizer


def _at(device, optimizer, model, t):
    """The contract's closure on a device: its batch is drawn on the CPU."""
    if device.type == "cpu":
        return closure_of(optimizer, model, t)

    class There:
        def __call__(self, x):
            return model(x.to(device)).cpu()

    return closure_of(optimizer, There(), t)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_steps_on_a_gpu_are_those_on_the_cpu(kind):
    if kind.__name__ in ("AdaHessian", "SophiaH", "SophiaG", "TNT"):
        pytest.skip("labels and signs are drawn on the device, from another generator")
    here, there = network(), network().cuda()
    trained(kind, here, range(5))
    trained(kind, there, range(5))
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-6, atol=1e-8)  # Muon's bfloat16 aside, float64


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_moves_and_its_optimizer_goes_on(kind):
    model = network()
    optimizer = trained(kind, model, range(3))
    model.cuda()
    trained(kind, model, range(3, 5), optimizer)
    assert all(parameter.is_cuda and parameter.isfinite().all() for parameter in model.parameters())
    for record in optimizer.state.values():
        assert all(value.is_cuda for name, value in record.items() if name not in ("step", "updates", "warm"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu(kind):
    model = network()
    optimizer = trained(kind, model, range(3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        other = kind(twin)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    trained(kind, twin, range(3, 5), other)
    assert all(parameter.isfinite().all() for parameter in twin.parameters())


def test_a_cpu_tensor_among_them():
    """Parameters of both devices in one optimizer."""
    model = curvlib.Shampoo(
        [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4, 3, device="cuda"))]
    )
    for group in model.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    model.step()
    assert all(parameter.isfinite().all() for group in model.param_groups for parameter in group["params"])
