"""What every named method owes a training loop, beyond what the kit draws for each."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, TapWarning

KINDS = [
    kind
    for kind in (getattr(curvlib.optimizers, name) for name in curvlib.optimizers.__all__)
    if isinstance(kind, type) and issubclass(kind, CurvatureOptimizer)
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def closure_of(optimizer, model, t=0, sign=1.0, spoilt=False):
    generator = torch.Generator().manual_seed(t)
    x, y = torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    if spoilt:
        x[2, 1] = torch.nan

    def closure():
        optimizer.zero_grad()
        outputs = model(x)
        loss = sign * F.cross_entropy(outputs, y)
        optimizer.observe(outputs, "categorical", loss=loss)
        loss.backward(retain_graph=optimizer.needs_graph)
        return loss

    return closure


@every_kind
def test_the_loss_comes_back(kind):
    model = network()
    optimizer = kind(model)
    loss = optimizer.step(closure_of(optimizer, model))
    assert loss.item() == pytest.approx(F.cross_entropy(network()(closure_inputs()), closure_labels()).item())


def closure_inputs():
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def closure_labels():
    generator = torch.Generator().manual_seed(0)
    torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return torch.randint(0, 3, (8,), generator=generator)


@every_kind
def test_to_maximize_is_to_minimize_the_opposite(kind):
    found = []
    for sign in (1.0, -1.0):
        model = network()
        optimizer = kind(model, maximize=sign < 0)
        for t in range(4):
            optimizer.step(closure_of(optimizer, model, t, sign))
        found.append([parameter.detach() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("known", [True, False])
@every_kind
def test_a_batch_that_is_not_finite_is_masked(kind, known, monkeypatch):
    """What layers hear is not finite, either; on an accelerator nobody knows before the step is over."""
    monkeypatch.setattr(curvlib.optimizer, "_known", lambda gate: known)
    model = network()
    optimizer = kind(model)
    optimizer.on_nonfinite = "mask"
    for t in range(5):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step(closure_of(optimizer, model, t, spoilt=t in (0, 2)))
        moved = any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        assert moved == (t not in (0, 2)), t
        for record in optimizer.state.values():
            # a root that could not be solved is told by its residual
            assert all(torch.isfinite(value).all() for name, value in record.items() if "residual" not in name), t
    if known:
        twin = network()
        other = kind(twin)
        for t in (1, 3, 4):
            other.step(closure_of(other, twin, t))
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


@every_kind
def test_a_step_size_may_be_a_tensor(kind):
    """Of no dimension or of one, which a user fills."""
    found = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)):
        model = network()
        optimizer = kind(model, lr)
        optimizer.step(closure_of(optimizer, model, 0))
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.02)
        else:
            optimizer.param_groups[0]["lr"] = 0.02
        optimizer.step(closure_of(optimizer, model, 1))
        found.append([parameter.detach() for parameter in model.parameters()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@every_kind
def test_parameters_alone_will_do(kind):
    """Without a model; methods that listen say so once, and go on with gradients."""
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = kind(model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for t in range(3):
        optimizer.step(closure_of(optimizer, model, t))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


@every_kind
def test_groups_schedulers_and_frozen_layers(kind):
    model = network()
    model[0].bias.requires_grad_(False)
    trainable = [
        {"params": model[0].parameters()},
        {"params": [*model[2].parameters(), *model[3].parameters()], "lr": 0.0},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = kind(trainable, model=model)
    if "weight_decay" in optimizer.param_groups[0]:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 2 else 0.0)
    snapshots = [[parameter.detach().clone() for parameter in model.parameters()]]
    for t in range(4):
        optimizer.step(closure_of(optimizer, model, t))
        scheduler.step()
        snapshots.append([parameter.detach().clone() for parameter in model.parameters()])
    moved = [not torch.equal(one, two) for one, two in zip(snapshots[0], snapshots[2], strict=True)]
    assert moved == [True, False, False, False, False, False]
    assert all(torch.equal(one, two) for one, two in zip(snapshots[2], snapshots[4], strict=True))  # lr is 0 by then


@every_kind
def test_lr_may_be_a_schedule_of_its_own(kind):
    model = network()
    optimizer = kind(model, lr=lambda step: 0.01 / (1 + step))
    for t in range(3):
        optimizer.step(closure_of(optimizer, model, t))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / (1 + t))
    assert isinstance(optimizer.state_dict()["param_groups"][0]["lr"], float)


@every_kind
@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1"])
def test_a_bad_step_size_is_refused(kind, value):
    with pytest.raises(ValueError, match=r"lr must be a number from 0, got"):
        kind([nn.Parameter(torch.ones(2, 2))], lr=value)


@every_kind
def test_the_docstring_names_every_setting(kind):
    described = "".join(inspect.getdoc(one) for one in kind.__mro__ if one in KINDS)
    for name in inspect.signature(kind.__init__).parameters:
        if name not in ("self", "params"):
            assert f"{name}:" in described or f"{name}," in described, f"{kind.__name__} does not describe {name}"


@every_kind
def test_directions_can_be_inspected(kind):
    model = network()
    optimizer = kind(model)
    optimizer.step(closure_of(optimizer, model))
    assert set(optimizer.routing()) == {name for name, _ in model.named_parameters()}
    assert all(size >= 0 for size in optimizer.memory().values())
    assert optimizer.health().ok
    shown = repr(optimizer)
    assert shown.startswith(f"{kind.__name__} (\n  group 0: {len(list(model.parameters()))} parameters, lr=")
    assert not any(flag in shown for flag in ("foreach", "fused", "capturable", "differentiable", "tensor(", "0x"))
    for held in optimizer.held():
        dense = held.dense()
        assert dense.shape == (sum(p.numel() for p in held.unit.operand.parameters),) * 2
        assert torch.isfinite(dense).all()


# -- torch's flags ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("flag", ["fused", "capturable", "differentiable"])
def test_a_flag_that_asks_for_what_is_not_there_is_refused(kind, flag):
    parameters = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=rf"{flag}=True is not supported: .*; leave it out"):
        kind(parameters, **{flag: True})
    with pytest.raises(ValueError, match=rf"{flag}=True is not supported"):
        kind([{"params": parameters, flag: True}])
    with pytest.raises(ValueError, match=rf"{flag} must be one of None, False, True, got 'yes'"):
        kind(parameters, **{flag: "yes"})


@every_kind
def test_an_unknown_setting_is_refused_by_name(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'for_each'"):
        kind([nn.Parameter(torch.ones(2, 2))], for_each=True)


@every_kind
def test_flags_that_decline_or_say_what_is_so_change_nothing(kind):
    results = []
    for flags in ({}, {"foreach": True, "fused": None}, dict(fused=False, capturable=False, differentiable=False)):
        model = network()
        optimizer = kind(model, **flags)
        for t in range(3):
            optimizer.step(closure_of(optimizer, model, t))
        assert flags.items() <= optimizer.param_groups[0].items()
        results.append([parameter.detach() for parameter in model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@every_kind
def test_foreach_false_steps_parameter_by_parameter(kind):
    results = []
    for foreach in (None, False):
        model = network()
        optimizer = kind(model, foreach=foreach)
        for t in range(3):
            optimizer.step(closure_of(optimizer, model, t))
        assert foreach is None or all(len(bucket.units) == 1 for bucket in optimizer._storage.buckets)
        results.append([parameter.detach() for parameter in model.parameters()])
    for one, two in zip(*results, strict=True):  # the order of sums, passed through three roots of damped matrices
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
