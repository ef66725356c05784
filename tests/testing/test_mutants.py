"""The kit catches planted mutants, each by a property that names its cause."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from curvlib import Damping, Moment, Recipe, Root, Schedule
from curvlib.blocks import Block, EigenBlock, Spec, StandardBlock
from curvlib.blocks.standard import mode_product
from curvlib.recipe import number
from curvlib.testing import PropertyFailed, check_block, check_partition, check_recipe

EXAMPLES = 60


class Ekfac(Block):
    """Eigenbases of both sides of a matrix, and a second moment that lives in them: a correct little EKFAC."""

    def spec(self):
        rows, columns = self.layout.shape
        return {
            "left": Spec((rows, rows)),
            "right": Spec((columns, columns)),
            "u": Spec((rows, rows), "roots", fill=1.0, identity=True),
            "v": Spec((columns, columns), "roots", fill=1.0, identity=True),
            "second": Spec((rows, columns)),
        }

    def update(self, state, operand, keep, gain):
        rotated = state["u"].mT @ operand @ state["v"]
        for name, value in (
            ("left", operand @ operand.mT),
            ("right", operand.mT @ operand),
            ("second", rotated.square()),
        ):
            state[name].mul_(keep).add_(value * gain)

    def roots(self, state, recipe, scale):
        for factor, basis, mode in (("left", "u", 1), ("right", "v", 2)):
            new = torch.linalg.eigh(state[factor])[1]
            # Which new vector is which old one; the second moment goes along.
            moved = (new.mT @ state[basis]).square()
            second = state["second"]
            second.copy_(moved @ second if mode == 1 else second @ moved.mT)
            state[basis].copy_(new)
        return ()

    def apply(self, state, operand, recipe, exponent, scale):
        shift = number(recipe.damping.value) if exponent > 0 else 0.0
        rotated = state["u"].mT @ operand @ state["v"]
        return state["u"] @ (rotated * (scale * state["second"] + shift) ** -exponent) @ state["v"].mT

    def dense(self, state, recipe, scale):
        q = torch.einsum("nab,ncd->nacbd", state["u"], state["v"]).flatten(3, 4).flatten(1, 2)
        return q @ (scale * state["second"]).flatten(1).diag_embed() @ q.mT


class Resorted(Ekfac):
    """The basis is sorted anew, its second moment is not."""

    def roots(self, state, recipe, scale):
        for factor, basis in (("left", "u"), ("right", "v")):
            state[basis].copy_(torch.linalg.eigh(state[factor])[1])
        return ()


class Transposed(EigenBlock):
    """Eigenvectors are taken for rows."""

    def _eigen(self, *arguments):
        basis, values = super()._eigen(*arguments)
        return (None if basis is None else basis.mT), values


class Swapped(StandardBlock):
    """The factors of equal sizes of a product change places."""

    def _multiplied(self, index, block, matrices):
        pairs = list(matrices)
        sizes = {matrix.shape[-1] for _, matrix in pairs}
        if len(pairs) == 2 and len(sizes) == 1:
            pairs = [(place, other) for (place, _), (_, other) in zip(pairs, reversed(pairs), strict=True)]
        return super()._multiplied(index, block, pairs)


class Undamped(StandardBlock):
    """The damping is forgotten."""

    def roots(self, state, recipe, scale):
        tiny = replace(recipe.damping, value=1e-9)
        return super().roots(state, replace(recipe, root=replace(recipe.root, damping=tiny)), scale)


class Doubled(StandardBlock):
    """A wrong scale."""

    def update(self, state, operand, keep, gain):
        super().update(state, operand, keep, 2 * gain)


class TiedTwice(StandardBlock):
    """Ties are averaged twice."""

    def update(self, state, operand, keep, gain):
        super().update(state, operand, keep, gain / self.layout.regions[0].ties)


class Complement(StandardBlock):
    """The weight of the new is taken for what the old leaves."""

    def update(self, state, operand, keep, gain):
        super().update(state, operand, 1.0 - gain, gain)


class SwappedRoots(StandardBlock):
    """The stored roots of equal sizes change places; the factors do not."""

    def _apply_stored(self, state, blocks, recipe):
        left, right = state.get("root_0_0"), state.get("root_0_1")
        if left is None or right is None or left.shape != right.shape:
            return super()._apply_stored(state, blocks, recipe)
        return super()._apply_stored({**state, "root_0_0": right, "root_0_1": left}, blocks, recipe)


class Replaced(Ekfac):
    """A tensor of the state is replaced by another."""

    def update(self, state, operand, keep, gain):
        super().update(state, operand, keep, gain)
        state["second"] = state["second"].clone()


class Neighbour(StandardBlock):
    """The roots of one block are applied to the next."""

    def _multiplied(self, index, block, matrices):
        return super()._multiplied(index, block, [(place, matrix.roll(1, 0)) for place, matrix in matrices])


class Forgetful(Block):
    """A diagonal whose root is kept on the instance."""

    def spec(self):
        return {"moment": Spec(self.layout.shape)}

    def update(self, state, operand, keep, gain):
        state["moment"].mul_(keep).add_(operand.square() * gain)

    def roots(self, state, recipe, scale):
        self.root = 1 / (scale * state["moment"] + number(recipe.damping.value))
        return ()

    def apply(self, state, operand, recipe, exponent, scale):
        if exponent < 0:
            return operand * scale * state["moment"]
        return operand * getattr(self, "root", 1.0)

    def dense(self, state, recipe, scale):
        return (scale * state["moment"]).flatten(1).diag_embed()


@dataclass(frozen=True)
class LateDebias(Moment):
    """An EMA whose debiasing counts one update too many."""

    def scale(self, updates, warm=False):
        return super().scale(updates + 1, warm)


@dataclass(frozen=True)
class LateMean(Moment):
    """A running mean whose weights count one update too many."""

    def weights(self, updates):
        return super().weights(updates + 1)


def caught(check, *names):
    with pytest.raises(PropertyFailed) as failure:
        check()
    message = str(failure.value)
    assert failure.value.property in names, message
    for part in ("What should hold:", "Found:", "Example:", "Usual suspect:"):
        assert part in message
    return message


def block(mutant, *partitions, **settings):
    return lambda: check_block(mutant, partitions=partitions or ("| ...",), examples=EXAMPLES, **settings)


def test_swapped_factors_are_caught():
    message = caught(block(Swapped, "| o, i"), "multiplication")
    assert "modes multiplied with each other's factors" in message
    assert "Swapped" in message
    assert "o=2, i=2" in message, "the example is shrunk"


def test_swapped_roots_are_caught():
    assert "swapped factors" in caught(block(SwappedRoots, "| o, i"), "damped factors")


def test_a_transposed_eigenbasis_is_caught():
    message = caught(block(Transposed, "| o, i", "o | i"), "damped root")
    assert "a transposed eigenbasis" in message


def test_a_forgotten_damping_is_caught():
    assert "damping left out" in caught(block(Undamped, "o | i"), "damped root")
    assert "a forgotten damping" in caught(block(Undamped, "| o, i"), "damping")


def test_an_averaging_weight_off_by_one_is_caught():
    assert "`gain` taken as 1 - keep" in caught(block(Complement, "o | i"), "averaging")
    for moment in (LateDebias(debias=True), LateMean(average="mean")):
        message = caught(lambda moment=moment: check_recipe(Recipe("| o, i", moment)), "average")
        assert "off by one" in message
        assert "equal statistics" in message


@pytest.mark.parametrize(("mutant", "partition"), [(Doubled, "o | i"), (TiedTwice, "~o | i")])
def test_a_wrong_scale_is_caught(mutant, partition):
    assert "a wrong scale" in caught(block(mutant, partition), "scale")


def test_state_that_does_not_survive_saving_is_caught():
    assert "does not survive saving" in caught(block(Forgetful), "state")
    recipe = Recipe("| ...", root=Root(1, Damping(0.1)), schedule=Schedule(refresh=3), block=Forgetful)
    assert "does not survive saving" in caught(lambda: check_recipe(recipe), "resume", "separation")


def test_state_that_is_replaced_is_caught():
    recipe = Recipe("| (o i)", Moment(), Root(1, Damping(1.0)))
    message = caught(block(Replaced, "| (o i)", recipe=recipe), "state")
    assert "state 'second' was replaced by another tensor" in message


def test_a_root_applied_to_the_wrong_block_is_caught():
    message = caught(block(Neighbour, "o | i"), "multiplication", "damped root", "batch")
    assert "block" in message


def test_an_eigenbasis_sorted_anew_without_its_second_moment_is_caught():
    moment = Recipe("| o, i", Moment(), Root(1, Damping(1.0)))
    one_factor = replace(moment, partition="| (o i)")
    matrix = ("| (o i)",)
    check_block(Ekfac, recipe=one_factor, partitions=matrix, examples=EXAMPLES)
    message = caught(lambda: check_block(Resorted, recipe=one_factor, partitions=matrix, examples=EXAMPLES), "refresh")
    assert "an eigenbasis sorted anew without its second moment" in message


def test_a_mutant_is_caught_through_its_partition(monkeypatch):
    def swapped(blocks, root, mode):
        return mode_product(blocks, root, 1 - mode if blocks.ndim == 4 and blocks.shape[2] == blocks.shape[3] else mode)

    monkeypatch.setattr("curvlib.blocks.standard.mode_product", swapped)
    message = caught(lambda: check_partition("| o, i"), "damped factors", "multiplication")
    assert "the partition '| o, i' under StandardBlock" in message


def test_what_raises_is_told_with_its_example():
    class Broken(Forgetful):
        def dense(self, state, recipe, scale):
            raise IndexError("no such axis")

    assert "IndexError: no such axis" in caught(block(Broken), "dense")


def test_what_is_not_reproducible_is_told():
    class Random(Forgetful):
        def apply(self, state, operand, recipe, exponent, scale):
            return operand * torch.rand(()).item() * math.inf if torch.rand(()).item() > 0.5 else operand

    caught(block(Random), "scale", "multiplication")
