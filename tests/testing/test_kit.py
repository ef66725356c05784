"""Our own structures go through the kit that we hand out."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import curvlib
from curvlib import Damping, Moment, PartitionError, Recipe, Root, Route, Schedule
from curvlib.blocks import Block, DiagonalBlock, EigenBlock, StandardBlock
from curvlib.optimizers.mbf import PUBLISHED
from curvlib.testing import check_block, check_partition, check_recipe

PARTITIONS = (
    "... |",
    "o i | k...",
    "o | i",
    "~i | o",
    "| o, i k...",
    "| ,...",
    "| o/2, i/2",
    "| ...",
    "~o | i",
    "| [v], d",
    "head | d, i",
    "| o/3 i/2",
    "| (o i)~/o",
    "~o/2 | i",
    "| ,...//3",
    "| [o], [i]",
    "g | o, i k...",
)


@pytest.mark.parametrize("text", PARTITIONS)
def test_partitions(text):
    check_partition(text, examples=6)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_blocks(exponent):
    recipe = Recipe("| ...", Moment(), Root(exponent, Damping(1.0)))
    check_block(StandardBlock, recipe=recipe, partitions=["| ...", "o | i", "~o | i"], examples=10)
    check_block(EigenBlock, recipe=recipe, partitions=["| o, i", "| ,...", "o | i, k..."], examples=10)
    check_block(DiagonalBlock, recipe=recipe, partitions=["... |"], examples=10)


RECIPES = {
    "SGD": curvlib.SGD,
    "Adam": curvlib.Adam,
    "AdamW": curvlib.AdamW,
    "MomentumAdam": curvlib.MomentumAdam,
    "RMSprop": curvlib.RMSprop,
    "Adagrad": curvlib.Adagrad,
    "MBF": curvlib.MBF,
    "MBF as published": partial(curvlib.MBF, **{**PUBLISHED, "damping": 0.1}),
    "MBF of samples": partial(curvlib.MBF, of="samples"),
    "Shampoo": curvlib.Shampoo,
    "KFAC": curvlib.KFAC,
    "KFAC, drawn labels": partial(curvlib.KFAC, labels="sampled"),
    "KFAC, exact labels, eigen": partial(curvlib.KFAC, labels="exact", form="eigen", refresh_every=3),
    "KFAC by a quadratic model": partial(curvlib.KFAC, quadratic=True, momentum=0.0, kl_clip=None),
    "NGD": curvlib.NGD,
    "a recipe": Recipe("| o, i", Moment("samples", composition="trace"), schedule=Schedule(2, 3)),
    "a table": [Route(Recipe("o | ..."), kind=("linear", "conv"), role="weight"), Route(Recipe("... |"))],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    check_recipe(RECIPES[name], examples=3)


def test_a_recipe_with_axes_of_its_own_brings_its_network():
    heads = Recipe("head | d, i", axes="(head d) i", sizes={"head": 2})
    check_recipe(
        heads,
        model=lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2 * 3), nn.Unflatten(1, (3, 2)), Sum()),
    )


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(2)


def test_what_is_nothing_to_test_is_refused():
    with pytest.raises(TypeError, match=r"check_block takes a subclass of curvlib\.blocks\.Block, got <class 'int'>"):
        check_block(int)
    with pytest.raises(ValueError, match="at least one partition"):
        check_block(StandardBlock, partitions=[])
    with pytest.raises(PartitionError, match=r"o \|\| i"):
        check_partition("o || i")
    with pytest.raises(TypeError, match=r"expected a Recipe, a Route, several, or a function .* got 3"):
        check_recipe(3)


def test_a_table_that_fits_only_some_networks_is_tested_on_those():
    check_recipe(
        [Route(Recipe("o i | k..."), kind=("linear", "conv"), role="weight"), Route(Recipe("... |"))], examples=1
    )
    with pytest.raises(PartitionError, match=r"unknown axis 'head'"):
        check_recipe([Route(Recipe("head | ..."))])
    with pytest.raises(TypeError, match="expected a CurvatureOptimizer, got SGD"):
        check_recipe(lambda model: torch.optim.SGD(model.parameters()))


def test_a_block_without_its_methods_says_which():
    class Empty(Block):
        pass

    with pytest.raises(AssertionError, match=r"TypeError: Empty must define spec\(\)"):
        check_block(Empty)


def test_without_hypothesis_the_library_imports_and_the_kit_names_its_extra():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import curvlib, curvlib.analysis\n"
        "try:\n    import curvlib.testing\n"
        "except ImportError as error:\n    assert \"pip install 'curvlib[test]'\" in str(error)\n"
        "else:\n    raise SystemExit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
