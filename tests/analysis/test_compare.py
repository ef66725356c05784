"""What approximations lose, against plain matrices."""

from __future__ import annotations

import csv
import io
import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import Damping, Moment, Partition, Recipe, Root, Route
from curvlib.analysis import TOTAL, Approximation, Comparison, Objective, compare, fisher
from curvlib.analysis.family import FAMILIES, family
from curvlib.blocks import Block, Spec

F64 = torch.float64
SAMPLES = Moment("samples")


def objective(inputs=4, outputs=3, examples=40, bias=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs, bias=bias))
    x, y = torch.randn(examples, inputs), torch.randint(0, outputs, (examples,))
    return Objective(model, F.cross_entropy, x, y, dtype=F64)


def masked(exact, labels):
    """The entries of a matrix inside blocks."""
    return exact * (labels[:, None] == labels[None, :])


def plain(exact, approximate, gradient, damping):
    """Every error of a structure that damps as a whole, from dense matrices."""
    eye = torch.eye(len(exact), dtype=F64)
    inverse, wrong = torch.linalg.inv(exact + damping * eye), torch.linalg.inv(approximate + damping * eye)
    best, direction = inverse @ gradient, wrong @ gradient
    energy = direction @ (exact + damping * eye) @ direction
    norm = torch.linalg.matrix_norm
    return {
        "frobenius": norm(approximate - exact) / norm(exact),
        "spectral": norm(approximate - exact, 2) / norm(exact, 2),
        "inverse_frobenius": norm(wrong - inverse) / norm(inverse),
        "inverse_spectral": norm(wrong - inverse, 2) / norm(inverse, 2),
        "cosine": direction @ best / direction.norm() / best.norm(),
        "norm_ratio": direction.norm() / best.norm(),
        "decrease": (gradient @ direction - energy / 2) / (gradient @ best / 2),
        "best_decrease": (gradient @ direction) ** 2 / energy / (gradient @ best),
        "condition": torch.linalg.cond(wrong),
    }


def assert_row(row, wanted, tolerance):
    for name, value in wanted.items():
        assert getattr(row, name) == pytest.approx(float(value), rel=tolerance, abs=tolerance), name


@given(st.integers(1, 4), st.integers(2, 4), st.sampled_from([1e-3, 0.1, 2.0]), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_blocks_of_a_weight_lose_what_lies_outside_them(inputs, outputs, damping, seed):
    mine = objective(inputs, outputs, seed=seed)
    exact, gradient = fisher(mine, of="2.weight"), mine.gradient("2.weight")
    for text in ("... |", "o | i", "i | o", "| (o i)/2", "| o/2 i/2", "| ..."):
        row = next(iter(compare(mine, [text], damping=damping, of="2.weight", repeats=1)))
        labels = Partition(text).layout({"o": outputs, "i": 5}).labels()
        kappa = 1 + float(torch.linalg.eigvalsh(exact)[-1]) / damping
        assert_row(row, plain(exact, masked(exact, labels), gradient, damping), 1e-12 * kappa)
        assert (row.layer, row.approximation, row.parameters) == ("2", text, len(exact))


def test_all_layers_together_are_the_block_diagonal_of_the_layers():
    mine = objective()
    exact = torch.block_diag(*(fisher(mine, of=name) for name in mine.layers))
    labels = torch.cat([torch.arange(25) // 5, 5 + torch.arange(18) // 6])  # per output, the bias with its neuron
    order = []
    for first, outputs, inputs in ((0, 5, 4), (25, 3, 5)):
        weight = torch.arange(first, first + outputs * inputs).view(outputs, inputs)
        bias = torch.arange(first + outputs * inputs, first + outputs * (inputs + 1))
        order.append(torch.cat([weight, bias[:, None]], 1).flatten())
    where = torch.cat(order)
    unsorted = torch.empty_like(labels)
    unsorted[where] = labels
    rows = compare(mine, {"neurons": "o | i"}, damping=[0.1, 1.0], repeats=1).select(layer=TOTAL)
    assert [row.damping for row in rows] == [0.1, 1.0]
    for row in rows:
        wanted = plain(exact, masked(exact, unsorted), mine.gradient(), row.damping)
        assert_row(row, wanted, 1e-10)
        assert row.parameters == 43
        assert row.statistics_bytes == 8 * (5 * 25 + 3 * 36)


def test_the_empirical_fisher_is_kept_whole_by_the_full_layer():
    mine = objective()
    for row in compare(
        mine, {"full": curvlib.NGD, "text": "| ..."}, labels="data", damping=0.1, of="2.weight", repeats=1
    ):
        assert max(row.frobenius, row.inverse_spectral, abs(row.cosine - 1), abs(row.best_decrease - 1)) < 1e-12


def test_kfac_is_the_product_of_its_factors_in_either_form():
    mine = objective(bias=False)
    model = mine.model.double()
    with torch.no_grad():
        hidden = model[:2](mine.inputs.double())
        p = model[2](hidden).softmax(-1)
    a = hidden.T @ hidden / len(mine)
    g = (p.diag_embed() - p[:, :, None] * p[:, None, :]).mean(0)
    exact, gradient = fisher(mine, of="2.weight"), mine.gradient("2.weight")
    eigen = {"eigen": lambda model: curvlib.KFAC(model, form="eigen"), "pi": curvlib.KFAC}
    rows = compare(mine, eigen, damping=0.1, of="2.weight", repeats=1)
    wanted = plain(exact, torch.kron(g, a), gradient, 0.1)
    assert_row(rows.select(approximation="eigen").rows[0], wanted, 1e-11)
    share = ((a.trace() / 5) / (g.trace() / 3)).sqrt()
    damped = torch.kron(g + 0.1**0.5 / share * torch.eye(3, dtype=F64), a + 0.1**0.5 * share * torch.eye(5, dtype=F64))
    pi = plain(exact, damped - 0.1 * torch.eye(15, dtype=F64), gradient, 0.1)
    row = rows.select(approximation="pi").rows[0]
    assert_row(row, {name: pi[name] for name in ("inverse_frobenius", "cosine", "decrease")}, 1e-11)
    assert row.frobenius == pytest.approx(float(wanted["frobenius"]), rel=1e-11)


def test_moments_of_batch_gradients_are_averaged_over_full_batches():
    mine = objective(examples=50)
    squares = torch.zeros(15, dtype=F64)
    for inputs, targets in list(mine.chunks(16))[:3]:
        part = Objective(mine.model, mine.loss, inputs, targets, dtype=F64)
        squares += part.gradient("2.weight") ** 2 / 3
    approximation = Approximation(curvlib.Adam, mine, of="2.weight", batch=16)
    (held,) = approximation.held
    assert torch.allclose(held.dense(), squares.diag(), rtol=1e-13)
    gradient = mine.gradient("2.weight")
    wanted = gradient / (squares + 0.3).sqrt()
    assert torch.allclose(approximation.direction(held, 0.3, gradient), wanted, rtol=1e-13)
    assert torch.allclose(approximation.inverse(held, 0.3), (1 / (squares + 0.3)).diag(), rtol=1e-13)


class Scaled(Block):
    """A multiple of the identity."""

    def spec(self):
        return {"mean": Spec(())}

    def update(self, state, operand, keep, gain):
        state["mean"].mul_(keep).add_(operand.flatten(1).square().mean(1), alpha=gain)

    def apply(self, state, operand, recipe, exponent, scale):
        shift = recipe.damping.value if exponent > 0 else 0.0
        return operand / (scale * state["mean"] + shift).view(-1, *[1] * (operand.ndim - 1)) ** exponent

    def dense(self, state, recipe, scale):
        size = math.prod(self.layout.shape)
        return (scale * state["mean"])[:, None].expand(-1, size).diag_embed()


def test_a_block_of_ones_own_and_a_routing_table_stand_in_the_same_table():
    mine = objective(bias=False)
    exact = fisher(mine, "data", of="2.weight")
    heads = Recipe("head | d, i", SAMPLES, Root(1, Damping(1.0)), axes="(head d) i", sizes={"head": 3})
    table = compare(
        mine,
        {"scaled": Scaled, "heads": [Route(heads)], "text": "o | i"},
        labels="data",
        damping=0.1,
        of="2.weight",
        repeats=1,
    )
    mean = exact.trace() / 15 * torch.eye(15, dtype=F64)
    assert_row(table.select(approximation="scaled").rows[0], plain(exact, mean, mine.gradient("2.weight"), 0.1), 1e-11)
    assert {row.approximation: row.family for row in table} == {
        "scaled": "own block",
        "heads": "Kronecker",
        "text": "per output",
    }
    assert {row.family for row in table} <= set(FAMILIES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("... |", "diagonal"),
        ("o i | k...", "kernels"),
        ("o | ...", "per output"),
        ("i k... | o", "per input"),
        ("part head | d i", "per head"),
        ("~o | i", "averaged"),
        ("| (o i)~/o", "averaged"),
        ("| (o i)/4", "chunks"),
        ("| o/4 i/4", "tiles"),
        ("| o, i", "Kronecker"),
        ("| ,...", "Kronecker"),
        ("| ...", "full layer"),
    ],
)
def test_families(text, name):
    assert family(Partition(text)) == name
    assert family([Route(Recipe(text))]) == name


def test_the_model_is_left_as_it_was():
    mine = objective()
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    mine.model[0].weight.requires_grad_(False)
    compare(mine, ["o | i", curvlib.KFAC, curvlib.Shampoo], repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in mine.model.state_dict().items())
    assert not any(module._forward_hooks for module in mine.model.modules())
    assert all(parameter.grad is None for parameter in mine.model.parameters())
    assert not mine.model[0].weight.requires_grad


class Slow(Scaled):
    def update(self, state, operand, keep, gain):
        time.sleep(1e-3)
        super().update(state, operand, keep, gain)

    def roots(self, state, recipe, scale):
        time.sleep(2e-3)
        return ()

    def apply(self, state, operand, recipe, exponent, scale):
        time.sleep(4e-3)
        return super().apply(state, operand, recipe, exponent, scale)


def test_times_are_of_statistics_refresh_and_apply():
    mine = objective(examples=20, bias=False)
    (row,) = compare(mine, [Slow], of="2.weight", repeats=1)
    assert row.statistics_ms >= 20  # the block is asked once for every example
    assert 2 <= row.refresh_ms < 4 <= row.apply_ms
    (row,) = compare(mine, [Recipe("| ...", block=Slow)], of="2.weight", repeats=1)
    assert 1 <= row.statistics_ms < 20


def test_a_table_prints_selects_and_exports(tmp_path):
    mine = objective()
    table = compare(mine, ["o | i", curvlib.KFAC], damping=[0.1, 1.0], repeats=1)
    assert len(table) == 2 * 2 * 3
    text = str(table)
    assert text.startswith("Sequential, 40 examples, against the exact Fisher with labels='exact'")
    assert "0, 25 parameters" in text
    assert "all layers, 43 parameters" in text
    assert sum(line.startswith("KFAC") for line in text.splitlines()) == 6
    rows = list(csv.DictReader(io.StringIO(table.to_csv(tmp_path / "table.csv"))))
    assert (tmp_path / "table.csv").read_text() == table.to_csv()
    assert [float(row["frobenius"]) for row in rows] == [row.frobenius for row in table]
    content = json.loads(table.to_json(tmp_path / "table.json"))
    assert content["about"] == table.about
    assert [row["cosine"] for row in content["rows"]] == [row.cosine for row in table]
    chosen = table.select(layer="2", damping=0.1)
    assert [row.approximation for row in chosen] == ["o | i", "KFAC"]
    with pytest.raises(ValueError, match="unknown column 'colour'; there are layer, approximation"):
        table.select(colour="red")
    with pytest.raises(ValueError, match=r"no row has damping=3; there are 0\.1, 1\.0"):
        table.select(damping=3)
    assert isinstance(chosen, Comparison)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(approximations=[]), "at least one approximation"),
        (dict(approximations=["o | i"], damping=[]), "at least one approximation and one damping"),
        (dict(approximations=["o | i"], damping=-1.0), "damping.*-1"),
        (dict(approximations=["o | i"], labels="true"), "labels.*'true'"),
        (
            dict(approximations=["o | i"], of="nothing"),
            "no trainable parameter of Sequential belongs to 'nothing'",
        ),
        (dict(approximations=["o | i"], limit=1000), r"25 parameters takes .* GiB, limit is .*of=.*Operator"),
        (dict(approximations=["o | i"], damping=0.0), "damping=0: the exact curvature of 0 is singular.*above zero"),
        (dict(approximations=["| ..."], damping=0.0, labels="data", of="2.weight"), "damping=0: .* singular"),
        (dict(approximations={"plain": curvlib.SGD}), "'plain' holds no curvature for 0.weight.*exponent 0.*of="),
        (dict(approximations=["x | o"]), r"0\.weight: .*unknown axis 'x'"),
    ],
)
def test_what_cannot_be_compared_says_what_to_do(arguments, message):
    mine = objective(examples=6)
    with pytest.raises(ValueError, match=message):
        compare(mine, **{"repeats": 1, **arguments})


def test_what_is_no_structure_is_refused():
    with pytest.raises(TypeError, match="expected a partition, recipe, route, block class or optimizer class, got 3"):
        compare(objective(), [3])
    with pytest.raises(TypeError, match="must make a CurvatureOptimizer, got SGD"):
        compare(objective(), [lambda model: torch.optim.SGD(model.parameters())])


def test_a_singular_block_is_named():
    mine = objective(examples=40)
    mine.model[2].weight.data.zero_()
    with pytest.raises(ValueError, match="damping=0"):
        compare(mine, {"tied": "| o, i"}, damping=0.0, of="0.weight", repeats=1)
