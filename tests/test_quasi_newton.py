"""Quasi-Newton estimates and their solvers: against dense recursions, explicit solves and one sample at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.quasi_newton import BroydenInverse, LbfgsInverse
from curvlib.solving import Broyden, Lbfgs, broyden, lbfgs

F64 = torch.float64
U = torch.finfo(F64).eps
C = 100.0  # constant of the error law, c·κ·u


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def columns(matrix, vectors):
    return (matrix @ vectors.unsqueeze(2)).squeeze(2)


def filled(n, d, memory, updates, seed=0, adjoint=False):
    """An estimate after some updates along random directions of one random well-conditioned Jacobian, and that Jacobian."""
    jacobian = 0.3 * draws(n, d, d, seed=seed) / d**0.5 - torch.eye(d, dtype=F64)
    inverse = BroydenInverse(n, d, memory, jacobian)
    for number in range(updates):
        direction = draws(n, d, seed=1000 * seed + number)
        if adjoint and number % 2:
            inverse.update_adjoint(direction, columns(jacobian.mT, direction))
        else:
            inverse.update(direction, columns(jacobian, direction))
    return inverse, jacobian


def affine(n=3, d=8, seed=0):
    """g(z) = J z + b, and products with Jᵀ."""
    jacobian = 0.5 * draws(n, d, d, seed=seed) / d**0.5 - torch.eye(d, dtype=F64)
    offset = draws(n, d, seed=seed + 1)
    return jacobian, (lambda z: columns(jacobian, z) + offset), (lambda z, s: columns(jacobian.mT, s)), offset


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_apply_is_dense(n, d, memory, updates, seed, adjoint):
    inverse, _ = filled(n, d, memory, updates, seed, adjoint)
    vectors, dense = draws(n, d, seed=7), inverse.dense()
    rounding = C * U * float(1 + (inverse.left.norm() * inverse.right.norm())) * float(vectors.norm())
    torch.testing.assert_close(inverse.apply(vectors), columns(dense, vectors), rtol=0, atol=rounding)
    torch.testing.assert_close(inverse.apply_transposed(vectors), columns(dense.mT, vectors), rtol=0, atol=rounding)
    torch.testing.assert_close(inverse.transposed().dense(), dense.mT, rtol=0, atol=rounding)
    torch.testing.assert_close(inverse.widened(memory + 2).dense(), dense, rtol=0, atol=rounding)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_last_condition_holds_also_when_pairs_were_dropped(n, d, memory, updates, seed):
    inverse, jacobian = filled(n, d, memory, updates, seed)
    step = draws(n, d, seed=5)
    change = columns(jacobian, step)
    inverse.update(step, change)
    scale = float(1 + inverse.left.norm() * inverse.right.norm())
    torch.testing.assert_close(inverse.apply(change), step, rtol=0, atol=C * U * scale * float(change.norm()))
    image = columns(jacobian.mT, step)
    inverse.update_adjoint(step, image)
    scale = float(1 + inverse.left.norm() * inverse.right.norm())
    torch.testing.assert_close(inverse.apply_transposed(image), step, rtol=0, atol=C * U * scale * float(image.norm()))


def test_updates_are_those_of_the_dense_matrices():
    inverse, jacobian = filled(2, 5, 20, 0)
    estimate = -torch.eye(5, dtype=F64).expand(2, 5, 5)
    for number in range(6):
        s = draws(2, 5, seed=number)
        squares = (s * s).sum(1)[:, None, None]
        if number % 2:
            inverse.update_adjoint(s, columns(jacobian.mT, s))
            estimate = estimate + s.unsqueeze(2) @ (s.unsqueeze(1) @ (jacobian - estimate)) / squares
        else:
            inverse.update(s, columns(jacobian, s))
            estimate = estimate + (jacobian - estimate) @ s.unsqueeze(2) @ s.unsqueeze(1) / squares
        condition = float(torch.linalg.cond(estimate).max())
        torch.testing.assert_close(
            inverse.dense(), torch.linalg.inv(estimate), rtol=C * condition * U, atol=C * condition * U
        )


def test_widened_drops_the_oldest_first():
    inverse, jacobian = filled(1, 6, 3, 5)
    kept = inverse.left[0, [0, 1]]  # of five updates in three places the fourth and fifth; the third is the oldest
    wide = inverse.widened(4)
    for number in range(2):
        direction = draws(1, 6, seed=50 + number)
        wide.update(direction, columns(jacobian, direction))
    torch.testing.assert_close(wide.left[0, 1:3], kept, rtol=0, atol=0)


def test_what_cannot_be_divided_by_keeps_the_estimate():
    inverse, jacobian = filled(3, 4, 2, 3)
    before = inverse.dense()
    step = draws(3, 4)
    change = columns(jacobian, step)
    change[0] = 0
    change[1] = float("nan")
    inverse.update(step, change)
    torch.testing.assert_close(inverse.dense()[:2], before[:2], rtol=0, atol=0)
    assert not torch.allclose(inverse.dense()[2], before[2])


@pytest.mark.parametrize("update", ["secant", "adjoint"])
def test_batched_is_one_sample_at_a_time(update):
    weight, offset = 0.9 * draws(6, 6) / 6**0.5, draws(5, 6, seed=2)
    offset[1:3] *= 1e-3  # easier samples end earlier
    wanted = draws(5, 6, seed=3)

    def system(rows):
        def function(z):
            return torch.tanh(z @ weight + offset[rows]) - z

        def pull(z, sigma):
            return ((1 - torch.tanh(z @ weight + offset[rows]) ** 2) * sigma) @ weight.T - sigma

        how = Broyden(iterations=50, memory=4, tolerance=1e-10, update=update)
        return broyden(function, torch.zeros_like(offset[rows]), how, pull=pull, outer=lambda z: wanted[rows])

    together = system(slice(None))
    assert together.converged.all()
    assert together.iterations.unique().numel() > 1
    for row in range(5):
        alone = system(slice(row, row + 1))
        assert alone.iterations[0] == together.iterations[row]
        torch.testing.assert_close(alone.solution[0], together.solution[row], rtol=1e-9, atol=1e-9)
        # products of another batch size round otherwise, and differences of late iterates magnify that
        torch.testing.assert_close(alone.inverse.dense()[0], together.inverse.dense()[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("update", "most"), [("secant", 16), ("adjoint", 9)])
def test_affine_systems_end_in_2d_steps_and_the_adjoint_update_knows_the_inverse(update, most):
    jacobian, function, pull, offset = affine()
    tolerance = 1e-12
    root = broyden(function, torch.zeros_like(offset), Broyden(20, 16, tolerance, update=update), pull=pull)
    assert root.converged.all()
    assert (
        int(root.iterations.max()) <= most
    )  # Gay 1979: 2 d steps; one per dimension, and one to see it, with the adjoint
    expected = torch.linalg.solve(jacobian, -offset.unsqueeze(2)).squeeze(2)
    condition = float(torch.linalg.cond(jacobian).max())
    torch.testing.assert_close(root.solution, expected, rtol=0, atol=condition * tolerance * 8)
    error = (root.inverse.dense() - torch.linalg.inv(jacobian)).norm(dim=(1, 2))
    if update == "adjoint":
        assert (error < 1e-8).all()
    else:
        assert (error > 1e-2).all()  # the solution is exact long before the inverse is: why OPA is needed


def test_outer_problem_awareness_makes_the_wanted_direction_exact():
    jacobian, function, pull, offset = affine()
    wanted = draws(3, 8, seed=9)
    expected = torch.linalg.solve(jacobian.mT, wanted.unsqueeze(2)).squeeze(2)

    def error(outer):
        how = Broyden(40, 60, 1e-12, outer_every=1)
        root = broyden(function, torch.zeros_like(offset), how, pull=pull, outer=outer)
        return (root.inverse.apply_transposed(wanted) - expected).norm(dim=1) / expected.norm(dim=1)

    assert (error(lambda z: wanted) < 0.05 * error(None)).all()


def test_samples_that_fail_are_told_apart_and_best_iterates_kept():
    def function(z):
        return torch.cat([0.1 * z[:1] + 1, torch.sqrt(2 - z[1:]) + 10]) - z  # the second leaves the domain of the root

    root = broyden(function, torch.zeros(2, 3, dtype=F64), Broyden(tolerance=1e-10))
    assert root.converged.tolist() == [True, False]
    assert root.solution.isfinite().all()
    torch.testing.assert_close(root.residuals, function(root.solution).norm(dim=1))


def test_a_sample_that_becomes_infinite_ends_there():
    root = broyden(lambda z: 1 / (1 - z), torch.zeros(1, 2, dtype=F64))  # the first step leads to z = 1
    assert root.iterations.tolist() == [1]
    torch.testing.assert_close(root.solution, torch.zeros(1, 2, dtype=F64), rtol=0, atol=0)


def test_the_tolerance_is_absolute_or_relative_to_the_start():
    _, function, _, offset = affine()
    small = 1e-6 / float(offset.norm())
    start = torch.zeros_like(offset)

    def solve(**how):
        return broyden(lambda z: small * function(z / small), start, Broyden(tolerance=1e-5, **how))

    assert (solve().iterations == 0).all()
    root = solve(relative=True)
    assert (root.iterations > 0).all()
    assert (root.residuals <= 1e-5 * small * offset.norm(dim=1)).all()
    assert root.converged.all()


def spd(d, condition, seed=0):
    basis, _ = torch.linalg.qr(draws(d, d, seed=seed))
    return (basis * condition ** torch.linspace(0, 1, d, dtype=F64)) @ basis.T


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 8), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_lbfgs_inverse_is_the_textbook_recursion(d, memory, updates, seed):
    hessian, inverse = spd(d, 10.0, seed), LbfgsInverse(memory)
    for number in range(updates):
        step = draws(d, seed=100 * seed + number)
        assert inverse.update(step, hessian @ step)
    recent = inverse.pairs
    assert len(recent) == min(updates, memory)
    matrix = torch.eye(d, dtype=F64)  # of the Hessian itself: B <- B - B s sᵀB / sᵀBs + y yᵀ / yᵀs
    if recent:
        matrix *= recent[-1][1].square().sum() / (recent[-1][0] @ recent[-1][1])
    for s, y in recent:
        image = matrix @ s
        matrix = matrix - torch.outer(image, image) / (s @ image) + torch.outer(y, y) / (y @ s)
    expected = torch.linalg.inv(matrix)
    rounding = C * d * float(torch.linalg.cond(matrix)) ** 2 * U * float(expected.norm())
    dense, vector = inverse.dense(matrix[0]), draws(d, seed=3)
    torch.testing.assert_close(dense, expected, rtol=0, atol=rounding)
    torch.testing.assert_close(inverse.apply(vector), dense @ vector, rtol=0, atol=rounding * float(vector.norm()))
    if recent:
        torch.testing.assert_close(dense @ recent[-1][1], recent[-1][0], rtol=0, atol=rounding * 10)


def test_lbfgs_refuses_pairs_without_positive_curvature():
    inverse, step = LbfgsInverse(3), draws(4)
    for change in (-step, torch.zeros(4, dtype=F64), step * float("nan"), step * float("inf")):
        assert not inverse.update(step, change)
    assert not inverse.pairs
    assert inverse.update(step, step)


@given(st.integers(1, 20), st.floats(0, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_lbfgs_minimises_quadratics(d, log_condition, seed):
    hessian, offset = spd(d, 10**log_condition, seed), draws(d, seed=seed + 1)
    found = lbfgs(lambda x: x @ hessian @ x / 2 - offset @ x, torch.zeros(d, dtype=F64), Lbfgs(tolerance=1e-7))
    assert found.converged
    # the least eigenvalue is 1
    assert float((found.solution - torch.linalg.solve(hessian, offset)).norm()) <= 1.01e-7 * d**0.5


def test_lbfgs_minimises_rosenbrock_in_any_shape():
    def rosenbrock(x):
        flat = x.reshape(-1)
        return (100 * (flat[1:] - flat[:-1] ** 2) ** 2 + (1 - flat[:-1]) ** 2).sum()

    found = lbfgs(rosenbrock, torch.full((2, 3), -1.0, dtype=F64), Lbfgs(tolerance=1e-9, relative=True))
    assert found.solution.shape == (2, 3)
    torch.testing.assert_close(found.solution, torch.ones(2, 3, dtype=F64), rtol=1e-5, atol=1e-5)


@given(st.floats(-6, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:L-BFGS ended")
def test_steps_satisfy_the_weak_wolfe_conditions_whatever_the_scale(log_scale, seed):
    scale, start = 10**log_scale, draws(4, seed=seed) + 3

    def function(x):
        return scale * (x.square() / 2 + x.cos()).sum()

    found = lbfgs(function, start, Lbfgs(iterations=1, tolerance=1e-12))
    assert found.iterations == 1
    before, after = (torch.func.grad(function)(one) for one in (start, found.solution))
    step = found.solution - start
    assert found.value <= float(function(start) + 1e-4 * before @ step)
    assert float(after @ step) >= 0.9 * float(before @ step)


def test_lbfgs_stops_relative_to_the_start_if_asked():
    def function(x):
        return 1e-8 * (x.square().sum() / 2 + x.exp().sum())

    start = torch.ones(3, dtype=F64)
    assert lbfgs(function, start).iterations == 0
    first = float(torch.func.grad(function)(start).norm())
    found = lbfgs(function, start, Lbfgs(tolerance=1e-6, relative=True))
    assert found.converged
    assert 0 < found.residual <= 1e-6 * first


def test_lbfgs_says_when_it_ends_early():
    hessian = spd(20, 1e4)
    with pytest.warns(UserWarning, match=r"ended after 3 iterations with a gradient of norm .* raise iterations"):
        found = lbfgs(lambda x: x @ hessian @ x / 2, torch.ones(20, dtype=F64), Lbfgs(iterations=3))
    assert not found.converged
    assert found.iterations == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Broyden(iterations=0), r"iterations must be a whole number from 1, got 0"),
        (lambda: Broyden(memory=2.5), r"memory must be a whole number from 1, got 2.5"),
        (lambda: Broyden(tolerance=0.0), r"tolerance must be a number above 0, got 0.0"),
        (lambda: Broyden(tolerance=float("nan")), r"tolerance must be a number above 0, got nan"),
        (lambda: Broyden(tolerance=abs), r"tolerance must be a number above 0, got <built-in function abs>"),
        (lambda: Broyden(relative="yes"), r"relative must be one of True, False, got 'yes'"),
        (lambda: Broyden(update="bad"), r"update must be one of 'secant', 'adjoint', got 'bad'"),
        (lambda: Broyden(outer_every=0), r"outer_every must be a whole number of iterations from 1, or None, got 0"),
        (lambda: Lbfgs(iterations=True), r"iterations must be a whole number from 1, got True"),
        (lambda: Lbfgs(memory=0), r"memory must be a whole number from 1, got 0"),
        (lambda: Lbfgs(tolerance=-1), r"tolerance must be a number above 0, got -1"),
        (lambda: Lbfgs(outer_every=1.5), r"outer_every must be a whole number of iterations from 1, or None, got 1.5"),
        (lambda: LbfgsInverse(0), r"memory must be a whole number from 1, got 0"),
        (lambda: BroydenInverse(2, 0, 1, draws(1)), r"size must be a whole number from 1, got 0"),
        (lambda: BroydenInverse(2, 2, 3, draws(1)).widened(2), r"memory must be a number from 3, got 2"),
        (lambda: broyden(lambda z: z, draws(3)), r"start must have the shape \[samples, entries\].*got \[3\]"),
        (lambda: broyden(lambda z: z, draws(0, 3)), r"start must .* not be empty, got \[0, 3\]"),
        (lambda: broyden(lambda z: z[:, :1], draws(2, 3)), r"function must return .*\[2, 3\], got \[2, 1\]"),
        (lambda: broyden(lambda z: z / 0, draws(2, 3)), r"function is not finite at the start, in 2 of 2 samples"),
        (lambda: broyden(lambda z: z, draws(2, 3), outer=lambda z: z), r"pull must be given for adjoint updates"),
        (
            lambda: broyden(lambda z: z, draws(2, 3), Broyden(update="adjoint")),
            r"pull must be given for adjoint updates",
        ),
        (lambda: lbfgs(lambda x: 2 * x, draws(3)), r"function must return a scalar, got the shape \[3\]"),
        (lambda: lbfgs(lambda x: x.sum() / 0, draws(3)), r"not finite at the start"),
    ],
)
def test_bad_input_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()
