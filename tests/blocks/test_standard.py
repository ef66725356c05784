"""The standard block against dense brute force, for partitions drawn from the whole grammar."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import Damping, Moment, Partition, Recipe, Root, roots
from curvlib.blocks import StandardBlock, block_for
from curvlib.moments import accumulate, equation, second_moment
from tests.strategies import axis_sizes, partition_texts

F64 = torch.float64


def drawn(data, largest=3):
    sizes = data.draw(axis_sizes(largest=largest))
    text = data.draw(partition_texts(sizes))
    return text, Partition(text).layout(sizes), tuple(sizes.values())


def filled(layout, recipe, gradients, keep=0.0, gain=1.0):
    """A standard block whose state holds the second moment of ``gradients [n, *shape]``."""
    block = StandardBlock(layout, recipe)
    state = {name: spec.create(len(gradients), F64, torch.device("cpu")) for name, spec in block.spec().items()}
    block.update(state, gradients, keep, gain)
    return block, state


def brute_force(layout, gradient, composition):
    """The dense curvature of one gradient, block by block, from positions and plain loops."""
    flat = gradient.reshape(-1)
    dense = torch.zeros(flat.numel(), flat.numel(), dtype=F64)
    for region, index in zip(layout.regions, layout.index(), strict=True):
        for own in range(region.blocks):
            pieces = [flat[index[own, tie]] for tie in range(region.ties)]  # [f1, f2, …] each
            factors = []
            for number in range(len(region.factors)):
                unfolded = [piece.movedim(number, 0).reshape(piece.shape[number], -1) for piece in pieces]
                factor = sum(one @ one.T for one in unfolded) / len(unfolded)
                factors.append(factor.diag().diag() if region.factors[number].diagonal else factor)
            block = composed(factors, composition)
            for tie in range(region.ties):
                rows = index[own, tie].flatten()
                dense[rows[:, None], rows[None, :]] = block
    return dense


def composed(factors, composition):
    if composition == "independent":
        return kron(factors)
    large = [factor for factor in factors if len(factor) > 1] or factors[:1]
    k = len(large)
    if composition == "power-mean":
        return kron([power(factor, 1 / k) for factor in large])
    trace = large[0].trace()
    return kron(large) / (trace ** (k - 1) if trace > 0 else 1)


def kron(factors):
    product = torch.ones(1, 1, dtype=F64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0) ** exponent) @ vectors.T


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_held_curvature_is_the_brute_force_one(data):
    _, layout, shape = drawn(data)
    composition = data.draw(st.sampled_from(["independent", "trace", "power-mean"]))
    recipe = Recipe("... |", Moment(composition=composition))
    gradients = torch.randn(2, *shape, dtype=F64)
    block, state = filled(layout, recipe, gradients)
    held = block.dense(state, recipe, 1.0)
    for one, gradient in zip(held, gradients, strict=True):
        expected = brute_force(layout, gradient, composition)
        # a root of a singular factor turns a rounding error of u into u^(1/k)
        slack = 1e-12 if composition != "power-mean" else 1e-3
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=slack * max(1.0, expected.abs().max().item()))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_batch_is_its_members(data):
    _, layout, shape = drawn(data)
    recipe = Recipe("... |", root=Root(1, 0.1))
    gradients = torch.randn(3, *shape, dtype=F64)
    block, together = filled(layout, recipe, gradients)
    roots.refresh(block.roots(together, recipe, 1.0))
    directions = block.apply(together, gradients, recipe, 1.0, 1.0)
    for row, gradient in enumerate(gradients):
        block, alone = filled(layout, recipe, gradient[None])
        roots.refresh(block.roots(alone, recipe, 1.0))
        direction = block.apply(alone, gradient[None], recipe, 1.0, 1.0)[0]
        for name, value in alone.items():
            if not name.startswith("residual"):
                torch.testing.assert_close(together[name][row], value[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(directions[row], direction, rtol=1e-10, atol=1e-12)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_inverse_of_a_single_factor_solves_the_damped_dense_system(data):
    _, layout, shape = drawn(data)
    if any(len(region.factors) > 1 for region in layout.regions):
        layout = Partition("| ...").layout(dict(zip("abcdefg", shape, strict=False)))
    recipe = Recipe("... |", root=Root(1, 0.3))
    gradients = torch.randn(1, *shape, dtype=F64)
    block, state = filled(layout, recipe, gradients)
    roots.refresh(block.roots(state, recipe, 1.0))
    vector = torch.randn(1, *shape, dtype=F64)
    direction = block.apply(state, vector, recipe, 1.0, 1.0)
    dense = block.dense(state, recipe, 1.0)[0] + 0.3 * torch.eye(math.prod(shape), dtype=F64)
    condition = torch.linalg.cond(dense).item()
    torch.testing.assert_close(
        dense @ direction.flatten(), vector.flatten(), rtol=1e-12 * condition, atol=1e-13 * condition
    )


@given(st.data(), st.sampled_from([0.25, 1 / 3, 0.5, 1.0, 2.0]))
@settings(max_examples=80, deadline=None)
def test_exponents_other_than_the_stored_one_are_solved_for(data, exponent):
    _, layout, shape = drawn(data)
    gradients = torch.randn(2, *shape, dtype=F64)
    plain = Recipe("... |", root=Root(3, 0.2))
    block, state = filled(layout, plain, gradients)
    now = block.apply(state, gradients, plain, exponent, 1.0)
    stored = Recipe("... |", root=Root(exponent, 0.2))
    roots.refresh(block.roots(state, stored, 1.0))
    torch.testing.assert_close(block.apply(state, gradients, stored, exponent, 1.0), now, rtol=1e-9, atol=1e-10)
    back = block.apply(state, gradients, plain, -1.0, 1.0)
    dense = block.dense(state, plain, 1.0)
    expected = torch.einsum("nij,nj->ni", dense, gradients.reshape(2, -1))
    torch.testing.assert_close(back.reshape(2, -1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("split", [None, "sqrt", "pi"])
@pytest.mark.parametrize("relative", [None, "trace", "layer", "largest"])
def test_every_damping_adds_what_it_says(split, relative):
    if split and relative:
        with pytest.raises(ValueError, match="shares out an absolute damping"):
            Damping(0.1, relative, split=split)
        return
    torch.manual_seed(0)
    layout = Partition("o | i, d").layout({"o": 3, "i": 4, "d": 2})
    recipe = Recipe("... |", root=Root(1, Damping(0.1, relative, split=split)))
    gradients = torch.randn(1, 3, 4, 2, dtype=F64) * torch.tensor([1.0, 10.0, 0.1], dtype=F64).view(3, 1, 1)
    block, state = filled(layout, recipe, gradients)
    roots.refresh(block.roots(state, recipe, 1.0))
    factors = [[g @ g.T, g.T @ g] for g in gradients[0]]
    means = [[factor.trace() / len(factor) for factor in pair] for pair in factors]
    for own, pair in enumerate(factors):
        for number, factor in enumerate(pair):
            added = {
                (None, None): 0.1,
                (None, "trace"): 0.1 * means[own][number],
                (None, "layer"): 0.1 * sum(mean[number] for mean in means) / 3,
                (None, "largest"): 0.1 * torch.linalg.eigvalsh(factor)[-1],
                ("sqrt", None): math.sqrt(0.1),
                ("pi", None): math.sqrt(0.1) * math.sqrt(means[own][number] / means[own][1 - number]),
            }[split, relative]
            expected = torch.linalg.inv(factor + added * torch.eye(len(factor), dtype=F64))
            torch.testing.assert_close(state[f"root_0_{number}"][0, own], expected, rtol=1e-9, atol=1e-12)


def test_a_relative_damping_has_a_floor_and_an_outside_one_stands_in_the_denominator():
    layout = Partition("| o, i").layout({"o": 2, "i": 3})
    gradients = torch.randn(1, 2, 3, dtype=F64)
    floored = Recipe("... |", root=Root(1, Damping(0.1, "trace", floor=7.0)))
    block, state = filled(layout, floored, gradients)
    roots.refresh(block.roots(state, floored, 1.0))
    left = gradients[0] @ gradients[0].T
    torch.testing.assert_close(state["root_0_0"][0, 0], torch.linalg.inv(left + 7 * torch.eye(2, dtype=F64)))
    outside = Recipe("... |", root=Root(0.5, Damping(0.1, outside=True)))
    roots.refresh(block.roots(state, outside, 1.0))
    root = torch.linalg.inv(power(left, 0.5) + 0.1 * torch.eye(2, dtype=F64))
    torch.testing.assert_close(state["root_0_0"][0, 0], root)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_accumulation_is_the_generated_contraction(data):
    _, layout, shape = drawn(data)
    (old, gradient) = torch.randn(2, 2, *shape, dtype=F64)
    for region, before, block in zip(layout.regions, layout.block(old), layout.block(gradient), strict=True):
        for number in range(len(region.factors)):
            factor = second_moment(before, region, number)
            expected = 0.9 * factor + 0.1 * second_moment(block, region, number)
            for keep, gain in ((0.9, 0.1), (torch.tensor(0.9, dtype=F64), torch.tensor(0.1, dtype=F64))):
                result = factor.clone()
                accumulate(result, block, number, keep, gain)
                torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


def test_the_contraction_names_own_tied_and_factor_axes():
    (region,) = Partition("g | o, i").layout({"g": 2, "o": 3, "i": 4}).regions
    assert equation(region, 0) == "abcd,abCd->acC"
    assert equation(region, 1) == "abcd,abcD->adD"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_undamped_error_never_rises_under_refinement(data):
    sizes = data.draw(axis_sizes(largest=3))
    partitions = [Partition(data.draw(partition_texts(sizes))) for _ in range(2)]
    if not all(partition.ordered for partition in partitions):
        partitions = [Partition(text) for text in ("... |", "| ...")]
    coarse, fine = partitions
    if not fine.refines(coarse, sizes):
        coarse, fine = fine, coarse
    if not fine.refines(coarse, sizes):
        return
    samples = torch.randn(4, *sizes.values(), dtype=F64)
    exact = samples.view(4, -1).T @ samples.view(4, -1) / 4
    errors = []
    for partition in (fine, coarse):
        layout, recipe = partition.layout(sizes), Recipe(partition)
        block, state = filled(layout, recipe, samples[:1], 0.0, 0.25)
        for sample in samples[1:]:
            block.update(state, sample[None], 1.0, 0.25)
        errors.append((block.dense(state, recipe, 1.0)[0] - exact).norm().item())
    assert errors[1] <= errors[0] + 1e-12


def test_blocks_of_size_one_are_the_diagonal_and_the_full_layer_is_dense():
    gradient = torch.randn(1, 3, 4, dtype=F64)
    outer = torch.outer(gradient.flatten(), gradient.flatten())
    sizes = {"o": 3, "i": 4}
    recipe = Recipe("| ...")
    block, state = filled(Partition("| ...").layout(sizes), recipe, gradient)
    torch.testing.assert_close(block.dense(state, recipe, 1.0)[0], outer)
    for text in ("... |", "| [...]", "o | i/1", "| o/1 i/1", "| (o i)/1"):
        layout, recipe = Partition(text).layout(sizes), Recipe(text)
        block, state = filled(layout, recipe, gradient)
        torch.testing.assert_close(block.dense(state, recipe, 1.0)[0], outer.diag().diag(), msg=text)


@given(st.data(), st.sampled_from([0.5, 1.0, 0.25]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_diagonal_block_is_the_standard_block_with_one_diagonal_factor(data, exponent, outside):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    layout = Partition("... |").layout(dict(zip("abc", shape, strict=False)))
    recipe = Recipe("... |", root=Root(exponent, Damping(0.1, outside=outside)))
    diagonal = block_for(layout, recipe)
    gradients = torch.randn(2, *shape, dtype=F64)
    state = {"moment": [torch.zeros(shape, dtype=F64) for _ in gradients]}
    diagonal.update(state, list(gradients), 0.0, 1.0)
    standard, packed = filled(layout, recipe, gradients)
    roots.refresh(standard.roots(packed, recipe, 1.7))
    mine = diagonal.apply(state, list(gradients), recipe, exponent, 1.7)
    theirs = standard.apply(packed, gradients, recipe, exponent, 1.7)
    torch.testing.assert_close(torch.stack(mine), theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(diagonal.dense(state, recipe, 1.7), standard.dense(packed, recipe, 1.7))


@pytest.mark.parametrize("relative", ["trace", "layer", "largest"])
def test_the_diagonal_block_leaves_a_gradient_without_signal_alone(relative):
    """As the standard block does: a relative damping of nothing is nothing, and 0 / 0 is no direction."""
    layout = Partition("... |").layout({"c": 3})
    recipe = Recipe("... |", root=Root(0.5, Damping(0.1, relative)))
    block = block_for(layout, recipe)
    state = {"moment": [torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)]}
    gradients = [torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)]
    silent, known = block.apply(state, gradients, recipe, 0.5, 1.0)
    assert torch.equal(silent, gradients[0])
    torch.testing.assert_close(known, gradients[1] / 1.1**0.5)
