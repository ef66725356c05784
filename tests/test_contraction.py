"""Every generated moment of a layer is what brute force over single examples gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import Route, contraction, moments
from curvlib.layers import describe
from tests.listening import F64, layers, listen, recipe_of, sample_gradients, targets_of
from tests.strategies import partition_texts

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")


def expected_factors(unit_layout, gradients, n):
    """(region, factor) -> its moment by definition, the mean over n examples."""
    for index, region in enumerate(unit_layout.regions):
        for number in range(len(region.factors)):
            each = [moments.second_moment(unit_layout.block(one[None])[index], region, number) for one in gradients]
            yield f"factor_{index}_{number}", torch.stack(each).sum(0) / n


def packed_gradients(unit, gradients):
    """Gradients of the unit's parameters as one operand each, ``[m, *shape]``."""
    count = next(iter(gradients.values())).shape[0]
    packed = torch.zeros(count, *unit.layout.shape, dtype=F64)
    for one, row in zip(packed, range(count), strict=True):
        windows = unit.operand.windows(one)
        for slot, window in zip(unit.slots, windows, strict=True):
            window.copy_(gradients[slot.name][row].reshape(window.shape))
    return packed


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("labels", ["data", "exact"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_moments_of_single_examples_are_brute_force(labels, data):
    model, inputs = data.draw(layers())
    likelihood = data.draw(st.sampled_from(LIKELIHOODS))
    n = 2 * data.draw(st.integers(1, 2))
    x = inputs(n)
    y = targets_of(model(x), likelihood)
    composition = data.draw(st.sampled_from(["independent", "trace", "power-mean"]))
    table = [
        Route(recipe_of(data.draw(partition_texts(slot.sizes)), labels=labels, composition=composition), role=slot.role)
        for slot in describe(model).values()
    ]
    reduction, parts = data.draw(st.sampled_from(["mean", "sum"])), data.draw(st.sampled_from([1, 2]))
    limit = data.draw(st.sampled_from([1, 100, contraction.LIMIT]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "LIMIT", limit)
        optimizer = listen(model, table, x, y, likelihood, reduction, parts)
    gradients = sample_gradients(model, x, y, likelihood, labels)
    for unit in optimizer._all_units():
        record = optimizer.state[unit.lead]
        packed = packed_gradients(unit, gradients)
        if "moment" in record:
            assert_same(record["moment"].flatten(), packed.square().sum(0).flatten() / n)
            continue
        for name, expected in expected_factors(unit.layout, packed, n):
            if name in record:  # factors of size one may be left out
                assert_same(record[name], expected)


@pytest.mark.parametrize("labels", ["data", "exact"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_joined_bias_is_one_more_column(labels, data):
    model, inputs = data.draw(layers().filter(lambda drawn: describe(drawn[0])[drawn[0].layer.weight].inputs))
    x = inputs(4)
    y = targets_of(model(x), "categorical")
    group = "g | " if "g" in describe(model)[model.layer.weight].sizes else "| "
    optimizer = listen(model, recipe_of(group + "o i k...", labels=labels, join_bias=True), x, y)
    gradients = sample_gradients(model, x, y, "categorical", labels)
    unit = optimizer._all_units()[0]
    assert len(unit.slots) == (2 if model.layer.bias is not None else 1)
    (_, expected), *_ = expected_factors(unit.layout, packed_gradients(unit, gradients), 4)
    found = optimizer.state[unit.lead]["factor_0_0"]
    assert_same(found, expected)


def test_both_forms_are_taken():
    from torch import nn

    linear = nn.Linear(30, 40).double()
    slot = describe(linear)[linear.weight]
    cheap = recipe_of("~i | o").cut.layout(slot.sizes, (), slot.sources)
    assert contraction._plan(cheap, 0, 0, 8, 1, True) is not None  # Σ δ δᵀ ‖a‖²
    kernels = recipe_of("o | i").cut.layout(slot.sizes, (), slot.sources)
    assert contraction._plan(kernels, 0, 0, 8, 50, True) is None  # positions are summed before the outer product
