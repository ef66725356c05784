"""Hypergradients: against explicit solves and the implicit function theorem, densely."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib.implicit import DeepEquilibrium, Implicit, fixed_point, hypergradient
from curvlib.solving import Broyden, Lbfgs, lbfgs

F64 = torch.float64
U = torch.finfo(F64).eps
TIGHT = Broyden(200, 200, 1e-13)
EXACT = Implicit(TIGHT, "exact", adjoint=Broyden(200, 200, 1e-13, relative=True))


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Tanh(nn.Module):
    """z <- tanh(W z + x), a contraction with ‖W‖₂ = ``strength``."""

    def __init__(self, size=10, strength=0.9, seed=0):
        super().__init__()
        weight = draws(size, size, seed=seed)
        self.weight = nn.Parameter(strength * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z, x):
        return torch.tanh(z @ self.weight.T + x)


def problem(size=10, n=6, seed=0, **how):
    """A layer, inputs that are differentiated too, and the weights of a linear loss."""
    layer = Tanh(size, seed=seed, **how)
    return layer, draws(n, size, seed=seed + 1).requires_grad_(), draws(n, size, seed=seed + 2)


def gradients(layer, x, wanted, settings, outer=None):
    """Of the weight and of the inputs, flat; and how the solve went."""
    model = DeepEquilibrium(layer, settings)
    found = torch.autograd.grad((model(x, outer) * wanted).sum(), (layer.weight, x))
    return torch.cat([one.reshape(-1) for one in found]), model.root


def dense_gradients(layer, x, wanted):
    """The same by (I - J)ᵀ v = ∇L with the Jacobian of every sample formed."""
    z = fixed_point(lambda z: layer(z, x), torch.zeros_like(x), EXACT)[0].detach()
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda one, i=i: layer(one, x[i]), z[i]) for i in range(len(z))]
    )
    eye = torch.eye(z.shape[1], dtype=F64)
    v = torch.linalg.solve((eye - jacobians).mT, wanted.unsqueeze(2)).squeeze(2)
    found = torch.autograd.grad((layer(z, x) * v).sum(), (layer.weight, x))
    return torch.cat([one.reshape(-1) for one in found]), float(torch.linalg.cond(eye - jacobians).max())


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_exact_is_autograd_through_a_solve():
    weight = (0.5 * draws(5, 5) / 5**0.5).requires_grad_()
    x, wanted = draws(3, 5, seed=1).requires_grad_(), draws(3, 5, seed=2)
    z, root = fixed_point(lambda z: z @ weight.T + x, torch.zeros(3, 5, dtype=F64), EXACT)
    solved = torch.linalg.solve(torch.eye(5, dtype=F64) - weight, x.T).T
    condition = float(torch.linalg.cond(torch.eye(5, dtype=F64) - weight.detach()))
    assert root.converged.all()
    torch.testing.assert_close(z, solved, rtol=0, atol=1e-12 * condition)
    found = torch.autograd.grad((z * wanted).sum(), (weight, x))
    expected = torch.autograd.grad((solved * wanted).sum(), (weight, x))
    for one, other in zip(found, expected, strict=True):
        assert apart(one, other) <= 1e-12 * condition**2


def test_exact_is_the_implicit_function_theorem():
    layer, x, wanted = problem()
    expected, condition = dense_gradients(layer, x, wanted)
    assert apart(gradients(layer, x, wanted, EXACT)[0], expected) <= 1e-12 * condition


def test_jacobian_free_is_one_step_of_backpropagation():
    layer, x, wanted = problem()
    found, root = gradients(layer, x, wanted, Implicit(TIGHT, "jacobian-free"))
    one = torch.autograd.grad((layer(root.solution, x) * wanted).sum(), (layer.weight, x))
    torch.testing.assert_close(found, torch.cat([part.reshape(-1) for part in one]), rtol=0, atol=0)


def test_shine_on_an_affine_layer_is_exact_with_adjoint_updates():
    weight = (0.5 * draws(5, 5) / 5**0.5).requires_grad_()
    x, wanted = draws(3, 5, seed=1), draws(3, 5, seed=2)
    how = Implicit(Broyden(20, 10, 1e-13, update="adjoint"), fallback=None)
    z, _ = fixed_point(lambda z: z @ weight.T + x, torch.zeros(3, 5, dtype=F64), how)
    (found,) = torch.autograd.grad((z * wanted).sum(), weight)
    solved = torch.linalg.solve(torch.eye(5, dtype=F64) - weight, x.T).T
    (expected,) = torch.autograd.grad((solved * wanted).sum(), weight)
    assert apart(found, expected) <= 1e-9


def test_shine_comes_closer_with_the_tolerance_and_beats_no_jacobian():
    errors = {}
    for tolerance in (1e-1, 1e-3, 1e-12):
        how = Implicit(Broyden(200, 200, tolerance, update="adjoint"), fallback=None)
        errors[tolerance] = []
        for seed in range(5):
            layer, x, wanted = problem(seed=10 * seed)
            expected, _ = dense_gradients(layer, x, wanted)
            found, _ = gradients(layer, x, wanted, how)
            errors[tolerance].append(float(1 - F.cosine_similarity(found, expected, dim=0)))
    loose, middle, tight = (torch.tensor(errors[key]) for key in errors)
    assert (tight < middle).all()
    assert (middle < loose).all()
    assert (tight < 1e-5).all()
    free = gradients(layer, x, wanted, Implicit(TIGHT, "jacobian-free"))[0]
    assert errors[1e-3][-1] < float(1 - F.cosine_similarity(free, expected, dim=0)) / 10


def test_outer_problem_awareness_brings_the_hypergradient_closer():
    for seed in range(5):
        layer, x, wanted = problem(seed=10 * seed)
        expected, _ = dense_gradients(layer, x, wanted)
        how = Implicit(Broyden(200, 200, 1e-8, outer_every=2), fallback=None)
        plain, aware = (gradients(layer, x, wanted, how, outer)[0] for outer in (None, lambda z, w=wanted: w))
        assert apart(aware, expected) < 0.5 * apart(plain, expected)


def diagonal(slopes, **how):
    """v over ∇L = 0.1 for z = s z + x, one entry a sample."""
    s = torch.tensor(slopes, dtype=F64).unsqueeze(1)
    x = torch.ones(len(slopes), 1, dtype=F64, requires_grad=True)
    z, root = fixed_point(lambda z: s * z + x, torch.zeros_like(x), Implicit(TIGHT, **how))
    return torch.autograd.grad(0.1 * z.sum(), x)[0].squeeze(1) / 0.1, root


def test_fallback_is_for_the_samples_whose_direction_is_too_long():
    slopes = [0.0, 0.2, 0.44, 0.45, 0.6, -1.0]  # in one dimension the estimate is exact: v = ∇L / (1 - s)
    inverse = [1 / (1 - s) for s in slopes]  # 1, 1.25, 1.786, 1.818, 2.5, 0.5
    found, _ = diagonal(slopes, fallback=1.8)
    expected = torch.tensor([one if one <= 1.8 else 1.0 for one in inverse], dtype=F64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found, _ = diagonal(slopes, fallback=None)
    torch.testing.assert_close(found, torch.tensor(inverse, dtype=F64), rtol=1e-10, atol=0)
    found, _ = diagonal(slopes, fallback=1.8, refine=3)  # and is refined from there
    torch.testing.assert_close(found, torch.tensor(inverse, dtype=F64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backward", ["shine", "jacobian-free"])
def test_refinement_ends_at_the_exact_hypergradient(backward):
    layer, x, wanted = problem(size=8)
    expected, condition = dense_gradients(layer, x, wanted)
    adjoint = Broyden(200, 200, 1e-13, relative=True)
    how = [Implicit(TIGHT, backward, None, steps, adjoint) for steps in (1, 2, 3, 5, 8, 12, 60)]
    residuals = []
    for one in how:
        found, _ = gradients(layer, x, wanted, one)
        residuals.append(apart(found, expected))
    assert residuals[-1] <= 1e-12 * condition
    # the residual of the best iterate cannot grow; its error may, by the condition number
    for i, early in enumerate(residuals):
        assert all(late <= condition * early + U for late in residuals[i + 1 :])
    assert residuals[5] < 1e-2 * residuals[0]


def test_refinement_has_room_beside_the_estimate():
    layer, x, wanted = problem(size=8)
    expected, condition = dense_gradients(layer, x, wanted)
    narrow = Broyden(500, 3, 1e-12)
    # enough steps with all their pairs, 1e-7 away where only the forward's three places are used
    how = Implicit(narrow, "shine", None, 12, Broyden(tolerance=1e-13, relative=True))
    assert apart(gradients(layer, x, wanted, how)[0], expected) <= 1e-11 * condition


def test_refinement_leaves_alone_what_meets_the_tolerance():
    layer, x, wanted = problem()
    loose = Broyden(tolerance=0.9, relative=True)
    plain, refined = (gradients(layer, x, wanted, Implicit(TIGHT, "shine", None, steps, loose))[0] for steps in (0, 5))
    torch.testing.assert_close(refined, plain, rtol=0, atol=0)


def test_refinement_starts_from_the_estimate_transposed():
    layer, x, wanted = problem()
    expected, _ = dense_gradients(layer, x, wanted)
    with_estimate, without = (
        apart(gradients(layer, x, wanted, Implicit(TIGHT, backward, None, 5))[0], expected)
        for backward in ("shine", "jacobian-free")
    )
    assert with_estimate < without / 3


def test_the_least_residuals_never_grow_with_refinement():
    layer, x, wanted = problem()
    model = DeepEquilibrium(layer, Implicit(TIGHT))
    z = model(x)
    root = model.root
    argument = root.solution.clone().requires_grad_()
    value = layer(argument, x) - argument

    def residual(refine):
        how = Implicit(TIGHT, "shine", None, refine, Broyden(tolerance=1e-13, relative=True))
        (v,) = torch.autograd.grad((DeepEquilibrium(Offset(layer), how)(x, None) * wanted).sum(), Offset.last)
        return (torch.autograd.grad(value, argument, v, retain_graph=True)[0] + wanted).norm(dim=1)

    assert z.shape == x.shape
    sizes = torch.stack([residual(refine) for refine in range(8)])
    assert (sizes[1:] <= sizes[:-1] * (1 + 1e-12)).all()


class Offset(nn.Module):
    """A layer plus zeros, whose gradient is v itself."""

    last: torch.Tensor

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z, x):
        if not hasattr(self, "offset"):
            Offset.last = self.offset = torch.zeros_like(z, requires_grad=True)
        return self.layer(z, x) + self.offset


def test_samples_of_any_shape_and_inputs_without_gradient():
    weight = 0.1 * draws(2, 2, 3, 3)
    x = draws(4, 2, 5, 5, seed=1)
    model = DeepEquilibrium(lambda z, x: torch.tanh(F.conv2d(z, weight, padding=1) + x), Implicit(TIGHT, "exact"))
    z = model(x)
    assert not z.requires_grad
    torch.testing.assert_close(z, torch.tanh(F.conv2d(z, weight, padding=1) + x), rtol=0, atol=1e-11)


def test_it_says_when_samples_did_not_converge():
    layer, x, wanted = problem()
    with pytest.warns(
        UserWarning, match=r"6 of 6 samples did not reach the tolerance of the fixed point within 2 iterations"
    ):
        DeepEquilibrium(layer, Implicit(Broyden(2, tolerance=1e-12)))(x)
    z = DeepEquilibrium(layer, Implicit(TIGHT, "exact", adjoint=Broyden(1, tolerance=1e-12, relative=True)))(x)
    with pytest.warns(UserWarning, match=r"did not reach the tolerance of the adjoint equation within 1 iterations"):
        (z * wanted).sum().backward()


def test_what_it_cannot_do_is_refused_in_words():
    layer, x, _ = problem()
    z = DeepEquilibrium(layer)(x)
    with pytest.raises(RuntimeError, match="gradients of first order only"):
        torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"the gradient at the fixed point is not finite, in 6 of 6 samples"):
        torch.autograd.grad(DeepEquilibrium(layer)(x).sum() * float("nan"), x)
    with pytest.raises(ValueError, match=r"not finite at the start, in 1 of 2 samples"):
        fixed_point(lambda z: z + torch.tensor([[float("inf")], [0.0]]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"f must return the shape of z, \[2, 3\], got \[2, 1\]"):
        fixed_point(lambda z: z[:, :1], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"start must have samples, then entries.*got the shape \[3\]"):
        fixed_point(lambda z: z, torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backward": "adjoint"}, r"backward must be one of 'exact', 'shine', 'jacobian-free', got 'adjoint'"),
        ({"fallback": 0.0}, r"fallback must be a number above 0, got 0.0"),
        ({"refine": -1}, r"refine must be a whole number of steps from 0, got -1"),
        ({"refine": 2, "backward": "exact"}, r"refine must be 0 where the backward is 'exact'.*got 2"),
        ({"forward": 3}, r"forward must be a Broyden, got 3"),
        ({"adjoint": Broyden(update="adjoint")}, r"update of the adjoint's Broyden must be 'secant', got 'adjoint'"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        Implicit(**settings)


def ridge(d=12, condition=100.0):
    """h(x, θ) = ½ xᵀAx + ½ Σ exp(θ) x² - bᵀx, L(x, θ) = ½ ‖x - c‖² + Σ θ², and dL/dθ through an explicit solve."""
    basis, _ = torch.linalg.qr(draws(d, d))
    matrix = (basis * condition ** torch.linspace(0, 1, d, dtype=F64)) @ basis.T
    offset, target, theta = draws(d, seed=1), draws(d, seed=2), draws(d, seed=3)

    def inner(x, t):
        return x @ matrix @ x / 2 + (t.exp() * x * x).sum() / 2 - offset @ x

    def outer(x, t):
        return (x - target).square().sum() / 2 + t.square().sum()

    t = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(outer(torch.linalg.solve(matrix + torch.diag(t.exp()), offset), t), t)
    return inner, outer, theta, expected, offset, target


def solve(inner, theta, size, tolerance, outer=None, every=2):
    how = Lbfgs(memory=200, tolerance=tolerance, outer_every=every)
    return lbfgs(lambda x: inner(x, theta), torch.zeros(size, dtype=F64), how, outer=outer)


def test_exact_hypergradient_is_autograd_through_a_solve():
    inner, outer, theta, expected, offset, _ = ridge()
    found = solve(inner, theta, len(offset), 1e-9)
    exact = hypergradient(inner, outer, theta, found.solution, backward="exact", tolerance=1e-12)
    assert apart(exact.value, expected) <= 1e-7
    assert exact.residual <= 1e-12
    scaled = hypergradient(
        inner, lambda x, t: 1e-9 * outer(x, t), theta, found.solution, backward="exact", tolerance=1e-9
    )
    assert apart(scaled.value, 1e-9 * expected) <= 1e-7  # the tolerance is relative to ∇L
    assert exact.direction.shape == found.solution.shape


def test_exact_hypergradient_of_logistic_regression():
    inputs, held = draws(40, 6), draws(30, 6, seed=1)
    labels, held_labels = (draws(40, seed=2) > 0).double(), (draws(30, seed=3) > 0).double()

    def inner(w, t):
        return F.binary_cross_entropy_with_logits(inputs @ w, labels, reduction="sum") + t.exp() * (w @ w) / 2

    def outer(w, t):
        return F.binary_cross_entropy_with_logits(held @ w, held_labels)

    theta = torch.tensor(0.3, dtype=F64)
    w = solve(inner, theta, 6, 1e-10).solution
    hessian = torch.autograd.functional.hessian(lambda v: inner(v, theta), w)
    slope = torch.autograd.functional.jacobian(lambda v: outer(v, theta), w)
    expected = -slope @ torch.linalg.solve(hessian, theta.exp() * w)
    found = hypergradient(inner, outer, theta, w, backward="exact", tolerance=1e-12).value
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_outer_pairs_make_the_bilevel_hypergradient_asymptotically_exact():
    inner, outer, theta, expected, offset, target = ridge()

    def error(tolerance, outer_gradient):
        found = solve(inner, theta, len(offset), tolerance, outer_gradient)
        estimate = hypergradient(inner, outer, theta, found.solution, found.inverse)
        assert estimate.products == 0
        return apart(estimate.value, expected)

    aware = [error(tolerance, lambda x: x - target) for tolerance in (1e-1, 1e-3, 1e-5, 1e-7)]
    assert all(late < early / 3 for early, late in pairwise(aware))
    assert aware[-1] < 1e-4
    assert aware[-1] < error(1e-7, None) / 100


def test_refinement_of_bilevel_ends_at_the_exact_hypergradient():
    inner, outer, theta, expected, offset, target = ridge()
    found = solve(inner, theta, len(offset), 1e-9)
    errors = []
    for refine in range(31):
        one = hypergradient(inner, outer, theta, found.solution, found.inverse, refine=refine, tolerance=1e-13)
        errors.append(float((one.direction - exact_direction(inner, theta, found.solution, target)).norm()))
        assert one.products <= refine + 1
    # conjugate gradients shrink the error itself at every step
    assert all(late <= early * (1 + 1e-6) + 1e-12 for early, late in pairwise(errors))
    assert apart(one.value, expected) <= 1e-7


def exact_direction(inner, theta, x, target):
    hessian = torch.autograd.functional.hessian(lambda v: inner(v, theta), x)
    return torch.linalg.solve(hessian, x - target)


def test_jacobian_free_bilevel_takes_the_outer_gradient():
    inner, outer, theta, _, offset, target = ridge()
    x = solve(inner, theta, len(offset), 1e-6).solution
    found = hypergradient(inner, outer, theta, x, backward="jacobian-free")
    torch.testing.assert_close(found.value, 2 * theta - theta.exp() * x * (x - target))
    assert found.residual is None


def test_bilevel_problems_it_cannot_solve_are_refused_in_words():
    inner, outer, theta, _, offset, _ = ridge()
    x = torch.ones(len(offset), dtype=F64)
    with pytest.raises(ValueError, match=r"estimate must be the inverse of the inner solve.*got None"):
        hypergradient(inner, outer, theta, x)
    with pytest.raises(ValueError, match=r"backward must be one of"):
        hypergradient(inner, outer, theta, x, backward="opa")
    with pytest.raises(ValueError, match=r"tolerance must be a number above 0, got 0"):
        hypergradient(inner, outer, theta, x, backward="exact", tolerance=0)
    with pytest.raises(ValueError, match=r"must be strictly convex at the solution, got a curvature of -"):
        hypergradient(lambda x, t: -inner(x, t), outer, theta, x, backward="exact")
    with pytest.raises(ValueError, match=r"the gradient of outer at the solution is not finite"):
        hypergradient(inner, lambda x, t: outer(x, t) * float("inf"), theta, x, backward="exact")
    with pytest.warns(UserWarning, match=r"conjugate gradients ended after 1 iterations at a relative residual of"):
        hypergradient(inner, outer, theta, x, backward="exact", iterations=1)
