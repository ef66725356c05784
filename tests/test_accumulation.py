"""Equal micro-batches are the big batch, for every method, moment and kind of labels, however their losses are scaled."""

from __future__ import annotations

import itertools
import warnings
from typing import get_args, get_type_hints

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
    Recipe,
    Root,
    Route,
    Rule,
    TapWarning,
)
from curvlib.labels import sample_labels
from curvlib.layerwise import Layerwise
from curvlib.quadratic import Quadratic
from curvlib.routing import is_weight
from curvlib.testing.trainings import convolutional, perceptron
from tests.campaign import METHODS
from tests.listening import F64

PARTS, EXAMPLES = 3, 12
SCALINGS = ("mean", "added means", "sum")


class Sequences(nn.Module):
    """Layers that are shared by the positions of a sequence."""

    def __init__(self):
        super().__init__()
        self.tokens, self.hidden, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.hidden(self.tokens(x)))))


def data(step, sequences):
    generator = torch.Generator().manual_seed(step)
    if sequences:
        draw = {"low": 0, "size": (EXAMPLES, 4), "generator": generator}
        return torch.randint(high=5, **draw), torch.randint(high=3, **draw)
    x = torch.randn(EXAMPLES, 6, dtype=F64, generator=generator)
    return x, torch.randint(0, 3, (EXAMPLES,), generator=generator)


@pytest.fixture
def told(monkeypatch):
    """Labels that are drawn in the same order for a batch and for its parts, and then the next batch's."""
    place = [0]

    def next_ones(logits, likelihood, generator=None):
        rows = range(place[0], place[0] + logits.shape[0])
        place[0] += logits.shape[0]
        shape = logits.shape[1:-1]
        return torch.stack([torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(row)) for row in rows])

    monkeypatch.setattr("curvlib.labels.sample_labels", next_ones)
    return place


def train(make, build, parts, how, told, common=0, steps=2):
    """Parameters and statistics after some steps, of which the first few are of whole batches in any case."""
    told[0] = 0
    torch.manual_seed(0)
    model = build().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TapWarning)
        optimizer = make(model)
        for step in range(steps):
            x, y = data(step, build is Sequences)
            cut, scaled = (1, "mean") if step < common else (parts, how)
            optimizer.batch_size = EXAMPLES if scaled == "sum" else None
            for group in optimizer.param_groups:
                group["reduction"] = {"mean": "mean", "added means": float(cut), "sum": "sum"}[scaled]

            def closure(x=x, y=y, parts=cut, how=scaled):
                optimizer.zero_grad()
                total = 0.0
                for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    outputs = model(some)
                    loss = F.cross_entropy(outputs.flatten(0, -2), wanted.flatten(), reduction="sum")
                    loss = loss / y[0].numel() / (1 if how == "sum" else len(some))
                    loss = loss / parts if how == "mean" else loss
                    signs = torch.Generator().manual_seed(0)  # one vector z for all parts of a batch
                    optimizer.observe(outputs, "categorical", loss=loss, generator=signs, scale=1 / y[0].numel())
                    loss.backward(retain_graph=optimizer.needs_graph)
                    total = total + loss.detach()
                return total

            optimizer.step(closure)
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for held in optimizer.held():
        for name, spec in held.block.spec().items():
            if spec.role == "statistics":
                found[f"{name} of {held.unit.name}"] = torch.stack(list(held.state[name]))
    return found


def assert_one_batch(make, build, how, told, common=0, steps=2):
    whole = train(make, build, 1, "mean", told, common, steps)
    parts = train(make, build, PARTS, how, told, common, steps)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():  # roots are of matrices with a condition of 1e6 at most
        size = float(value.abs().max())
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-9 * size, msg=f"{name} differs")


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, how, told):
    exact = {"low_precision": False} if method == "Muon" else {}
    # The gradients of the first step leave a null space, in which rounding chooses the eigenvectors: look from then on.
    common = 1 if method in ("SOAP", "KLShampoo") else 0
    for build in (perceptron, convolutional):
        assert_one_batch(lambda model: getattr(curvlib, method)(model, **exact), build, how, told, common, steps=3)


def labelled():
    """Every method that may choose its labels, with those it may choose."""
    for method in METHODS:
        allowed = get_type_hints(getattr(curvlib, method).__init__).get("labels")
        yield from ((method, labels) for labels in get_args(allowed))


@pytest.mark.parametrize("how", SCALINGS[:2])
@pytest.mark.parametrize(("method", "labels"), labelled())
def test_every_method_with_every_kind_of_labels(method, labels, how, told):
    options = {"labels": labels, **({"of": "samples"} if method == "MBF" else {})}
    assert_one_batch(lambda model: getattr(curvlib, method)(model, **options), perceptron, how, told)


MOMENTS = {
    "gradient": Moment(),
    "gradient, drawn": Moment(labels="sampled"),
    "momentum": Moment("momentum"),
    "centered": Moment(centered=True),
    "window": Moment(window=2),
    "hessian": Moment("hessian"),
    "samples": Moment("samples"),
    "samples, sampled": Moment("samples", labels="sampled"),
    "samples, exact": Moment("samples", labels="exact"),
}
SIGNALS = {
    f"{sharing}, {labels}": Moment("signals", sharing=sharing, labels=labels)
    for sharing in ("expand", "reduce")
    for labels in ("data", "sampled", "exact")
}
DIAGONAL, WHOLE, KRONECKER = "... |", "| ...", "| o, i k..."
PARTITIONS = {
    "centered": [DIAGONAL],
    "hessian": [DIAGONAL],
    "window": ["o | i k..."],
    "momentum": [DIAGONAL, KRONECKER],
    **{name: [KRONECKER] for name in SIGNALS},
}
"""Where a moment has not all of them."""


def recipe(partition, moment, rule=None, **options):
    rule = rule or Rule(Momentum() if moment.of == "momentum" else None)
    return Recipe(partition, moment, Root(1, Damping(0.1)), rule, **options)


def routed(one):
    """A recipe for the weights of linear layers and convolutions, a diagonal for the rest."""
    diagonal = Recipe(DIAGONAL, Moment(beta=0.9), Root(0.5, Damping(1e-6)), Rule(model=one.rule.model))
    weights = Route(one, kind=("linear", "conv"), where=is_weight)
    return lambda model: CurvatureOptimizer(model, [weights, Route(diagonal)], lr=0.01)


@pytest.mark.parametrize("how", SCALINGS[:2])
@pytest.mark.parametrize("build", [perceptron, convolutional, Sequences])
@pytest.mark.parametrize("name", [*MOMENTS, *SIGNALS])
def test_every_moment(name, build, how, told):
    moment = {**MOMENTS, **SIGNALS}[name]
    for partition in PARTITIONS.get(name, [DIAGONAL, WHOLE, KRONECKER]):
        assert_one_batch(routed(recipe(partition, moment)), build, how, told)


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize(
    "rule",
    [
        Rule(model=Layerwise(every=1)),
        Rule(model=Quadratic()),
        Rule(Momentum(), clip=Clip("kl", 1e-3)),
        Rule(Momentum(), clip=Clip("norm", 1e-3)),
        Rule(Momentum(), grafting=Grafting("adam")),
    ],
    ids=["layerwise", "quadratic", "KL clip", "norm clip", "grafting"],
)
def test_every_way_to_a_step_size(rule, how, told):
    assert_one_batch(routed(recipe(KRONECKER, Moment("signals"), rule)), perceptron, how, told)


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
@pytest.mark.parametrize(("of", "sharing"), [("samples", "expand"), ("signals", "expand"), ("signals", "reduce")])
def test_parts_with_different_padding(of, sharing, labels, told):
    """The loss is a sum over positions, divided by a number that the parts know."""
    x, y = data(0, sequences=True)
    mask = torch.arange(4) < torch.tensor([4, 4, 3, 4, 1, 0, 1, 2, 2, 4, 0, 1])[:, None]
    found = []
    for parts in (1, PARTS):
        torch.manual_seed(0)
        told[0] = 0
        model = Sequences().double()
        moment = Moment(of, sharing=sharing, labels=labels, average="mean")
        optimizer = routed(recipe(KRONECKER, moment))(model)
        for some, wanted, real in zip(x.chunk(parts), y.chunk(parts), mask.chunk(parts), strict=True):
            outputs = model(some)
            optimizer.observe(outputs, "categorical", mask=real)
            losses = F.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), reduction="none")
            (losses[real.flatten()].sum() / EXAMPLES).backward()
        optimizer.step()
        found.append(optimizer.curvature(model.hidden))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9 * float(found[0].abs().max()))


def test_parts_of_a_batch_draw_labels_of_their_own(monkeypatch):
    drawn = []

    def record(*arguments):
        drawn.append(sample_labels(*arguments))
        return drawn[-1]

    monkeypatch.setattr("curvlib.labels.sample_labels", record)
    model = perceptron().double()
    optimizer = curvlib.KFAC(model, labels="sampled")
    for _ in range(PARTS):
        optimizer.observe(model(data(0, sequences=False)[0]), "categorical")
    assert len(drawn) == PARTS
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(drawn, 2))
