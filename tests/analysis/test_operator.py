"""Curvature that is never formed, against the dense matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlib.analysis import Operator, fisher, hessian
from tests.analysis.problems import F64, LOSSES, NETWORKS, close, cross_entropy_of_positions, problem

KINDS = ["exact", "data", "hessian"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_network = pytest.mark.parametrize("name", NETWORKS)
every_loss = pytest.mark.parametrize("likelihood", LOSSES)
COUNT, SIGMAS = 400, 5.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense_of(objective, kind, of=None, **options):
    return hessian(objective, of) if kind == "hessian" else fisher(objective, kind, of, **options)


def both(kind="exact", name="perceptron", likelihood="categorical", of=None, **options):
    """(operator, dense matrix)."""
    objective = problem(name, likelihood).objective()
    return Operator(objective, kind, of, generator=generator(), **options), dense_of(objective, kind, of)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


# -- products ---------------------------------------------------------------------------------------------------------


@every_network
@every_loss
@every_kind
def test_products_are_those_of_the_dense_matrix(name, likelihood, kind):
    operator, dense = both(kind, name, likelihood)
    assert operator.shape == tuple(dense.shape)
    assert operator.dtype == dense.dtype
    close(operator.dense(), dense)
    vectors = torch.randn(len(dense), 3, dtype=F64, generator=generator())
    close(operator @ vectors, dense @ vectors)
    close(operator @ vectors[:, 0], dense @ vectors[:, 0])
    close(operator @ vectors.T.contiguous().T, dense @ vectors)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.integers(1, 11), st.sampled_from(KINDS), st.sampled_from(NETWORKS))
def test_chunks_of_examples_and_of_columns_do_not_matter(batch, columns, kind, name):
    operator, dense = both(kind, name, batch=batch, columns=columns)
    vectors = torch.randn(len(dense), 5, dtype=F64, generator=generator())
    close(operator @ vectors, dense @ vectors)


@every_kind
@pytest.mark.parametrize("of", ["0", "2.bias", ["2.weight", "0.bias"]])
def test_of_some_parameters(kind, of):
    operator, dense = both(kind, of=of)
    close(operator.dense(), dense)


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_function_of_sequences(kind, reduction):
    some = problem("positions", loss=cross_entropy_of_positions(reduction))
    objective = some.objective(likelihood="categorical", scale=0.25 if reduction == "mean" else 1.0)
    close(Operator(objective, kind).dense(), dense_of(objective, kind))


@every_loss
@pytest.mark.parametrize("name", ["perceptron", "transformer"])
def test_drawn_labels_are_those_of_the_dense_matrix_and_stay_the_same(name, likelihood):
    objective = problem(name, likelihood).objective()
    operator = Operator(objective, "sampled", samples=7, generator=generator(3), columns=5)
    close(operator.dense(), fisher(objective, "sampled", samples=7, generator=generator(3)))
    assert torch.equal(operator.dense(), operator.dense())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("kind", [*KINDS, "sampled"])
def test_a_single_output_needs_no_dimension(likelihood, kind):
    some = problem("perceptron", likelihood)
    some.model, some.targets = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double(), some.targets[:, 0]
    found = Operator(some.objective(), kind, generator=generator()).dense()
    close(found, dense_of(some.objective(), kind, generator=generator()))


def test_drawn_labels_of_chunks_tend_to_exact_ones_like_one_over_the_root_of_their_number():
    objective = problem().objective()
    exact = fisher(objective)

    def error(samples):
        drawn = Operator(objective, "sampled", samples=samples, batch=2).dense()
        return float((drawn - exact).norm() / exact.norm())

    few, many = error(16), error(4096)
    assert many < 0.1
    assert 0.3 < few / many / math.sqrt(4096 / 16) < 3


@every_kind
def test_single_precision_may_be_computed_in_double(kind):
    some = problem("convolutional")
    expected = dense_of(some.objective(dtype=F64), kind)
    some.model.float()
    operator = Operator(some.objective(dtype=F64), kind)
    assert operator.dtype == F64
    close(operator @ torch.eye(len(expected)), dense_of(some.objective(dtype=F64), kind))
    close(operator.dense(), expected, rtol=1e-5)


# -- estimates --------------------------------------------------------------------------------------------------------


def off_diagonal_energy(matrix):
    """Σ_j≠i M_ij², the variance of z_i (M z)_i over random signs."""
    return matrix.square().sum(1) - matrix.diagonal().square()


@every_kind
def test_the_trace_is_within_its_error_and_the_error_is_right(kind):
    operator, dense = both(kind)
    found = operator.trace(COUNT)
    assert abs(found.value - dense.trace()) <= SIGMAS * found.error
    deviation = (2 * off_diagonal_energy(dense).sum()).sqrt()  # of zᵀMz
    assert float(found.error * COUNT**0.5 / deviation) == pytest.approx(1.0, abs=0.3)
    assert found.value.shape == found.error.shape == ()


@every_kind
def test_the_diagonal_is_within_its_error_and_the_error_is_right(kind):
    operator, dense = both(kind)
    found = operator.diagonal(COUNT)
    assert bool(((found.value - dense.diagonal()).abs() <= SIGMAS * found.error + 1e-14).all())
    deviation = off_diagonal_energy(dense).sqrt()
    torch.testing.assert_close(found.error * COUNT**0.5, deviation, rtol=0.3, atol=1e-14)


@pytest.mark.parametrize("kind", ["exact", "data"])
def test_the_diagonal_of_the_inverse_is_within_its_error_and_the_error_is_right(kind):
    operator, dense = both(kind)
    inverse = torch.linalg.inv(damped(dense, 0.05))
    found = operator.inverse_diagonal(0.05, COUNT, tolerance=1e-10)
    assert bool(((found.value - inverse.diagonal()).abs() <= SIGMAS * found.error + 1e-9).all())
    torch.testing.assert_close(found.error * COUNT**0.5, off_diagonal_energy(inverse).sqrt(), rtol=0.3, atol=1e-8)


def test_more_probes_have_a_smaller_error_and_one_has_none():
    operator, _ = both()
    few, many = operator.trace(50), operator.trace(800)
    assert 2 < float(few.error / many.error) < 8  # 4 but for chance
    assert operator.trace(1).error == math.inf


def test_a_diagonal_matrix_is_known_from_one_probe():
    """One output, one input and no bias: the curvature is a number."""
    some = problem("perceptron", "gaussian")
    some.model, some.inputs, some.targets = (
        nn.Linear(1, 1, bias=False).double(),
        some.inputs[:, :1],
        some.targets[:, :1],
    )
    found = Operator(some.objective()).diagonal(2)
    close(found.value, 2 * some.inputs.square().mean(0))
    assert float(found.error) <= 1e-14 * float(found.value)


def test_estimates_repeat_with_their_generator():
    values = [both()[0].trace(4).value for _ in range(2)]
    assert torch.equal(*values)
    operator, _ = both()
    assert not torch.equal(operator.trace(4).value, operator.trace(4).value)


# -- eigenvalues ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("name", ["perceptron", "tied"])
@every_loss
def test_extremes_are_the_outer_eigenvalues(kind, name, likelihood):
    operator, dense = both(kind, name, likelihood)
    values = torch.linalg.eigvalsh(dense)
    size = float(values.abs().max())
    found = operator.extremes(len(dense))
    assert found == pytest.approx((float(values[0]), float(values[-1])), abs=1e-10 * size)


@every_kind
def test_few_iterations_stay_inside_and_the_largest_comes_first(kind):
    _, dense = both(kind, "convolutional")
    values = torch.linalg.eigvalsh(dense)
    least, largest, size = float(values[0]), float(values[-1]), float(values.abs().max())
    before = -math.inf
    for iterations in (1, 3, 9, 27):
        low, high = both(kind, "convolutional")[0].extremes(iterations)
        assert least - 1e-12 * size <= low <= high <= largest + 1e-12 * size
        assert high >= before - 1e-12 * size
        before = high
    assert high == pytest.approx(largest, rel=1e-8)


def test_a_multiple_of_the_identity_ends_after_one_iteration():
    some = problem("perceptron", "gaussian", "sum")
    some.model = nn.Linear(5, 3).double()
    assert Operator(some.objective(), of="bias").extremes() == pytest.approx((2.0, 2.0), rel=1e-12)


# -- solves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "data"])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-10])
def test_a_solve_is_the_dense_solve_to_its_tolerance(kind, damping, tolerance):
    operator, dense = both(kind, "convolutional")
    b = torch.randn(len(dense), 3, dtype=F64, generator=generator()) * torch.tensor([1.0, 1e-6, 1e6], dtype=F64)
    matrix = damped(dense, damping)
    x = operator.solve(b, damping, tolerance)
    slack = 1 + 1e-13 / tolerance  # rounding
    assert bool(((matrix @ x - b).norm(dim=0) <= slack * tolerance * b.norm(dim=0)).all())
    expected = torch.linalg.solve(matrix, b)
    condition = float(torch.linalg.cond(matrix))
    assert bool(((x - expected).norm(dim=0) <= slack * tolerance * condition * expected.norm(dim=0)).all())
    assert operator.solve(b[:, 0], damping, tolerance).shape == (len(dense),)


def test_columns_of_zeros_and_easy_columns_rest_while_others_are_solved():
    operator, dense = both()
    vector = torch.linalg.eigh(dense).eigenvectors[:, -1]
    b = torch.stack([torch.zeros_like(vector), 1e-30 * vector, torch.ones_like(vector)], 1)
    x = operator.solve(b, 1e-3, 1e-9)
    expected = torch.linalg.solve(damped(dense, 1e-3), b)
    assert not x[:, 0].any()
    for column in (1, 2):
        close(x[:, column], expected[:, column], rtol=1e-6)


def test_as_many_iterations_as_distinct_eigenvalues_are_enough():
    some = problem("perceptron", "gaussian", "sum")
    some.model = nn.Linear(5, 3).double()
    operator = Operator(some.objective(), of="bias")  # 2 I
    close(operator.solve(torch.ones(3, dtype=F64), 1.0, iterations=1), torch.full((3,), 1 / 3, dtype=F64))


def test_too_few_iterations_say_where_they_stand():
    operator, dense = both()
    with pytest.raises(RuntimeError, match=r"relative residual of \d.*: allow more iterations"):
        operator.solve(torch.ones(len(dense), dtype=F64), 1e-3, 1e-12, iterations=2)


def test_too_few_digits_are_said_and_double_precision_has_enough():
    some = problem()
    wide = some.objective(dtype=F64)
    some.model.float()
    single, b = some.objective(dtype=torch.float32), torch.randn(39, generator=generator())
    with pytest.raises(RuntimeError, match=r"torch.float32\): .*damping or tolerance, or dtype=torch.float64"):
        Operator(single).solve(b, 1e-5, 1e-7, iterations=10**4)
    x = Operator(wide).solve(b, 1e-5, 1e-7)
    assert (damped(fisher(wide), 1e-5) @ x - b.double()).norm() <= 1e-6 * b.norm()


# -- bad input --------------------------------------------------------------------------------------------------------

ONES = torch.ones(39, dtype=F64)
BAD_CALLS = [
    (lambda operator: operator @ torch.ones(38), r"expected \[39\] or \[39, m\], got \[38\]"),
    (lambda operator: operator @ torch.ones(3, 39), r"expected \[39\] or \[39, m\], got \[3, 39\]"),
    (lambda operator: operator @ torch.ones(39, 1, 1), r"got \[39, 1, 1\]"),
    (lambda operator: operator @ torch.tensor(1.0), r"expected \[39\] or \[39, m\], got \[\]"),
    (lambda operator: operator.solve(torch.ones(78), 1.0), r"expected \[39\] or \[39, m\], got \[78\]"),
    (lambda operator: operator.solve(ONES, 0.0), "damping must be a number above 0, got 0.0"),
    (lambda operator: operator.solve(ONES, -1.0), "damping must be a number above 0, got -1.0"),
    (lambda operator: operator.solve(ONES, 1.0, 0.0), "tolerance must be a number above 0, got 0.0"),
    (lambda operator: operator.inverse_diagonal(0.0), "damping must be a number above 0, got 0.0"),
    (lambda operator: operator.solve(ONES, 1.0, iterations=0), "iterations must be a whole number from 1, got 0"),
    (lambda operator: operator.trace(0), "probes must be a whole number from 1, got 0"),
    (lambda operator: operator.extremes(0), "iterations must be a whole number from 1, got 0"),
    (lambda operator: operator.dense(limit=39 * 39 * 8 - 1), "39 parameters takes .*limit=.*Operator"),
    (lambda operator: Operator(operator.objective, "ggn"), "kind must be one of 'exact', .*got 'ggn'"),
    (lambda operator: Operator(operator.objective, batch=0), "batch must be a whole number from 1, got 0"),
    (lambda operator: Operator(operator.objective, columns=1.5), "columns must be a whole number from 1, got 1.5"),
    (lambda operator: Operator(operator.objective, of="3"), r"belongs to '3'; it has 0\.weight"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(both()[0])


def test_an_indefinite_matrix_is_said_to_be_one():
    operator, dense = both("hessian", likelihood="gaussian")
    assert torch.linalg.eigvalsh(dense)[0] < -1e-3
    with pytest.raises(RuntimeError, match=r"F \+ 1e-05 I is not positive definite; .*damping, or a Fisher"):
        operator.solve(ONES, 1e-5, 1e-12)


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_loss_without_a_known_hessian_is_named_at_once(kind):
    some = problem("perceptron", "gaussian", loss=nn.L1Loss())
    with pytest.raises(ValueError, match=f"kind='{kind}' needs the Hessian .* not known for L1Loss"):
        Operator(some.objective(), kind)
    close(Operator(some.objective(), "data").dense(), fisher(some.objective(), "data"))
