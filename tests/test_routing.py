"""Routing: by kind, role, module, name and predicate, in written order."""

from __future__ import annotations

import pytest
from torch import nn

from curvlib import CurvatureOptimizer, Recipe, Route

PLAIN, OTHER = Recipe("... |"), Recipe("| ...")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.conv, self.norm = nn.Linear(3, 3), nn.Conv1d(2, 2, 2), nn.LayerNorm(3)


def chosen(*routes):
    """Names of the parameters that do not fall through to the last route."""
    model = nn.ModuleDict({"body": Block(), "body2": Block()})
    routing = CurvatureOptimizer(model, [*routes, Route(PLAIN)]).routing()
    return [name for name, why in routing.items() if why.startswith("| ...")]


@pytest.mark.parametrize(
    ("route", "names"),
    [
        (Route(OTHER, kind="conv", role="weight"), ["body.conv.weight", "body2.conv.weight"]),
        (Route(OTHER, kind=("conv", "norm"), role="bias", module="body"), ["body.conv.bias", "body.norm.bias"]),
        (Route(OTHER, module=nn.Linear, name="body2*"), ["body2.dense.weight", "body2.dense.bias"]),
        (Route(OTHER, module="body.conv"), ["body.conv.weight", "body.conv.bias"]),
        (Route(OTHER, name="*dense.b?as"), ["body.dense.bias", "body2.dense.bias"]),
        (Route(OTHER, where=lambda slot: slot.ndim == 3), ["body.conv.weight", "body2.conv.weight"]),
    ],
)
def test_every_condition_of_a_route_must_hold(route, names):
    assert chosen(route) == names


def test_the_first_route_that_takes_a_parameter_wins_and_says_why():
    first, second = Route(PLAIN, role="weight"), Route(OTHER, kind="linear")
    assert chosen(first, second) == ["body.dense.bias", "body2.dense.bias"]
    routing = CurvatureOptimizer(nn.Linear(2, 2), [first, second]).routing()
    assert routing == {"weight": "... | (route 0: role='weight')", "bias": "| ... (route 1: kind='linear')"}


def test_routes_print_their_conditions():
    assert str(Route(PLAIN)) == "everything"
    assert str(Route(PLAIN, kind="conv", module=nn.Conv2d)) == "kind='conv', module=Conv2d"
