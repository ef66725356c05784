"""Roots: against eigenvalues in float64 to c·κ·u, and what happens when a solve fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root, register_solver, solvers
from curvlib.blocks import EigenBlock
from curvlib.roots import RootJob, refresh, solve
from curvlib.solvers import How, chosen, damped, diagonal_root

C = 10.0  # constant of the error law, c·n·κ·u


def spd(n, size, condition, seed=0):
    """Random matrices with a log-uniform spectrum from 1/condition to 1."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, size, size, dtype=torch.float64, generator=generator))
    values = condition ** -torch.linspace(0, 1, size, dtype=torch.float64)
    return (basis * values) @ basis.mT


def oracle(matrix, damping, power):
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * ((values + damping) ** -power).unsqueeze(-2)) @ vectors.mT


def job(factor, how, damping=0.0, scale=1.0):
    n = len(factor)
    root = torch.full_like(factor, 7.0)
    return RootJob(
        factor, scale, damping, how, root, torch.zeros(n, dtype=factor.dtype), torch.zeros(n, dtype=torch.int64)
    )


@given(
    size=st.integers(1, 24),
    log_condition=st.floats(0, 4),
    power=st.sampled_from([1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_eigh_roots_obey_the_error_law(size, log_condition, power, dtype, seed):
    matrix = spd(3, size, 10**log_condition, seed)
    root, residual = solve(matrix.to(dtype), torch.zeros(3, dtype=dtype), How(power, "eigh", dtype))
    expected = oracle(matrix, 0.0, power)
    error = (root.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    # eigh perturbs eigenvalues by u·λmax·√n, the power multiplies the relative error by at most max(1, p)
    assert (error <= C * max(1, power) * size * 10**log_condition * torch.finfo(dtype).eps).all()
    assert (residual <= C * size * torch.finfo(dtype).eps).all()


@given(st.integers(1, 24), st.floats(0, 5), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_cholesky_inverses_obey_the_error_law(size, log_condition, dtype, seed):
    matrix = spd(3, size, 10**log_condition, seed)
    root, residual = solve(matrix.to(dtype), torch.zeros(3, dtype=dtype), How(1.0, "cholesky", dtype))
    expected = oracle(matrix, 0.0, 1.0)
    error = (root.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert (error <= C * size * 10**log_condition * torch.finfo(dtype).eps).all()
    assert (residual <= C * size * 10**log_condition * torch.finfo(dtype).eps).all()


def test_a_factor_to_solve_with_instead_of_an_inverse():
    matrix, how = spd(3, 6, 1e3), How(1.0, "auto", torch.float64, triangular=True)
    assert chosen(how).solver == "cholesky"
    lower, residual = solve(matrix, torch.full((3,), 0.1, dtype=torch.float64), chosen(how))
    torch.testing.assert_close(lower @ lower.mT, matrix + 0.1 * torch.eye(6, dtype=torch.float64))
    assert (residual <= C * 6 * 1e3 * torch.finfo(torch.float64).eps).all()
    indefinite = torch.stack([matrix[0], -matrix[1]])
    _, residual = solve(indefinite, torch.zeros(2, dtype=torch.float64), chosen(how))
    assert residual.isinf().tolist() == [False, True]
    with pytest.raises(ValueError, match="does not compute Cholesky's factor"):
        chosen(How(1.0, "eigh", torch.float64, triangular=True))


@given(st.integers(1, 12), st.integers(0, 12), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_damped_roots_are_symmetric_positive_definite(size, rank, power, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(2, size, min(rank, size), dtype=torch.float64, generator=generator)
    root, _ = solve(factor @ factor.mT, torch.full((2,), 1e-3, dtype=torch.float64), How(power, "eigh", torch.float64))
    torch.testing.assert_close(root, root.mT, rtol=1e-9, atol=1e-9)
    assert (torch.linalg.eigvalsh((root + root.mT) / 2) > 0).all()


def test_only_the_symmetric_part_counts():
    matrix = spd(2, 6, 10)
    skew = torch.triu(torch.full((6, 6), 1e-3, dtype=torch.float64), 1)
    how = How(0.5, "eigh", torch.float64)
    damping = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(solve(matrix + skew - skew.T, damping, how)[0], solve(matrix, damping, how)[0])


def test_damping_inside_outside_and_relative_to_the_largest():
    matrix = spd(2, 5, 100)
    damping = torch.tensor([0.1, 0.3], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    expectations = {
        How(0.5, "eigh", torch.float64): (values + damping[:, None]) ** -0.5,
        How(0.5, "eigh", torch.float64, outside=True): 1 / (values**0.5 + damping[:, None]),
        How(0.5, "eigh", torch.float64, largest=True): (values + damping[:, None] * values[:, -1:]) ** -0.5,
        How(0.5, "eigh", torch.float64, largest=True, floor=9.0): (values + 9.0) ** -0.5,
    }
    for how, powered in expectations.items():
        torch.testing.assert_close(solve(matrix, damping, how)[0], (vectors * powered[:, None]) @ vectors.mT)


def test_jobs_of_one_size_are_solved_in_one_call(monkeypatch):
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or eigh(matrix))
    how = How(0.25, "eigh", torch.float64)
    jobs = [job(spd(n, 4, 10, seed=n), how, damping=0.1 * n, scale=float(n)) for n in (1, 2, 3)]
    refresh(jobs)
    assert calls == [6]
    for n, one in zip((1, 2, 3), jobs, strict=True):
        torch.testing.assert_close(one.root, oracle(n * one.factor, 0.1 * n, 0.25))
        assert one.kept.tolist() == [0] * n


def test_a_large_job_is_cut_to_a_bounded_workspace(monkeypatch):
    monkeypatch.setattr("curvlib.roots._workspace", lambda device: 3 * 16)
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    one = job(spd(8, 4, 10), How(0.5, "eigh", torch.float64))
    refresh([one])
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(one.root, oracle(one.factor, 0.0, 0.5))


def failing_eigh(monkeypatch, fails):
    """Make torch.linalg.eigh fail on batches that hold a matrix for which ``fails(matrix)``."""
    eigh = torch.linalg.eigh

    def sometimes(matrix):
        if any(fails(one) for one in matrix):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", sometimes)


def test_what_fails_in_float32_is_solved_in_float64(monkeypatch):
    matrix = spd(3, 5, 100).float()
    expected = oracle(matrix, 0.0, 0.5)
    failing_eigh(monkeypatch, lambda one: one.dtype == torch.float32 and torch.equal(one, matrix[1]))
    one = job(matrix, How(0.5, "eigh", torch.float32))
    refresh([one])
    assert one.kept.tolist() == [0, 0, 0]
    torch.testing.assert_close(one.root.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_fails_without_jitter_is_solved_with_it(monkeypatch):
    matrix = spd(2, 5, 100)
    expected = oracle(matrix, 0.0, 0.5)
    failing_eigh(monkeypatch, lambda one: torch.equal(one, matrix[0].to(one.dtype)))
    one = job(matrix, How(0.5, "eigh", torch.float64))
    refresh([one])
    assert one.kept.tolist() == [0, 0]
    torch.testing.assert_close(one.root, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_a_root_that_fails_for_good_stays_as_it_was_and_harms_no_neighbour(solver):
    matrix = spd(3, 5, 100)
    matrix[1, 0, 0] = torch.nan
    one = job(matrix, How(1.0, solver, torch.float64))
    refresh([one])
    assert one.kept.tolist() == [0, 1, 0]
    assert torch.equal(one.root[1], torch.full((5, 5), 7.0, dtype=torch.float64))
    assert one.residual[1] == torch.inf
    for row in (0, 2):
        torch.testing.assert_close(one.root[row], oracle(matrix[row], 0.0, 1.0))


def test_an_undamped_singular_factor_keeps_its_root():
    one = job(torch.zeros(1, 3, 3), How(0.5, "eigh", torch.float32))
    refresh([one])
    assert one.kept.tolist() == [1]
    assert (one.root == 7).all()


def test_an_indefinite_matrix_has_no_cholesky_inverse():
    one = job(-torch.eye(3)[None], How(1.0, "cholesky", torch.float32))
    refresh([one])
    assert one.kept.tolist() == [1]


def hard_matrix():
    folder = os.environ.get("CURVLIB_DATA")
    places = [Path(folder)] if folder else []
    places.append(Path(__file__).parents[2] / "shared" / "data")
    files = [place / "hard_matrices" / "eigh_fails_fp32.pt" for place in places]
    return next((file for file in files if file.is_file()), None)


@pytest.mark.skipif(hard_matrix() is None, reason="CURVLIB_DATA has no hard_matrices/eigh_fails_fp32.pt")
def test_a_real_factor_on_which_float32_eigh_fails_has_a_root():
    factor = torch.load(hard_matrix(), weights_only=True)[None]
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigh(factor)
    one = job(factor, How(0.5, "eigh", torch.float32), damping=1e-2)
    refresh([one])
    assert one.kept.tolist() == [0]
    expected = oracle(factor, 1e-2, 0.5)
    assert ((one.root.double() - expected).norm() / expected.norm()).item() < 1e-5


def test_diagonal_roots():
    value = torch.tensor([0.25, 4.0], dtype=torch.float64)
    torch.testing.assert_close(diagonal_root(value, 1.0, 0.5, outside=False), (value + 1) ** -0.5)
    torch.testing.assert_close(diagonal_root(value, 1.0, 0.5, outside=True), 1 / (value**0.5 + 1))
    torch.testing.assert_close(diagonal_root(value, 1.0, 1 / 3, outside=False), (value + 1) ** (-1 / 3))


# -- registered solvers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_by_qr_are_orthogonal_where_columns_depend_on_each_other(dtype):
    """Factors of full rank beside those of rank 2 and 1: Q is orthogonal to c·n·u, a hundred times that where R⁻¹ is used."""
    size = 12
    factors = torch.stack([spd(1, size, 10.0)[0], *(spd(1, size, 10.0, rank)[0] for rank in (2, 1))])
    for place, rank in ((1, 2), (2, 1)):
        columns = factors[place, :, :rank].clone()
        factors[place] = columns @ columns.mT
    start = torch.linalg.qr(torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    how = How(1.0, "qr", dtype, tolerance=1.0, basis=True, estimates=True)
    solved, _ = solve(factors.to(dtype), torch.zeros(3, dtype=dtype), how, start.Q.to(dtype))
    basis = solved[:, :-1].double()
    error = (basis.mT @ basis - torch.eye(size, dtype=torch.float64)).norm(dim=(1, 2))
    assert (error <= 100 * C * size * torch.finfo(dtype).eps).all()
    assert (error[1:] <= C * size * torch.finfo(dtype).eps).all()


def test_estimates_of_eigenvalues_become_eigenvalues():
    matrix, how = spd(3, 6, 1e3), How(1.0, "qr", torch.float64, tolerance=1.0, basis=True, estimates=True)
    basis = torch.linalg.eigh(matrix + 0.01 * spd(3, 6, 10.0, 1)).eigenvectors
    errors = []
    for _ in range(30):
        solved, _ = solve(matrix, torch.zeros(3, dtype=torch.float64), how, basis)
        basis, values = solved[:, :-1], solved[:, -1]
        errors.append(((values - torch.linalg.eigvalsh(matrix).flip(-1)) / values).abs().max())
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-10  # neighbours are four times as large, and a step divides their share by that


@pytest.fixture
def register(monkeypatch):
    """``register_solver``, forgotten after the test."""
    monkeypatch.setattr(solvers, "SOLVERS", dict(solvers.SOLVERS))
    return register_solver


def inverses(matrix, damping, how):
    return torch.linalg.inv(damped(matrix, damping, how)), torch.zeros(len(matrix), dtype=matrix.dtype)


def test_a_name_is_registered_once(register):
    register("inverse", inverses)
    for name in ("inverse", "cholesky", "eigh", "auto"):
        with pytest.raises(ValueError, match=f"solver '{name}' exists; registered are 'cholesky', 'eigh', "):
            register(name, inverses)


def test_a_root_names_the_solvers_that_there_are(register):
    with pytest.raises(ValueError, match=r"solver must be one of 'auto', 'cholesky', 'eigh'.*, got 'inverse'"):
        Root(solver="inverse")
    register("inverse", inverses)
    assert Root(solver="inverse").solver == "inverse"
    with pytest.raises(ValueError, match="'inverse', got 'lu'"):
        Root(solver="lu")


def test_a_registered_solver_gets_all_of_a_size_at_once_scaled(register):
    calls = []
    register("inverse", lambda matrix, *rest: calls.append(matrix.shape) or inverses(matrix, *rest))
    jobs = [job(spd(n, 4, 10, seed=n), How(1.0, "inverse", torch.float64), 0.1 * n, float(n)) for n in (1, 2)]
    refresh(jobs)
    assert calls == [(3, 4, 4)]
    for n, one in zip((1, 2), jobs, strict=True):
        torch.testing.assert_close(one.root, oracle(n * one.factor, 0.1 * n, 1.0))


@pytest.mark.parametrize("failure", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("cured_by", ["float64", "jitter", "nothing"])
def test_a_registered_solver_has_the_retry_ladder(register, failure, cured_by):
    matrix, seen = spd(3, 5, 10).float(), []

    def moody(some, damping, how):
        seen.append((some.dtype, len(some)))
        root, residual = inverses(some, damping, how)
        cured = {"float64": len(seen) > 1, "jitter": len(seen) > 2, "nothing": False}[cured_by]
        if not cured:
            residual[0 if len(seen) > 1 else 1] = failure
        return root, residual

    register("moody", moody)
    one = job(matrix, How(1.0, "moody", torch.float32))
    refresh([one])
    calls = [(torch.float32, 3), (torch.float64, 1), (torch.float64, 1)]
    assert seen == calls[: 2 if cured_by == "float64" else 3]
    assert one.kept.tolist() == [0, int(cured_by == "nothing"), 0]
    for row in range(3):
        if row == 1 and cured_by == "nothing":
            assert (one.root[row] == 7).all()
        else:
            torch.testing.assert_close(one.root[row].double(), oracle(matrix[row], 0.0, 1.0), rtol=1e-4, atol=1e-4)


def test_a_root_that_is_not_finite_has_failed_whatever_its_residual(register):
    register("broken", lambda matrix, damping, how: (matrix / 0, torch.zeros(len(matrix), dtype=matrix.dtype)))
    one = job(spd(2, 3, 10), How(1.0, "broken", torch.float64))
    refresh([one])
    assert one.kept.tolist() == [1, 1]
    assert (one.root == 7).all()


def test_a_solver_is_asked_only_for_what_it_takes(register):
    register("inverse", inverses, takes=lambda how: how.plain and how.power == 1)
    wanted = How(1.0, "inverse", torch.float64)
    assert chosen(wanted) is wanted
    assert chosen(How(-0.5, "inverse", torch.float64)).solver == "eigh"
    assert chosen(How(1.0, "auto", torch.float64)).solver == "cholesky"
    assert chosen(How(0.5, "auto", torch.float64)).solver == "eigh"
    for how, words in {
        How(0.5, "inverse", torch.float64): "the power -0.5 of a factor; use solver='auto' or one of 'eigh'",
        How(1.0, "inverse", torch.float64, outside=True): "the power -1 of a factor with the damping outside of it",
        How(1.0, "inverse", torch.float64, largest=True): "with a damping relative to its largest eigenvalue",
        How(1.0, "inverse", torch.float64, basis=True): "a basis",
    }.items():
        with pytest.raises(ValueError, match=r"solver='inverse' does not compute") as caught:
            chosen(how)
        assert words in str(caught.value)


def test_a_factor_without_signal_is_damped_to_the_identity():
    matrix, damping = torch.stack([torch.zeros(3, 3), torch.eye(3)]), torch.tensor([0.0, 0.5])
    relative = How(1.0, "cholesky", torch.float32, floor=0.0)
    torch.testing.assert_close(damped(matrix, damping, relative), torch.stack([torch.eye(3), 1.5 * torch.eye(3)]))
    absolute = How(1.0, "cholesky", torch.float32)
    torch.testing.assert_close(damped(matrix, damping, absolute)[0], torch.zeros(3, 3))
    assert torch.equal(matrix[1], torch.eye(3))


def test_a_registered_solver_may_find_bases(register):
    def svd(matrix, damping, how):
        vectors, values, _ = torch.linalg.svd(matrix)
        return torch.cat([vectors, values[:, None]], 1), torch.zeros(len(matrix), dtype=matrix.dtype)

    register("svd", svd, takes=lambda how: how.basis)
    steps = []
    for solver in ("svd", "auto"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        root = Root(0.5, Damping(0.1), solver=solver)
        optimizer = CurvatureOptimizer([weight], Recipe("| o, i", Moment(), root, block=EigenBlock), lr=1.0)
        for _ in range(3):
            weight.grad = torch.randn(4, 3, dtype=torch.float64)
            optimizer.step()
        steps.append(weight.detach())
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("power", [-1.0, 0.25, 1.0])
def test_roots_from_eigenvectors_are_the_same_in_panels(power, monkeypatch):
    matrix, damping, how = (
        spd(2, 14, 100),
        torch.full((2,), 0.1, dtype=torch.float64),
        How(power, "eigh", torch.float64),
    )
    whole, _ = solve(matrix, damping, how)
    monkeypatch.setattr("curvlib.grams._PANEL", 3)
    panels, _ = solve(matrix, damping, how)
    torch.testing.assert_close(panels, whole, rtol=0, atol=14 * 100 * torch.finfo(torch.float64).eps)
    assert torch.equal(panels[:, 0, 5:], panels[:, 5:, 0])
