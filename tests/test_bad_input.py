"""Bad input: an error that names the culprit and the way out, and nothing harmed."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import (
    Clip,
    CurvatureOptimizer,
    Damping,
    Grafting,
    Moment,
    Momentum,
    NonFiniteGradient,
    Recipe,
    Root,
    Rule,
    Schedule,
)

METHODS = ["SGD", "Adam", "AdamW", "MomentumAdam", "Adagrad", "RMSprop", "Shampoo", "MBF"]
NUMBERS = [
    ("SGD", "momentum"),
    ("Adam", "eps"),
    ("AdamW", "weight_decay"),
    ("Adagrad", "lr_decay"),
    ("Adagrad", "initial_accumulator_value"),
    ("RMSprop", "alpha"),
    ("Shampoo", "damping"),
    ("Shampoo", "beta"),
    ("Shampoo", "exponent"),
    ("Shampoo", "grafting_eps"),
    ("MBF", "damping"),
    ("MBF", "momentum"),
    ("MBF", "diagonal_beta"),
    *((name, "lr") for name in METHODS),
]


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1"])
@pytest.mark.parametrize(("name", "setting"), NUMBERS)
def test_a_number_out_of_range_is_named_with_what_is_allowed(name, setting, value):
    with pytest.raises(ValueError, match=r"must be a number (from|above) .*got") as caught:
        getattr(curvlib, name)([nn.Parameter(torch.ones(2, 2))], **{setting: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Moment(beta=1.0), "beta must be a number from 0 and below 1, got 1.0"),
        (lambda: Moment(average="median"), "average must be one of 'ema', 'sum', 'mean', got 'median'"),
        (lambda: Moment(composition="max"), "composition must be one of"),
        (lambda: Damping(relative_to="norm"), "relative_to must be one of"),
        (lambda: Damping(0.1, "trace", split="pi"), "split='pi' shares out an absolute damping"),
        (lambda: Damping(0.1, "trace", outside=True), "outside=True adds an absolute number"),
        (lambda: Root(exponent=-1), "exponent must be a number from 0, got -1"),
        (
            lambda: curvlib.Adam([nn.Parameter(torch.zeros(2))], betas=(1.5, 0.9)),
            "betas[0] must be a number from 0 and below 1, got 1.5",
        ),
        (
            lambda: curvlib.SOAP([nn.Parameter(torch.zeros(2))], betas=(0.5, -1)),
            "betas[1] must be a number from 0 and below 1, got -1",
        ),
        (
            lambda: curvlib.Adam([nn.Parameter(torch.zeros(2))], torch.ones(2)),
            "lr must be a number or a tensor of one, got a tensor of shape [2]",
        ),
        (lambda: Root(solver="lu"), "solver must be one of 'auto', 'cholesky', 'eigh'"),
        (lambda: Schedule(refresh=0), "refresh period must be a whole number of steps from 1, got 0"),
        (lambda: Schedule(statistics=1.5), "statistics period must be a whole number of steps from 1, got 1.5"),
        (lambda: Momentum(1.0, "ema"), "momentum must be a number from 0 and below 1, got 1.0"),
        (lambda: Momentum(kind="mean"), "kind must be one of"),
        (lambda: Grafting("lion"), "grafting must be one of"),
        (lambda: Clip("value", 1), "clip must be one of"),
        (lambda: Clip("norm", 0), "clip limit must be a number above 0, got 0"),
        (lambda: Rule(decay="both"), "decay must be one of"),
        (lambda: Recipe("| o, i", Moment(centered=True)), "centered=True needs a diagonal partition"),
        (lambda: Recipe("| o, i", Moment(maximum=True)), "maximum=True needs a diagonal partition"),
        (lambda: Recipe("... |", Moment("momentum")), "needs a rule with momentum"),
    ],
)
def test_recipes_check_themselves(make, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        make()
    assert words in str(caught.value)


def test_parts_of_the_wrong_kind_are_named():
    with pytest.raises(TypeError, match=r"root must be a Root, got 0\.5"):
        Recipe("... |", root=0.5)
    with pytest.raises(TypeError, match=r"finish must be a tuple of curvlib\.Finish, got 'sign'"):
        Rule(finish="sign")
    with pytest.raises(TypeError, match="expected a Recipe"):
        CurvatureOptimizer([nn.Parameter(torch.ones(1))], ["... |"])


def test_choices_of_named_methods():
    weight = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match="kernels must be one of"):
        curvlib.Shampoo(weight, kernels="flat")
    with pytest.raises(ValueError, match="block_size must be a whole number"):
        curvlib.Shampoo(weight, block_size=0)
    with pytest.raises(ValueError, match=r"linear_blocks must be one of .*'output-averaged'.*got 'per-neuron'"):
        curvlib.MBF(weight, linear_blocks="per-neuron")
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'max'"):
        curvlib.MBF(weight, reduction="max")


def test_a_callable_is_checked_when_its_number_is_known():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = curvlib.Shampoo([weight], damping=lambda step: 1.0 - step)
    for _ in range(2):
        weight.grad = torch.ones(2, 2)
        optimizer.step()
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"damping must be a number from 0, got -1\.0"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_model_without_parameters():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        curvlib.MBF(nn.ReLU())
    with pytest.raises(ValueError, match="empty parameter list"):
        curvlib.Adam([])


def test_partitions_that_do_not_fit_name_the_parameter():
    with pytest.raises(curvlib.PartitionError, match=r"^0\.bias: axis|^0\.bias: unknown axis") as caught:
        CurvatureOptimizer(nn.Sequential(nn.Linear(2, 3)), Recipe("| o, i"))
    assert "axes here: o" in str(caught.value)
    with pytest.raises(ValueError, match=r"weight: .*do not split a dimension of 3"):
        CurvatureOptimizer(nn.Linear(2, 3, bias=False), Recipe("head | d, i", axes="(head d) i", sizes={"head": 2}))
    with pytest.raises(ValueError, match="no route takes bias"):
        CurvatureOptimizer(nn.Linear(2, 3), curvlib.Route(Recipe("| o, i"), role="weight"))
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = CurvatureOptimizer([weight], Recipe("| o, i", root=Root(0.5, solver="cholesky")))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(
        ValueError,
        match=r"solver='cholesky' does not compute the power -0\.5 of a factor; use solver='auto' or one of 'eigh'",
    ):
        optimizer.step()


def test_complex_parameters_and_sparse_gradients_are_refused_by_name():
    with pytest.raises(ValueError, match=r"w is complex; optimize torch\.view_as_real"):
        curvlib.Adam([("w", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = curvlib.Shampoo(table)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="weight has a sparse gradient; use sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def unharmed(before, model, optimizer):
    after = (model.state_dict(), optimizer.state_dict())

    def equal(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(equal, one, other))
        return torch.equal(one, other) if torch.is_tensor(one) else one == other

    return equal(dict(enumerate(before)), dict(enumerate(after)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METHODS)
def test_a_non_finite_gradient_is_reported_by_name_before_anything_changes(name, poison):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = getattr(curvlib, name)(model)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if step == 2:
            model[2].weight.grad[1, 2] = poison
            before = snapshot(model, optimizer)
            with pytest.raises(NonFiniteGradient, match=r"in 2\.weight; nothing was changed") as caught:
                optimizer.step()
            assert caught.value.names == ("2.weight",)
            assert unharmed(before, model, optimizer)
        else:
            optimizer.step()
    model[2].weight.grad.zero_()
    optimizer.step()


def test_a_huge_but_finite_gradient_is_no_error():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = curvlib.SGD([weight], lr=1e-38)
    weight.grad = torch.full((2,), 1e38)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), -1.0))


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_has_zero_gradients_and_moves_nothing_at_first(name):
    model = nn.Linear(3, 2)
    optimizer = getattr(curvlib, name)(model, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(torch.empty(0, 3)), torch.empty(0, dtype=torch.long)).backward()
    assert not model.weight.grad.any()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradients_at_the_first_step_are_harmless(name):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = getattr(curvlib, name)(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_odd_shapes_and_rank_deficient_curvature_train(name):
    shapes = [(), (0, 3), (1,), (1, 7), (7, 1), (2, 1, 3, 1)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = getattr(curvlib, name)(parameters)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert all((parameter < 1).all() for parameter in parameters)


def _trained(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (torch.optim.Adam, curvlib.Adam),
        (curvlib.Adam, curvlib.Shampoo),
        (curvlib.Shampoo, curvlib.MBF),
        (curvlib.Adam, curvlib.MomentumAdam),
        (curvlib.AdaHessian, curvlib.Adam),
        (curvlib.Adagrad, curvlib.RMSprop),
        (curvlib.Lion, lambda parameters: curvlib.SGD(parameters, momentum=0.9)),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_and_harms_nothing(writer, reader):
    """Also where the state has the same names and shapes, and another meaning."""
    model = nn.Linear(4, 3)
    other, optimizer = writer(list(model.parameters())), _trained(model, reader(list(model.parameters())))
    if not isinstance(other, curvlib.AdaHessian):
        _trained(model, other)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"this checkpoint belongs to another recipe.*nothing was changed"):
        optimizer.load_state_dict(other.state_dict())
    assert unharmed(before, model, optimizer)


@pytest.mark.parametrize("kind", [curvlib.Adam, curvlib.SGD, curvlib.NGD, curvlib.Muon, curvlib.Shampoo, curvlib.SOAP])
def test_a_checkpoint_of_other_shapes_is_refused(kind):
    one, two = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
    settings = {"momentum": 0.9} if kind is curvlib.SGD else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, optimizer = _trained(one, kind([*one.parameters()], **settings)), kind([*two.parameters()], **settings)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 should have shape 4×6, there is 6×4"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (curvlib.Adam, {"amsgrad": True}),
        (curvlib.SGD, {"momentum": 0.9}),
        (curvlib.RMSprop, {"momentum": 0.9, "centered": True}),
        (curvlib.Shampoo, {"block_size": 2}),
        (curvlib.MBF, {"linear_blocks": "output", "grafting": None}),
    ],
)
def test_a_checkpoint_brings_its_settings(kind, settings):
    """As torch's optimizers take them, whatever the new one was made with."""
    model = nn.Linear(4, 3).double()
    optimizer = _trained(model, kind(model, **settings))
    twin = copy.deepcopy(model)
    loaded = _trained(twin, kind(twin))
    twin.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        _trained(model, optimizer)
        _trained(twin, loaded)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_checkpoint_with_settings_that_can_not_be_is_refused_before_anything_changes():
    model = nn.Linear(4, 3)
    optimizer = _trained(model, curvlib.Shampoo(model))
    spoilt = optimizer.state_dict()
    spoilt["param_groups"][0]["block_size"] = -4
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"block_size.*-4"):
        optimizer.load_state_dict(spoilt)
    assert unharmed(before, model, optimizer)
    _trained(model, optimizer)


def test_a_checkpoint_of_another_model_is_refused():
    first, second = nn.Linear(4, 3), nn.Linear(5, 3)
    optimizers = [curvlib.Shampoo(layer) for layer in (first, second)]
    first.weight.grad = torch.ones(3, 4)
    optimizers[0].step()
    with pytest.raises(ValueError, match="weight should have"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_a_checkpoint_without_a_newer_setting_takes_its_default():
    model = nn.Linear(4, 3)
    optimizer = curvlib.Shampoo(model, stagger=True)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["stagger"], group["steps"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["stagger"] is True
    model.weight.grad = torch.ones(3, 4)
    optimizer.step()


def test_a_group_that_is_refused_leaves_no_trace():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = curvlib.Shampoo([weights[0]])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [weights[1]], "lr": -1.0})
    with pytest.raises(ValueError, match="block_size must be"):
        optimizer.add_param_group({"params": [weights[1]], "block_size": -1})
    assert len(optimizer.param_groups) == 1
    weights[0].grad = torch.ones(2, 2)
    optimizer.step()


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("KFAC", (100_000, 1)),
        ("EKFAC", (1, 100_000)),
        ("MBF", (1, 100_000)),
        ("TNT", (100_000,)),
        ("NGD", (1000, 1000)),
        ("SOAP", (1_000_000, 1)),
        ("KLShampoo", (1, 1_000_000)),
    ],
)
def test_what_is_too_long_for_its_matrices_gets_another_route_and_is_told(method, shape):
    model = (
        nn.Linear(*shape[::-1], bias=False) if len(shape) == 2 else nn.ParameterList([nn.Parameter(torch.zeros(shape))])
    )
    options = {"labels": "data"} if method == "TNT" else {}
    with pytest.warns(
        curvlib.RouteWarning, match=r"too large: (weight|0) gets route \d, since route \d would keep \d+ GiB for"
    ):
        optimizer = getattr(curvlib, method)(model, **options)
    assert all("GiB" in why for why in optimizer.routing().values())
    (weight,) = model.parameters()
    before = weight.detach().clone()
    if len(shape) == 2:
        (model(torch.randn(2, shape[1])) ** 2).mean().backward()
    else:
        weight.grad = torch.ones(shape)
    optimizer.step()
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)


def test_what_is_too_long_for_all_routes_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weight of shape \[1, 100000\] is too large: route 0 would keep 75 GiB"):
        curvlib.FullAdagrad(nn.Linear(100_000, 1, bias=False))
