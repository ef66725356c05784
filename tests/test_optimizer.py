"""The state contract: saving, loading, copying, groups, schedules, freezing; resumed equals uninterrupted, bitwise."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib

METHODS = {
    "sgd": lambda target: curvlib.SGD(target, lr=0.05, momentum=0.9),
    "adam": lambda target: curvlib.Adam(target, amsgrad=True),
    "adamw": lambda target: curvlib.AdamW(target),
    "adagrad": lambda target: curvlib.Adagrad(target, lr_decay=0.01),
    "rmsprop": lambda target: curvlib.RMSprop(target, lr=1e-3, centered=True, momentum=0.5),
    "momentum-adam": lambda target: curvlib.MomentumAdam(target),
    "shampoo": lambda target: curvlib.Shampoo(target, block_size=4, refresh_every=3),
    "shampoo-staggered": lambda target: curvlib.Shampoo(target, block_size=3, refresh_every=4, stagger=True),
    "mbf": lambda target: curvlib.MBF(target, refresh_every=3),
    "mbf-published": lambda target: curvlib.MBF(
        target, **{**curvlib.optimizers.mbf.PUBLISHED, "lr": 1e-3, "damping": 0.1, "refresh_every": 4}
    ),
    "mbf-samples": lambda target: curvlib.MBF(target, of="samples", refresh_every=3),
    "kfac": lambda target: curvlib.KFAC(target, refresh_every=3, statistics_every=2),
    "kfac-eigen": lambda target: curvlib.KFAC(target, form="eigen", refresh_every=3, subsample=2),
    "ngd": lambda target: curvlib.NGD(target, block_size=60, refresh_every=2),
    "scheduled": lambda target: curvlib.MBF(
        target, damping=lambda step: 1 + 0.1 * step, lr=lambda step: 1e-3 / (1 + step)
    ),
}


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(48),
        nn.Linear(48, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 32, generator=generator).to(dtype), torch.randint(0, 3, (8,), generator=generator)


def train(model, optimizer, steps, dtype=torch.float32, skip=None):
    for step in steps:
        optimizer.zero_grad()
        inputs, labels = batch(step, dtype)
        F.cross_entropy(model(inputs), labels).backward()
        if skip is not None and step % 3 == 1:
            skip(model)
        optimizer.step()


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one.parameters(), other.parameters(), strict=True))


def through_a_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@given(
    st.sampled_from(sorted(METHODS)), st.integers(0, 9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
@settings(max_examples=60, deadline=None)
def test_resumed_is_bitwise_uninterrupted(name, stop, dtype):
    def freeze(model):
        model[5].bias.grad = None

    model = network(dtype)
    optimizer = METHODS[name](model)
    train(model, optimizer, range(stop), dtype, freeze)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(stop, 12), dtype, freeze)
    again = network(dtype, seed=1)
    resumed = METHODS[name](again)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(stop, 12), dtype, freeze)
    assert same(model, again)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_copy_goes_its_own_way_from_the_same_place(name):
    model = network()
    optimizer = METHODS[name](model)
    train(model, optimizer, range(4))
    twin, copied = copy.deepcopy((model, optimizer))
    copied.attach(twin)
    assert {one for one in vars(optimizer) if not one.startswith("_")} <= set(vars(copied))
    train(model, optimizer, range(4, 9))
    train(twin, copied, range(4, 9))
    assert same(model, twin)
    train(twin, copied, range(9, 10))
    assert not same(model, twin)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"scheduled"}))
def test_a_pickle_goes_on(name):
    model = network()
    optimizer = METHODS[name](model)
    train(model, optimizer, range(4))
    twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    copied.attach(twin)
    train(model, optimizer, range(4, 8))
    train(twin, copied, range(4, 8))
    assert same(model, twin)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_checkpoint_holds_plain_things(name):
    model = network()
    optimizer = METHODS[name](model)
    train(model, optimizer, range(2))

    def plain(thing):
        if isinstance(thing, dict):
            return all(isinstance(key, (str, int)) and plain(value) for key, value in thing.items())
        if isinstance(thing, (list, tuple)):
            return all(map(plain, thing))
        return thing is None or isinstance(thing, (torch.Tensor, int, float, str, bool))

    assert plain(optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_empty_state_goes_round(name):
    model = network()
    optimizer = METHODS[name](model)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    other = network()
    plain = METHODS[name](other)
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert same(model, other)


def test_statistics_keep_their_dtype_under_bfloat16_parameters():
    model = network(torch.bfloat16)
    optimizer = curvlib.Shampoo(model)
    train(model, optimizer, range(3), torch.bfloat16)
    for _ in range(2):
        floating = [
            value.dtype
            for record in optimizer.state.values()
            for value in record.values()
            if torch.is_tensor(value) and value.is_floating_point()
        ]
        assert set(floating) == {torch.float32}
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_records_are_views_of_what_the_engine_works_on():
    model = network()
    optimizer = curvlib.Shampoo(model)
    train(model, optimizer, range(2))
    factor = optimizer.state[model[5].weight]["factor_0_0"]
    before = factor.clone()
    train(model, optimizer, range(2, 3))
    assert not torch.equal(factor, before)


def test_records_that_somebody_replaced_are_taken_in():
    model, other = network(), network()
    optimizers = [METHODS["mbf"](one) for one in (model, other)]
    for one, optimizer in zip((model, other), optimizers, strict=True):
        train(one, optimizer, range(3))
    for record in optimizers[0].state.values():
        record.update({name: value.clone() for name, value in record.items()})
    for one, optimizer in zip((model, other), optimizers, strict=True):
        train(one, optimizer, range(3, 6))
    assert same(model, other)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_closure_runs_under_grad_and_its_loss_is_returned(name):
    model, other = network(), network()
    optimizer, plain = METHODS[name](model), METHODS[name](other)
    inputs, labels = batch(0)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == F.cross_entropy(other(inputs), labels).item()
    train(other, plain, range(1))
    assert same(model, other)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_frozen_parameters_stand_still_and_go_on_when_thawed(name):
    model = network()
    optimizer = METHODS[name](model)
    train(model, optimizer, range(3))
    frozen = [parameter.detach().clone() for parameter in model[5].parameters()]
    model[5].requires_grad_(False)
    train(model, optimizer, range(3, 5))
    assert all(torch.equal(old, new) for old, new in zip(frozen, model[5].parameters(), strict=True))
    model[5].requires_grad_(True)
    train(model, optimizer, range(5, 7))
    assert not any(torch.equal(old, new) for old, new in zip(frozen, model[5].parameters(), strict=True))


def test_added_groups_have_their_own_settings():
    model = network()
    optimizer = curvlib.Shampoo([model[5].weight], lr=0.0)
    optimizer.add_param_group({"params": [model[7].weight], "lr": 0.1, "momentum": 0.0})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, range(2))
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert [name for (name, _), moved in zip(model.named_parameters(), changed, strict=True) if moved] == ["7.weight"]
    assert "momentum" not in optimizer.state[model[7].weight]
    assert "momentum" in optimizer.state[model[5].weight]


def test_groups_equal_separate_optimizers():
    model, other = network(), network()
    together = curvlib.MBF(
        [{"params": model[5].parameters(), "lr": 1e-2}, {"params": model[7].parameters(), "beta": 0.5, "damping": 2.0}],
        model=model,
    )
    first = curvlib.MBF(other[5].parameters(), lr=1e-2, model=other)
    second = curvlib.MBF(other[7].parameters(), beta=0.5, damping=2.0, model=other)
    for step in range(6):
        inputs, labels = batch(step)
        for one in (model, other):
            one.zero_grad()
            F.cross_entropy(one(inputs), labels).backward()
        for optimizer in (together, first, second):
            optimizer.step()
    assert same(model, other)


def test_a_bias_in_another_group_joins_with_its_own_lr_and_decay():
    model, other = network(), network()
    layer, plain = model[7], other[7]
    optimizer = curvlib.MBF(
        [{"params": [layer.weight], "weight_decay": 0.5}, {"params": [layer.bias], "lr": 0.0, "beta": 0.1}],
        lr=1e-2,
        model=model,
    )
    reference = curvlib.MBF(plain.parameters(), lr=1e-2, weight_decay=0.5, model=other)
    bias = layer.bias.detach().clone()
    for step in range(4):
        inputs, labels = batch(step)
        plain.bias.data.copy_(bias)
        for one in (model, other):
            one.zero_grad()
            F.cross_entropy(one(inputs), labels).backward()
        optimizer.step()
        reference.step()
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("name", ["sgd", "adam", "shampoo", "mbf"])
def test_many_parameters_in_one_batch_are_as_many_optimizers(name):
    """Bitwise for elementwise methods; to rounding where batched products may sum in another order."""
    torch.manual_seed(0)
    start = [torch.randn(5, 4, dtype=torch.float64) for _ in range(6)]
    together, apart = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    batched = METHODS[name](together)
    looped = [METHODS[name]([one]) for one in apart]
    for step in range(10):
        for number, (one, other) in enumerate(zip(together, apart, strict=True)):
            missing = (step + number) % 4 == 0
            gradient = torch.randn(5, 4, dtype=torch.float64)
            one.grad, other.grad = (None, None) if missing else (gradient, gradient.clone())
        batched.step()
        for optimizer in looped:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        if name in ("sgd", "adam"):
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_schedulers_tensor_rates_and_callables_agree():
    rates = {}
    for kind in ("scheduler", "tensor", "callable"):
        model = network(torch.float64)
        lr = {
            "scheduler": 0.1,
            "tensor": torch.tensor(0.1, dtype=torch.float64),
            "callable": lambda step: 0.1 * 0.5**step,
        }[kind]
        optimizer = curvlib.Shampoo(model, lr=lr)
        scheduler = None if kind == "callable" else torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            train(model, optimizer, [step], torch.float64)
            if scheduler:
                scheduler.step()
        rates[kind] = [parameter.detach() for parameter in model.parameters()]
    for kind in ("tensor", "callable"):
        for one, other in zip(rates["scheduler"], rates[kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_callable_shows_its_number_in_the_group():
    model = network()
    optimizer = METHODS["scheduled"](model)
    shown = []
    for step in range(3):
        train(model, optimizer, [step])
        shown.append((optimizer.param_groups[0]["damping"], optimizer.param_groups[0]["steps"]))
    assert shown == [(1.0, 1), (1.1, 2), (1.2, 3)]


def test_one_cycle_drives_momentum():
    model = network()
    optimizer = curvlib.Shampoo(model, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10, cycle_momentum=True, base_momentum=0.5)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    train(model, optimizer, range(2))


def test_hooks_run():
    model = network()
    optimizer = curvlib.MBF(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "saved", "loaded"]


def test_maximize_ascends():
    model, other = network(), network()
    up, down = curvlib.Shampoo(model, maximize=True), curvlib.Shampoo(other)
    for step in range(3):
        inputs, labels = batch(step)
        for one, sign in ((model, -1), (other, 1)):
            one.zero_grad()
            (sign * F.cross_entropy(one(inputs), labels)).backward()
        up.step()
        down.step()
    assert same(model, other)


@pytest.mark.parametrize("reduction", ["sum", 8.0])
@pytest.mark.parametrize("name", ["mbf", "shampoo"])
def test_a_declared_reduction_makes_sum_and_mean_the_same(name, reduction):
    make = {"mbf": curvlib.MBF, "shampoo": curvlib.Shampoo}[name]
    model, other = network(torch.float64), network(torch.float64)
    summed = make(model, reduction=reduction, grafting=None, relative_damping=False, damping=0.1)
    mean = make(other, grafting=None, relative_damping=False, damping=0.1)
    if reduction == "sum":
        with pytest.raises(ValueError, match="batch_size"):
            train(model, summed, range(1), torch.float64)
        summed.batch_size = 8
    for step in range(4):
        inputs, labels = batch(step, torch.float64)
        for one, how in ((model, "sum"), (other, "mean")):
            one.zero_grad()
            F.cross_entropy(one(inputs), labels, reduction=how).backward()
        summed.step()
        mean.step()
    for one, other_one in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, other_one, rtol=1e-10, atol=1e-10)


def test_memory_counts_the_bytes_of_the_recipe():
    layer = nn.Linear(6, 4, bias=False)
    optimizer = curvlib.Shampoo(layer, grafting="adam")
    layer.weight.grad = torch.randn(4, 6)
    optimizer.step()
    memory = optimizer.memory()
    factors = 4 * (16 + 36)
    entries = 4 * 24
    expected = {"statistics": factors, "roots": factors, "momentum": entries, "grafting": entries}
    expected["workspace"] = 2 * entries  # the gradients, and small ones once more to be looked at together
    assert {role: memory[role] for role in expected} == expected


def test_curvature_rows_are_the_parameters_row_major_order_with_the_bias_last():
    layer = nn.Linear(3, 2).double()
    optimizer = curvlib.MBF(layer, linear_blocks="| o i", beta=0.0)
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="no curvature"):
        optimizer.curvature(layer)
    optimizer.step()
    gradient = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
    torch.testing.assert_close(optimizer.curvature(layer), torch.outer(gradient, gradient))
    torch.testing.assert_close(optimizer.curvature(layer.weight), optimizer.curvature(layer))


def test_what_an_optimizer_knows_is_known_after_loading():
    model = network()
    optimizer = curvlib.Shampoo(model)
    train(model, optimizer, range(2))
    again = curvlib.Shampoo(model)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    torch.testing.assert_close(again.curvature(model[5].weight), optimizer.curvature(model[5].weight))
    held, known = ({k: v for k, v in one.memory().items() if k != "workspace"} for one in (again, optimizer))
    assert held == known
    assert again.health() == optimizer.health()


def test_names_come_from_the_model_or_the_pairs_or_the_place():
    model = network()
    assert next(iter(curvlib.Adam(model).routing())) == "1.weight"
    assert next(iter(curvlib.Adam(model.named_parameters()).routing())) == "1.weight"
    assert next(iter(curvlib.Adam(model.parameters()).routing())) == "parameter 0 of group 0"
    assert "Adam" in repr(curvlib.Adam(model))
    assert "lr=0.001" in repr(curvlib.Adam(model))


def test_attach_and_detach_change_what_is_known():
    model = network()
    optimizer = curvlib.MBF(model.parameters())
    optimizer.attach(model)
    assert optimizer.routing()["7.bias"] == "joined to 7.weight"
    optimizer.detach()
    assert "joined" not in str(optimizer.routing())
    with pytest.raises(ValueError, match="holds none of this optimizer's parameters"):
        optimizer.attach(network())


def test_a_wrapper_that_reads_through_and_keeps_what_is_written_may_observe():
    """As Lightning's, whose methods run with the wrapper as self."""

    class Wrapper(curvlib.TNT):
        def __init__(self, wrapped):
            self.wrapped = wrapped

        def __getattr__(self, name):
            return getattr(self.__dict__["wrapped"], name)

    model = nn.Linear(3, 2)
    optimizer = curvlib.TNT(model)
    wrapper = Wrapper(optimizer)
    for _ in range(2):
        wrapper.zero_grad()
        outputs = model(torch.randn(4, 3))
        wrapper.observe(outputs, "categorical")
        outputs.logsumexp(1).mean().backward()
        optimizer.step()
    assert optimizer.state[model.weight]["updates"] == 2
