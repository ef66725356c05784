"""Exact curvature against loops over examples and outputs."""

from __future__ import annotations

import copy
import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from curvlib.analysis import Objective, Operator, fisher, hessian
from tests.analysis.problems import (
    F64,
    LOSSES,
    NETWORKS,
    POSITIONS,
    Problem,
    close,
    cross_entropy_of_positions,
    plain_fisher,
    plain_hessian,
    problem,
    rows,
    targets_like,
)

WAYS = list(product(LOSSES, ["mean", "sum"]))

every_network = pytest.mark.parametrize("name", NETWORKS)
every_way = pytest.mark.parametrize(("likelihood", "reduction"), WAYS)
both_labels = pytest.mark.parametrize("labels", ["data", "exact"])


def symmetric_and_positive(matrix):
    close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-13 * matrix.trace()


@every_network
@every_way
def test_fisher_and_hessian_are_loops_over_examples(name, likelihood, reduction):
    some = problem(name, likelihood, reduction)
    for labels in ("data", "exact"):
        found = fisher(some.objective(), labels)
        close(found, plain_fisher(some, labels))
        symmetric_and_positive(found)
    close(hessian(some.objective()), plain_hessian(some))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.booleans(),
    st.sampled_from(WAYS),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_perceptron_will_do(widths, bias, way, n, seed):
    torch.manual_seed(seed)
    layers = [[nn.Linear(one, two, bias=bias), nn.Softplus()] for one, two in pairwise(widths)]
    model = nn.Sequential(*(module for pair in layers for module in pair)).double()
    x = torch.randn(n, widths[0], dtype=F64)
    some = Problem(model, LOSSES[way[0]](reduction=way[1]), x, targets_like(model(x).detach(), way[0]))
    pairs = [(fisher(some.objective(), labels), plain_fisher(some, labels)) for labels in ("data", "exact")]
    for one, two in [*pairs, (hessian(some.objective()), plain_hessian(some))]:
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "likelihood"),
    [(F.cross_entropy, "categorical"), (F.binary_cross_entropy_with_logits, "bernoulli"), (F.mse_loss, "gaussian")],
)
def test_functions_are_known_like_their_modules(function, likelihood):
    some = problem("perceptron", likelihood, loss=function)
    close(fisher(some.objective()), plain_fisher(some, "exact"))


def test_smoothed_labels_have_the_curvature_of_a_cross_entropy():
    some = problem(loss=nn.CrossEntropyLoss(label_smoothing=0.3))
    for labels in ("data", "exact"):
        close(fisher(some.objective(), labels), plain_fisher(some, labels))


@both_labels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_function_of_sequences_has_a_likelihood_and_a_scale(labels, reduction):
    some = problem("positions", loss=cross_entropy_of_positions(reduction))
    scale = 1 / POSITIONS if reduction == "mean" else None
    objective = some.objective(likelihood="categorical", scale=scale)
    close(fisher(objective, labels), plain_fisher(some, labels))


@pytest.mark.parametrize(("likelihood", "reduction"), WAYS[2:])
def test_outputs_of_sequences_are_entries_of_one_example(likelihood, reduction):
    some = problem("positions", likelihood, reduction)
    close(fisher(some.objective()), plain_fisher(some, "exact"))
    close(hessian(some.objective()), plain_hessian(some))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("labels", ["data", "exact", "sampled"])
def test_a_single_output_needs_no_dimension(likelihood, labels):
    some = problem("perceptron", likelihood)
    some.model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double()
    some.targets = some.targets[:, 0]
    with_one = Problem(some.model[:1], some.loss, some.inputs, some.targets[:, None])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    found = fisher(some.objective(), labels, generator=generators[0])
    close(found, fisher(with_one.objective(), labels, generator=generators[1]))
    if labels != "sampled":
        close(found, plain_fisher(some, labels))


# -- of some parameters -----------------------------------------------------------------------------------------------


def selections(model):
    """(what is asked for, the parameters that are meant)."""
    first, last = model[0], model[2]
    return [
        (first, [first.weight, first.bias]),
        ("2", [last.weight, last.bias]),
        ("2.bias", [last.bias]),
        (first.bias, [first.bias]),
        ([last, "0.weight"], [first.weight, last.weight, last.bias]),
        ([first.bias, "0"], [first.weight, first.bias]),
        ("", list(model.parameters())),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_selection_is_a_slice_in_the_order_of_the_model(number):
    some = problem()
    of, parameters = selections(some.model)[number]
    for labels in ("data", "exact"):
        close(fisher(some.objective(), labels, of), plain_fisher(some, labels, parameters))
    close(hessian(some.objective(), of), plain_hessian(some, parameters))


@pytest.mark.parametrize("of", ["embedding.weight", "readout.weight"])
def test_a_tied_weight_has_either_name(of):
    some = problem("tied")
    weight = some.model.embedding.weight
    close(fisher(some.objective(), of=of), plain_fisher(some, "exact", [weight]))
    assert some.objective().names("readout") == ["embedding.weight", "readout.bias"]


@both_labels
def test_frozen_parameters_are_constants(labels):
    some = problem()
    some.model[0].weight.requires_grad_(False)
    assert some.objective().names() == ["0.bias", "2.weight", "2.bias"]
    close(fisher(some.objective(), labels), plain_fisher(some, labels))
    close(hessian(some.objective()), plain_hessian(some))


@every_network
def test_a_model_of_single_precision_may_be_computed_in_double(name):
    some = problem(name)
    some.model.float()
    single = some.inputs.float() if some.inputs.is_floating_point() else some.inputs
    wide = Problem(copy.deepcopy(some.model).double(), some.loss, single.to(some.inputs.dtype), some.targets)
    objective = Objective(some.model, some.loss, single, some.targets, dtype=F64)
    for labels in ("data", "exact"):
        found = fisher(objective, labels)
        assert found.dtype == F64
        close(found, plain_fisher(wide, labels))
    close(hessian(objective), plain_hessian(wide))
    assert next(some.model.parameters()).dtype == torch.float32


@every_way
def test_the_gradient_is_that_of_the_mean(likelihood, reduction):
    some = problem("convolutional", likelihood, reduction)
    (expected,) = rows(sum(some.loss(*example) for example in some.examples()), some.parameters) / len(some.inputs)
    close(some.objective().gradient(), expected)


def test_nothing_is_left_on_the_model():
    some = problem("transformer")
    before = copy.deepcopy(some.model.state_dict())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    fisher(some.objective())
    hessian(some.objective(), "readout")
    assert all(torch.equal(value, before[name]) for name, value in some.model.state_dict().items())
    assert all(parameter.grad is None for parameter in some.model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


@pytest.mark.parametrize("labels", ["data", "exact", "sampled"])
def test_results_carry_no_graph(labels):
    some = problem()
    objective = Objective(some.model, some.loss, some.inputs.requires_grad_(), some.targets)
    results = [fisher(objective, labels, "0"), hessian(objective, "0"), objective.gradient("0")]
    results += [Operator(objective, kind, "0").dense() for kind in (labels, "hessian")]
    assert not any(result.requires_grad for result in results)


def test_chunks_of_examples_do_not_matter(monkeypatch):
    some = problem("convolutional")
    whole = [fisher(some.objective(), labels) for labels in ("data", "exact")] + [hessian(some.objective())]
    monkeypatch.setattr("curvlib.analysis.exact._WORK", 1)
    parts = [fisher(some.objective(), labels) for labels in ("data", "exact")] + [hessian(some.objective())]
    for one, two in zip(whole, parts, strict=True):
        close(one, two, 1e-13)


@pytest.mark.parametrize(("likelihood", "reduction"), WAYS)
def test_drawn_labels_tend_to_exact_ones_like_one_over_the_root_of_their_number(likelihood, reduction):
    some = problem("perceptron", likelihood, reduction)
    exact = fisher(some.objective())

    def error(samples):
        drawn = fisher(some.objective(), "sampled", samples=samples, generator=torch.Generator().manual_seed(0))
        return float((drawn - exact).norm() / exact.norm())

    few, many = error(16), error(4096)
    assert many < 0.1
    assert 0.3 < few / many / math.sqrt(4096 / 16) < 3


# -- bad input --------------------------------------------------------------------------------------------------------


class Squared(nn.MSELoss):
    """A subclass that computes something else."""

    def forward(self, outputs, targets):
        return super().forward(outputs.exp(), targets)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.L1Loss(), "L1Loss"),
        (F.smooth_l1_loss, "smooth_l1_loss"),
        (nn.CrossEntropyLoss(weight=torch.ones(3, dtype=F64)), "CrossEntropyLoss"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, dtype=F64)), "BCEWithLogitsLoss"),
        (nn.MSELoss(reduction="none"), "MSELoss"),
        (Squared(), "Squared"),
    ],
)
@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_a_loss_without_a_known_hessian_is_named(loss, name, labels):
    some = problem("perceptron", "gaussian", loss=loss)
    with pytest.raises(ValueError, match=f"labels='{labels}' needs .* not known for {name}: give likelihood=.*'data'"):
        fisher(some.objective(), labels)


def test_any_loss_will_do_where_the_labels_are_the_datas():
    some = problem("perceptron", "gaussian", loss=nn.SmoothL1Loss())
    close(fisher(some.objective(), "data"), plain_fisher(some, "data"))
    close(hessian(some.objective()), plain_hessian(some))


def test_a_cross_entropy_of_positions_asks_for_a_function():
    some = problem("positions", "gaussian", loss=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"outputs \[4, 3\] at several positions: .*scale=1 / positions"):
        fisher(some.objective())


@pytest.mark.parametrize("function", [fisher, hessian])
def test_a_matrix_that_is_too_large_is_refused_with_the_ways_out(function):
    some = problem()
    function(some.objective(), limit=39 * 39 * 8)
    with pytest.raises(ValueError, match=r"39 parameters takes .* GiB, limit is .* of=\.\.\., .*limit=.*Operator"):
        function(some.objective(), limit=39 * 39 * 8 - 1)


LAYERS_WITHOUT_EXAMPLES = [
    (nn.BatchNorm1d(5), "1 mixes examples in training mode.*eval"),
    (nn.Dropout(0.1), "1 draws random numbers in training mode.*eval"),
    (nn.AlphaDropout(0.1), "1 draws random numbers in training mode.*eval"),
    (nn.RReLU(), "1 draws random numbers in training mode.*eval"),
    (nn.MultiheadAttention(5, 1, dropout=0.1), "1 draws random numbers in training mode.*eval"),
    (nn.LSTM(5, 5, 2, dropout=0.1), "1 draws random numbers in training mode.*eval"),
    (nn.BatchNorm1d(5, track_running_stats=False), "1 mixes examples in any mode.*track_running_stats"),
]


@pytest.mark.parametrize(("layer", "message"), LAYERS_WITHOUT_EXAMPLES)
def test_layers_that_leave_examples_without_a_loss_are_named(layer, message):
    model = nn.Sequential(nn.Linear(5, 5), copy.deepcopy(layer))
    arguments = nn.MSELoss(), torch.randn(2, 5), torch.randn(2, 5)
    with pytest.raises(ValueError, match=message):
        Objective(model, *arguments)
    if "eval" in message:
        assert len(Objective(model.eval(), *arguments)) == 2


def test_layers_that_neither_mix_nor_draw_pass_in_training_mode():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.0), nn.LayerNorm(5), nn.MultiheadAttention(5, 1))
    assert len(Objective(model.train(), nn.MSELoss(), torch.randn(2, 5), torch.randn(2, 5))) == 2


def test_running_statistics_are_constants():
    some = problem()
    norm = nn.BatchNorm1d(4).double().eval()
    norm.running_mean.normal_()
    some.model.insert(1, norm)
    close(fisher(some.objective()), plain_fisher(some, "exact"))


def with_loss(some, loss, target):
    """Some objective with a loss and one value as every target."""
    return Objective(some.model, loss, some.inputs, torch.full((len(some.inputs),), target))


BAD_CALLS = [
    (lambda some: some.objective().names("2.wieght"), r"belongs to '2.wieght'; it has 0.weight, 0.bias"),
    (lambda some: some.objective().names(nn.Linear(2, 2)), "belongs to 'Linear'; it has 0.weight"),
    (lambda some: some.objective().names(torch.zeros(2)), "belongs to 'Tensor'; it has 0.weight"),
    (lambda some: some.objective().names([]), "Sequential has no trainable parameters there"),
    (lambda some: fisher(some.objective(), "true"), "labels must be one of 'data', 'sampled', 'exact', got 'true'"),
    (lambda some: fisher(some.objective(), "sampled", samples=0), "samples must be a whole number from 1, got 0"),
    (lambda some: some.objective(likelihood="poisson"), "likelihood must be one of 'categorical'.*got 'poisson'"),
    (lambda some: some.objective(scale=0.0), "scale must be a number above 0, got 0.0"),
    (lambda some: Objective(some.model, some.loss, some.inputs, some.targets[1:]), "same examples, got 5 and 4"),
    (lambda some: with_loss(some, F.cross_entropy, -100), "the ignored class -100, which has no loss: leave .* out"),
    (lambda some: with_loss(some, nn.CrossEntropyLoss(ignore_index=2), 2), "the ignored class 2, which has no loss"),
    (lambda some: hessian(with_loss(some, torch.sub, 0.0)), r"one number, got shape \[1, 3\]: reduce it"),
    (lambda some: Objective(some.model, some.loss, some.inputs[:0], some.targets[:0]), "examples, got 0 and 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(problem())


def test_a_frozen_module_has_no_parameters_to_select():
    some = problem()
    some.model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"belongs to '0'; it has 2\.weight, 2\.bias"):
        fisher(some.objective(), of="0")
