"""Theorems about curvature, with the library's own blocks. Those about KFAC alone are in tests/optimizers/test_kfac.py."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root
from curvlib.analysis import Objective, Operator, fisher, hessian
from curvlib.analysis.approximation import Approximation
from curvlib.analysis.exact import example_gradients
from curvlib.blocks import EigenBlock
from tests.analysis.problems import F64, N, Problem, close, problem
from tests.listening import sample_gradients

EPS = torch.finfo(F64).eps
KRONECKER = "| o, i k..."
LIKELIHOODS = {"categorical": nn.CrossEntropyLoss(), "gaussian": nn.MSELoss()}

seeds = st.integers(0, 1000)
both_labels = pytest.mark.parametrize("labels", ["data", "exact"])
both_losses = pytest.mark.parametrize("likelihood", LIKELIHOODS)
quickly = settings(max_examples=15, deadline=None)


def listened(some, partition, labels, of="samples", join_bias=True):
    """An optimizer that heard one pass and took a step of length zero."""
    moment = Moment(of, average="mean", labels=labels)
    optimizer = CurvatureOptimizer(some.model, Recipe(partition, moment, Root(1, 1.0), join_bias=join_bias), lr=0.0)
    outputs = some.model(some.inputs)
    likelihood = "categorical" if isinstance(some.loss, nn.CrossEntropyLoss) else "gaussian"
    scale = 1.0 if likelihood == "categorical" else 2 / outputs[0].numel()
    optimizer.observe(outputs, likelihood, scale=scale)
    some.loss(outputs, some.targets).backward()
    optimizer.step()
    return optimizer


def network_of(some, partition, labels, join_bias=True):
    """The blocks of all layers, as one matrix."""
    optimizer = listened(some, partition, labels, join_bias=join_bias)
    blocks = [optimizer.curvature(layer) for layer in layers_of(some.model)]
    optimizer.detach()
    return torch.block_diag(*blocks)


def layers_of(model):
    return [module for module in model if hasattr(module, "weight")]


def identity(size):
    return torch.eye(size, dtype=F64)


def least_eigenvalue(matrix):
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def is_positive(matrix, scale):
    """Whether no eigenvalue is below zero by more than rounding of matrices of this size."""
    return least_eigenvalue(matrix) >= -100 * len(matrix) * EPS * float(scale)


# -- nested partitions ------------------------------------------------------------------------------------------------


def perceptron(draw):
    """Layers with biases, which are columns of their own, cut in pairs."""
    widths = draw(st.lists(st.integers(2, 4), min_size=2, max_size=3))
    modules = [(nn.Linear(one, two), nn.Tanh()) for one, two in pairwise(widths)]
    model = nn.Sequential(*(module for pair in modules for module in pair))
    places = []
    for number, layer in enumerate(layers_of(model)):
        o, i = layer.weight.shape
        places += [(number, row, column // 2, column) for row in range(o) for column in range(i)]
        places += [(number, row, i // 2, i) for row in range(o)]
    return model, torch.randn(draw(st.integers(1, 5)), widths[0], dtype=F64), places, True


def convolutions(draw):
    """A strided convolution and a readout without biases; the readout's kernels have one entry."""
    inputs, outputs, kernel = (draw(st.integers(1, 2)) for _ in range(3))
    first = nn.Conv2d(inputs, outputs, kernel, stride=2, bias=False)
    x = torch.randn(draw(st.integers(1, 4)), inputs, 4, 4, dtype=F64)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(4 * outputs, 2, bias=False))
    places = []
    for number, layer in enumerate(layers_of(model)):
        o, i, k = layer.weight.flatten(2).shape if layer.weight.ndim > 2 else (*layer.weight.shape, 1)
        places += [(number, row, column, entry) for row in range(o) for column in range(i) for entry in range(k)]
    return model, x, places, False


CHAINS = {  # from fine to coarse; the network itself is the end of every chain
    perceptron: ["... |", "o | i/2", "o | i", "| ..."],
    convolutions: ["... |", "o i | k...", "o | ...", "| ..."],
}


@st.composite
def nested(draw):
    """(matrices from fine to coarse, by curvlib; the same by masks, on the exact Fisher)."""
    torch.manual_seed(draw(seeds))
    kind = draw(st.sampled_from(list(CHAINS)))
    model, x, places, join_bias = kind(draw)
    model = model.double()
    labels, likelihood = draw(st.sampled_from(["data", "exact"])), draw(st.sampled_from(list(LIKELIHOODS)))
    outputs = model(x).detach()
    targets = (
        torch.randint(0, outputs.shape[1], (len(x),)) if likelihood == "categorical" else torch.randn_like(outputs)
    )
    some = Problem(model, LIKELIHOODS[likelihood], x, targets)
    held = [network_of(some, text, labels, join_bias) for text in CHAINS[kind]]
    exact = fisher(some.objective(), labels)
    masks = [[[a[:level] == b[:level] for b in places] for a in places] for level in (4, 3, 2, 1)]
    return [*held, exact], [exact * torch.tensor(mask) for mask in masks] + [exact]


@quickly
@given(nested())
def test_projections_of_the_fisher_on_nested_partitions_are_ordered(chains):
    """Entries within mini-blocks within neurons within layers within the network.

    What is ordered: the Frobenius error, which falls; the log-determinant of the damped matrix, which falls (Fischer).
    What stays: the trace, and that no eigenvalue is negative. No order is claimed, nor true, of damped inverses, of the
    lengths of directions, or of gᵀ(F + λI)⁻¹g; nor has KFAC a place in the chain, since it is no projection.
    """
    held, masked = chains
    exact = held[-1]
    scale = float(exact.trace())
    for one, two in zip(held, masked, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12 * scale)
        assert float(one.trace()) == pytest.approx(scale, rel=1e-12)
        assert is_positive(one, scale)
    errors = [float((matrix - exact).norm()) for matrix in held]
    assert all(fine >= coarse - 1e-12 * scale for fine, coarse in pairwise(errors))
    damping = 0.01 * scale / len(exact) + 1e-12
    volumes = [float(torch.logdet(matrix + damping * identity(len(matrix)))) for matrix in held]
    rounding = 100 * len(exact) ** 2 * EPS * (scale / damping)  # D eigenvalues, each to eps times the condition number
    assert all(fine >= coarse - rounding for fine, coarse in pairwise(volumes))


@both_labels
def test_the_order_of_nested_partitions_is_strict(labels):
    some = problem("perceptron")
    held = [network_of(some, text, labels) for text in CHAINS[perceptron]] + [fisher(some.objective(), labels)]
    errors = [float((matrix - held[-1]).norm() / held[-1].norm()) for matrix in held]
    volumes = [float(torch.logdet(matrix + 1e-3 * identity(len(matrix)))) for matrix in held]
    assert all(fine > coarse * (1 + 1e-3) for fine, coarse in pairwise(errors))
    assert all(fine > coarse + 0.1 for fine, coarse in pairwise(volumes))


# -- Shampoo ----------------------------------------------------------------------------------------------------------


def accumulated(gradients, composition="power-mean", partition="| o, i"):
    """The curvature after steps with some gradients."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    moment = Moment(average="sum", composition=composition)
    optimizer = CurvatureOptimizer([weight], Recipe(partition, moment, Root(0.5, 1.0)), lr=0.0)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return optimizer.curvature(weight)


def second_moment(gradients):
    return sum(gradient.flatten().outer(gradient.flatten()) for gradient in gradients)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 5), st.integers(1, 6), seeds)
def test_shampoo_is_at_least_the_full_matrix_over_the_rank_of_gradients(rows, columns, rank, steps, seed):
    """1/r Σ vec(G) vec(G)ᵀ <= (Σ G Gᵀ)^½ ⊗ (Σ Gᵀ G)^½ in the Loewner order (Gupta et al. 2018, lemma 8)."""
    torch.manual_seed(seed)
    rank = min(rank, rows, columns)
    gradients = [torch.randn(rows, rank, dtype=F64) @ torch.randn(rank, columns, dtype=F64) for _ in range(steps)]
    shampoo, full = accumulated(gradients), second_moment(gradients)
    slack = EPS**0.5 * float(full.trace())  # roots of factors without full rank: the root of what rounding leaves
    assert least_eigenvalue(shampoo - full / rank) >= -slack


def test_shampoos_bound_needs_the_rank():
    """Of the identity of rank r both sides of the bound touch."""
    for rank in (2, 3, 4):
        shampoo, full = accumulated([identity(rank)]), second_moment([identity(rank)])
        assert least_eigenvalue(shampoo - full / rank) == pytest.approx(0.0, abs=1e-12)
        assert least_eigenvalue(shampoo - full) == pytest.approx(1.0 - rank)


@quickly
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), seeds)
def test_normalised_by_the_trace_the_product_of_a_rank_one_gradient_is_exact(shape, seed):
    """⊗ F_i / tr^(k-1) = vec(G) vec(G)ᵀ where G is an outer product of vectors (TNT)."""
    torch.manual_seed(seed)
    gradient = torch.ones((), dtype=F64)
    for size in shape:
        gradient = gradient[..., None] * torch.randn(size, dtype=F64)
    held = accumulated([gradient], "trace", "| ,...")
    torch.testing.assert_close(held, second_moment([gradient]), rtol=1e-11, atol=1e-13 * float(held.trace()))


# -- EKFAC ------------------------------------------------------------------------------------------------------------


def factors(optimizer, layer):
    """Of the output gradients, then of the inputs with a bias column last."""
    held = optimizer.state[layer.weight]
    outputs, inputs = (value.squeeze(0) for name, value in held.items() if name.startswith("factor"))
    return outputs, inputs


def joined(weights, biases):
    """Gradients ``[n, o, i + 1]``."""
    return torch.cat([weights, biases[:, :, None]], 2)


def weights_first(matrix, outputs):
    """Rows and columns of ``[o, i + 1]`` in the order of weight and bias."""
    index = torch.arange(len(matrix)).view(outputs, -1)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return matrix[order][:, order]


def ekfac(optimizer, layer, gradients, n):
    """KFAC's eigenvectors with the second moments of the gradients of examples in them (George et al. 2018)."""
    outputs, inputs = (torch.linalg.eigh(factor).eigenvectors for factor in factors(optimizer, layer))
    moments = (outputs.T @ gradients @ inputs).square().sum(0) / n
    basis = torch.kron(outputs, inputs)
    return weights_first(basis @ moments.flatten().diag() @ basis.T, len(outputs))


@both_labels
@pytest.mark.parametrize("seed", range(3))
def test_corrected_eigenvalues_keep_the_trace_and_are_nearer_than_kfac(labels, seed):
    torch.manual_seed(seed)
    some = problem("perceptron")
    some.inputs = torch.randn_like(some.inputs)
    optimizer = listened(some, KRONECKER, labels, of="signals")
    rows = sample_gradients(some.model, some.inputs, some.targets, "categorical", labels)
    for name in ("0", "2"):
        layer = some.model[int(name)]
        exact = fisher(some.objective(), labels, layer)
        kfac = optimizer.curvature(layer)
        corrected = ekfac(optimizer, layer, joined(rows[f"{name}.weight"], rows[f"{name}.bias"]), N)
        assert float(corrected.trace() / exact.trace()) == pytest.approx(1.0, rel=1e-12)
        assert abs(float(kfac.trace() / exact.trace()) - 1) > 1e-3
        assert (corrected - exact).norm() < (kfac - exact).norm() * (1 - 1e-3)
        seen = Approximation(curvlib.EKFAC, some.objective(), labels, layer)
        (held,) = seen.held
        torch.testing.assert_close(held.dense(), corrected, rtol=0, atol=1e-10 * float(corrected.norm()))


# -- the Hessian ------------------------------------------------------------------------------------------------------


def deep(activation, likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3)).double()
    x = torch.randn(7, 4, dtype=F64)
    y = torch.randint(0, 3, (7,)) if likelihood == "categorical" else torch.randn(7, 3, dtype=F64)
    return Objective(model, LIKELIHOODS[likelihood], x, y)


@both_losses
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Hardtanh(), nn.Identity()])
def test_in_a_piecewise_linear_network_the_hessian_of_a_layer_is_its_gauss_newton_matrix(activation, likelihood):
    objective = deep(activation, likelihood)
    for layer in objective.layers:
        close(hessian(objective, layer), fisher(objective, "exact", layer), 1e-12)
    whole, newton = hessian(objective), fisher(objective)
    assert (whole - newton).norm() > 0.1 * newton.norm()  # between layers they differ


@both_losses
def test_where_activations_bend_it_is_not(likelihood):
    objective = deep(nn.Tanh(), likelihood)
    differences = [hessian(objective, layer) - fisher(objective, "exact", layer) for layer in objective.layers]
    sizes = [float(fisher(objective, "exact", layer).norm()) for layer in objective.layers]
    ratios = [float(one.norm()) / size for one, size in zip(differences, sizes, strict=True)]
    assert min(ratios[:2]) > 0.05
    assert ratios[2] < 1e-12  # nothing bends after the last layer


# -- damping ----------------------------------------------------------------------------------------------------------


def shares(outputs, inputs, damping, split):
    """What a damping adds to each factor; the product is the damping."""
    means = [float(factor.trace()) / len(factor) for factor in (outputs, inputs)]
    pi = math.sqrt(means[0] / means[1]) if split == "pi" else 1.0
    return math.sqrt(damping) * pi, math.sqrt(damping) / pi


def preconditioned(some, split, damping, block=None):
    """(gradient, direction, optimizer) of the first layer."""
    moment = Moment("signals", average="mean")
    recipe = Recipe(KRONECKER, moment, Root(1, Damping(damping, split=split)), join_bias=True, block=block)
    preconditioner = curvlib.Preconditioner(some.model, recipe)
    some.model.zero_grad()
    some.loss(some.model(some.inputs), some.targets).backward()
    layer = some.model[0]

    def held():
        return torch.cat([layer.weight.grad.flatten(), layer.bias.grad])

    before = held()
    preconditioner.step()
    return before, held(), preconditioner


@pytest.mark.parametrize("split", ["pi", "sqrt"])
@pytest.mark.parametrize("damping", [1e-3, 1e-1, 10.0])
def test_damping_factors_is_more_than_damping_their_product(split, damping):
    """(A + aI) ⊗ (B + bI) - (A ⊗ B + abI) = aI ⊗ B + A ⊗ bI has no negative eigenvalue; so the step is shorter."""
    some = problem("perceptron")
    gradient, factored, preconditioner = preconditioned(some, split, damping)
    _, exactly, _ = preconditioned(some, None, damping, EigenBlock)
    layer = some.model[0]
    outputs, inputs = factors(preconditioner, layer)
    a, b = shares(outputs, inputs, damping, split)
    more = weights_first(torch.kron(outputs + a * identity(len(outputs)), inputs + b * identity(len(inputs))), 4)
    less = preconditioner.curvature(layer) + a * b * identity(len(more))
    assert a * b == pytest.approx(damping)
    assert is_positive(more - less, more.trace())
    close(factored, torch.linalg.solve(more, gradient))
    close(exactly, torch.linalg.solve(less, gradient))
    assert 0 < float(gradient @ factored) < float(gradient @ exactly)


@both_losses
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_the_damped_inverse_is_a_solve_in_the_space_of_examples(likelihood, damping):
    """(GᵀG/N + λI)⁻¹ v = (v - Gᵀ (GGᵀ + NλI)⁻¹ G v) / λ (Woodbury)."""
    some = problem("convolutional", likelihood)
    objective = some.objective()
    gradients = torch.cat(list(example_gradients(objective, objective.names())))
    vector = torch.randn(gradients.shape[1], dtype=F64)
    kernel = gradients @ gradients.T + N * damping * identity(N)
    expected = (vector - gradients.T @ torch.linalg.solve(kernel, gradients @ vector)) / damping
    close(torch.linalg.solve(fisher(objective, "data") + damping * identity(len(vector)), vector), expected)
    close(Operator(objective, "data").solve(vector, damping, 1e-13), expected)


# -- convergence ------------------------------------------------------------------------------------------------------

BLOCKS = {  # partition -> the block of an entry
    "... |": lambda o, i: (o, i),
    "o | i/2": lambda o, i: (o, i // 2),
    "o | i": lambda o, i: o,
    "i | o": lambda o, i: i,
    "| o/2 i/2": lambda o, i: (o // 2, i // 2),
    "| ...": lambda o, i: 0,
}


def least_squares_step(text, damping, lr, x, y, weight):
    """(residual before, residual after) one step on 1/2n ‖u - y‖², u = x Wᵀ."""
    model = nn.Linear(*reversed(weight.shape), bias=False).double()
    model.weight.data.copy_(weight)
    moment = Moment("samples", average="mean", labels="exact")
    optimizer = CurvatureOptimizer(model, Recipe(text, moment, Root(1, damping)), lr=lr)
    outputs = model(x)
    optimizer.observe(outputs, "gaussian")
    ((outputs - y).square().sum() / (2 * len(x))).backward()
    optimizer.step()
    return (outputs - y).detach(), (model(x) - y).detach()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(BLOCKS)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
    st.sampled_from([1e-6, 1e-2, 1.0]),
    st.floats(0.05, 1.0),
    seeds,
)
def test_blocks_contract_the_residual_of_linear_least_squares(text, n, extra, outputs, damping, fraction, seed):
    """‖r₊‖ <= (1 - η μ / (Q + nλ)) ‖r‖ for steps η <= 1/B.

    With J the Jacobian of all outputs, μ the least eigenvalue of J Jᵀ, Q the largest ‖J_b‖² of a block's columns, B the
    number of blocks: r₊ = (I - ηK) r, where K = Σ_b J_b (J_bᵀ J_b + nλI)⁻¹ J_bᵀ lies between μ/(Q + nλ) and B.
    """
    torch.manual_seed(seed)
    inputs = 2 * ((n + extra + 1) // 2)  # at least as many as examples, and even
    x, y = torch.randn(n, inputs, dtype=F64), torch.randn(n, outputs, dtype=F64)
    jacobian = torch.kron(identity(outputs), x)
    of = [BLOCKS[text](o, i) for o in range(outputs) for i in range(inputs)]
    columns = [torch.tensor([each == block for each in of]) for block in sorted(set(of))]
    q = max(float(torch.linalg.matrix_norm(jacobian[:, chosen], 2)) ** 2 for chosen in columns)
    mu = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[0])
    lr = fraction / len(columns)
    before, after = least_squares_step(text, damping, lr, x, y, torch.randn(outputs, inputs, dtype=F64))
    bound = 1 - lr * mu / (q + n * damping)
    condition = 1 + q / (n * damping)
    assert float(after.norm()) <= (bound + 100 * EPS * condition) * float(before.norm())


def test_one_block_without_damping_solves_least_squares_in_one_step():
    torch.manual_seed(0)
    x, y, weight = torch.randn(4, 6, dtype=F64), torch.randn(4, 3, dtype=F64), torch.randn(3, 6, dtype=F64)
    before, after = least_squares_step("| ...", 1e-9, 1.0, x, y, weight)
    assert float(after.norm()) < 1e-6 * float(before.norm())
