"""Looks: no two methods of a report can be taken for each other."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from matplotlib.colors import to_rgb

from benchmarks.looks import looks
from benchmarks.methods import METHODS

OTHERS = [f"some.module:Class{place}" for place in range(40)]


@pytest.mark.parametrize("seed", range(20))
def test_methods_of_one_report_have_different_colours(seed):
    names = random.Random(seed).sample([*METHODS, *OTHERS, *(f"Label {name}={name}" for name in METHODS)], 20)
    found = looks(names)
    assert set(found) == set(names)
    assert all(math.dist(to_rgb(one), to_rgb(other)) > 0.15 for (one, _), (other, _) in combinations(found.values(), 2))
    assert looks(names[::-1]) == found


def test_of_very_many_each_has_a_colour_or_a_line_style_of_its_own():
    found = looks([*METHODS, *OTHERS])
    assert len(set(found.values())) == len(METHODS) + len(OTHERS)


def test_a_method_keeps_its_own_look_where_it_can():
    for name, one in METHODS.items():
        assert looks([name, *OTHERS[:5]])[name] == (one.colour, one.dash)
        assert looks([f"Ours={name}"])[f"Ours={name}"] == (one.colour, one.dash)
