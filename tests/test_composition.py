"""Any partition with any moment, root, rule and structure: it trains, or it is refused in words."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import Clip, Damping, Grafting, Moment, Momentum, Recipe, Root, Rule, Schedule, TapError, Tracking, blocks
from curvlib.finishes import ClipEntries, ClipRms, Orthogonal, ParameterScale, Sign
from curvlib.layerwise import Layerwise
from curvlib.quadratic import Quadratic
from curvlib.testing.blocks import damped
from curvlib.testing.recipes import _resumes, _trains
from curvlib.testing.trainings import Training, builder, convolutional, perceptron

PARTITIONS = [
    "... |", "o | i k...", "o i | k...", "~o | i k...", "~i ~k... | o", "| ...", "| o, i k...", "| ,...", "| o/2, i/3",
    "| [o], i k...", "| [o], [i k...]", "| (...)/4", "| (o i k...)//5", "~o/2 | i k...",
]  # fmt: skip
BASES = [
    (None, {}, {}),
    (None, {"of": "signals"}, {}),
    (None, {"of": "samples"}, {}),
    (None, {"labels": "sampled"}, {}),
    (None, {"of": "hessian"}, {}),
    (None, {"window": 3}, {}),
    (blocks.EigenBlock, {}, {}),
    (blocks.EigenbasisBlock, {}, {}),
    (blocks.EigenbasisBlock, {"of": "signals"}, {}),
    (blocks.RunningEigenbasisBlock, {"of": "signals"}, {}),
    (blocks.LikelihoodBlock, {}, {}),
    (blocks.RankOneBlock, {"of": "signals"}, {}),
    (blocks.QuasiNewtonBlock, {"of": "signals"}, {}),
    (blocks.AdditiveQuasiNewtonBlock, {"of": "signals", "window": 3}, {}),
    (blocks.InverseFreeBlock, {"of": "signals"}, {"tracking": Tracking(0.1, 0.5)}),
    (blocks.WhiteningBlock, {}, {"tracking": Tracking(0.1, 0.9), "exponent": 0.5}),
]
"""Structures with what they ask for; everything else is drawn."""
some = st.sampled_from


def seldom(*values):
    """The first in most examples, or one of the others."""
    return some([values[0]] * (4 * (len(values) - 1)) + list(values[1:]))


@st.composite
def moments(draw, given_):
    drawn = {
        "of": draw(seldom("gradient", "momentum", "samples", "signals", "hessian")),
        "average": draw(some(["ema", "sum", "mean"])),
        "beta": draw(some([0.0, 0.9])),
        "debias": draw(st.booleans()),
        "composition": draw(seldom("independent", "trace", "power-mean")),
        "labels": draw(seldom("data", "sampled", "exact")),
        "sharing": draw(some(["expand", "reduce"])),
        "centered": draw(seldom(False, True)),
        "maximum": draw(seldom(False, True)),
        "order": draw(seldom(2, 1)),
        "pooling": draw(seldom(None, "mean")),
        "window": draw(seldom(None, 3)),
    }
    return {**drawn, **given_}


@st.composite
def roots(draw, given_):
    damping = {
        "value": draw(some([0.1, 1.0])),
        "relative_to": draw(seldom(None, "trace", "layer", "largest")),
        "split": draw(seldom(None, "sqrt", "pi", "trace")),
        "outside": draw(seldom(False, True)),
    }
    drawn = {
        "exponent": draw(some([1.0, 1.0, 0.5, 0.25, 0.0])),
        "solver": draw(seldom("auto", "cholesky", "eigh", "qr", "pade")),
    }
    return damping, {**drawn, **given_}


@st.composite
def rules(draw):
    momentum = some(
        [None, Momentum(), Momentum(0.9, "ema", debias=True), Momentum(after=True), Momentum(nesterov=True)]
    )
    finish = some([(), (), (Sign(),), (ClipRms(), ParameterScale()), (Orthogonal(dtype=None),), (ClipEntries(1.0),)])
    return {
        "momentum": draw(momentum),
        "grafting": draw(some([None, Grafting("sgd"), Grafting("adam"), Grafting("adagrad")])),
        "finish": draw(finish),
        "clip": draw(seldom(None, Clip("norm", 1.0), Clip("kl", 1e-2))),
        "model": draw(seldom(None, Layerwise(), Quadratic())),
        "decay": draw(some(["decoupled", "l2"])),
    }


SEEN = Counter()


def first_step(recipe, build):
    """A training that got through its first step, or the words in which it was refused."""
    try:
        training = Training(builder(recipe()), build, seed=0, steps=3)
        model, optimizer = training.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training.step(model, optimizer, 0)
    except (ValueError, TypeError, TapError) as error:
        return str(error)
    return training


@settings(deadline=None, max_examples=400)
@given(
    partition=some(PARTITIONS),
    base=some(BASES),
    data=st.data(),
    rule=rules(),
    schedule=some([Schedule(), Schedule(2, 3), Schedule(refresh=2, stagger=True)]),
    join=st.booleans(),
    build=some([perceptron, convolutional]),
)
def test_it_trains_or_is_refused_in_words(partition, base, data, rule, schedule, join, build):
    block, of, own = base
    moment, (damping, root) = data.draw(moments(of)), data.draw(roots(own))

    def recipe():
        return Recipe(
            partition, Moment(**moment), Root(damping=Damping(**damping), **root), Rule(**rule), schedule,
            block=block, join_bias=join,
        )  # fmt: skip

    training = first_step(recipe, build)
    if isinstance(training, str):
        assert len(training) > 25, training
        SEEN["refused"] += 1
        return
    SEEN["trained"] += 1
    _trains(training)
    _resumes(training)
    model, optimizer = training.start()
    training.step(model, optimizer, 0)
    for held in optimizer.held():
        if held.block.damps == "whole" and held.recipe.damping.relative_to is None and not held.recipe.damping.outside:
            _applies_what_it_says(held)


def _applies_what_it_says(held):
    """The direction is (dense + λ)^-p, where that is what a structure promises."""
    if isinstance(held.block, (blocks.QuasiNewtonBlock, blocks.WhiteningBlock)) or held.recipe.moment.order == 1:
        return
    shape = held.unit.layout.shape
    if isinstance(held.block, blocks.DiagonalBlock):
        shape = held.unit.lead.shape
    vector = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given_ = list(vector) if held.block.elementwise else vector
    exponent, shift = float(held.recipe.root.exponent), float(held.recipe.damping.value)
    stored = exponent == 0.0
    if stored or not held.recipe.schedule.every_step:
        return
    found = held.block.apply(held.state, given_, held.recipe, exponent, held.scale)
    found = torch.stack(list(found)) if held.block.elementwise else found
    wanted = damped(held.block.dense(held.state, held.recipe, held.scale), vector, shift, exponent)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_both_happened():
    """Runs after the drawn compositions: a fair share of them trains."""
    assert not SEEN or (SEEN["trained"] > 20 and SEEN["refused"] > 20), SEEN


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recipe("o | i", Moment(maximum=True)), "diagonal partition"),
        (lambda: Recipe("... |", Moment("momentum")), "momentum before preconditioning"),
        (lambda: Moment("signals", composition="trace"), "independent"),
        (lambda: Rule(Momentum(), model=Quadratic()), "momentum=None"),
        (lambda: Damping(0.1, "trace", split="pi"), "relative_to=None"),
        (lambda: Recipe("| o, i", root=Root(tracking=Tracking())), "means nothing to the standard block"),
        (lambda: Recipe("| o, i", Moment(window=3), block=blocks.EigenBlock), "window=3 means nothing to EigenBlock"),
    ],
)
def test_a_refusal_names_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        make()
