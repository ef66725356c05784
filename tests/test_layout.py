"""Layouts: regions hold every entry once, in a stated order, and curvature means what the text says."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvlib import Partition
from curvlib.layers import describe
from tests.strategies import axis_sizes, partition_texts


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_blocking_and_unblocking_is_the_identity(data):
    sizes = data.draw(axis_sizes())
    layout = Partition(data.draw(partition_texts(sizes))).layout(sizes)
    operand = torch.randn(data.draw(st.integers(1, 3)), *layout.shape)
    blocks = layout.block(operand)
    assert [tuple(block.shape[1:]) for block in blocks] == [region.shape[1:] for region in layout.regions]
    assert torch.equal(layout.unblock(blocks, operand), operand)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_regions_hold_every_entry_exactly_once(data):
    sizes = data.draw(axis_sizes())
    layout = Partition(data.draw(partition_texts(sizes))).layout(sizes)
    positions = torch.cat([index.flatten() for index in layout.index()])
    assert positions.sort().values.tolist() == list(range(math.prod(sizes.values())))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_joined_bias_is_one_more_input_column(data):
    sizes = {"o": data.draw(st.integers(1, 5)), "i": data.draw(st.integers(1, 4)), "k1": 2}
    joined = data.draw(st.sampled_from([("i",), ("i", "k1")]))
    sizes = sizes if len(joined) == 2 else {"o": sizes["o"], "i": sizes["i"]}
    texts = ["| o, i k...", "| ...", "~o | i k...", "o | i k...", "| o/2, (i k...)/3", "| (o i k...)~/o", "... |"]
    layout = Partition(data.draw(st.sampled_from(texts))).layout(sizes, joined)
    inputs = math.prod(size for name, size in sizes.items() if name != "o")
    assert layout.shape == (sizes["o"], inputs + 1)
    operand = torch.randn(2, *layout.shape)
    assert torch.equal(layout.unblock(layout.block(operand), operand), operand)


def entries(sizes):
    """Row-major position of every multi-index, by the axes' names."""
    names = list(sizes)
    ranges = [range(size) for size in sizes.values()]
    return {index: position for position, index in enumerate(itertools.product(*ranges))}, names


def expected_blocks(sizes, own, inside):
    """Positions of each block's entries by plain loops: own indices in order, then inside in row-major order."""
    place, names = entries(sizes)
    blocks = []
    for mine in itertools.product(*(range(sizes[name]) for name in own)):
        block = []
        for rest in itertools.product(*(range(sizes[name]) for name in inside)):
            at = dict(zip(own, mine, strict=True)) | dict(zip(inside, rest, strict=True))
            block.append(place[tuple(at[name] for name in names)])
        blocks.append(block)
    return blocks


@pytest.mark.parametrize(
    ("text", "own", "inside"),
    [
        ("o i | k...", ["o", "i"], ["k1", "k2"]),
        ("i o | k...", ["i", "o"], ["k1", "k2"]),
        ("o | ...", ["o"], ["i", "k1", "k2"]),
        ("| ...", [], ["o", "i", "k1", "k2"]),
        ("k1 | o k2 i", ["k1"], ["o", "k2", "i"]),
        ("~i | o k...", ["i"], ["o", "k1", "k2"]),
    ],
)
def test_blocks_come_in_the_order_of_the_text(text, own, inside):
    sizes = {"o": 3, "i": 2, "k1": 2, "k2": 3}
    layout = Partition(text).layout(sizes)
    (index,) = layout.index()
    assert index.flatten(2).flatten(0, 1).tolist() == expected_blocks(sizes, own, inside)


def test_cuts_are_balanced_or_leave_a_remainder():
    def pieces(text, size):
        layout = Partition(text).layout({"o": size, "i": 2})
        return [(region.blocks * region.ties, region.factors[0].size) for region in layout.regions]

    assert pieces("| o/4, i", 10) == [(1, 4), (2, 3)]
    assert pieces("| o//4, i", 10) == [(2, 4), (1, 2)]
    assert pieces("| o~/4, i", 10) == [(2, 4), (1, 2)]
    assert pieces("| o/4, i", 8) == [(2, 4)]
    assert pieces("| o/100, i", 10) == [(1, 10)]
    assert pieces("| o/i, i", 5) == [(2, 2), (1, 1)]


def test_tied_chunks_share_one_factor_and_the_remainder_has_its_own():
    regions = Partition("| (o i)~/4").layout({"o": 3, "i": 3}).regions
    assert [(region.blocks, region.ties, region.factors[0].size) for region in regions] == [(1, 2, 4), (1, 1, 1)]


def test_row_major_chunks_are_consecutive_entries():
    (index,) = Partition("| (o i)~/o").layout({"o": 3, "i": 4}).index()
    assert index.tolist() == [torch.arange(12).view(4, 3).tolist()]


def test_tiles_are_two_dimensional():
    (index,) = Partition("| o/2 i/2").layout({"o": 4, "i": 4}).index()
    assert index[:, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_groups_become_a_leading_own_axis_or_an_average():
    sizes = {"g": 2, "o": 3, "i": 2, "k1": 2}
    (per_group,) = Partition("| o, i k...").layout(sizes).regions
    assert (per_group.blocks, per_group.ties) == (2, 1)
    (averaged,) = Partition("~g | o, i k...").layout(sizes).regions
    assert (averaged.blocks, averaged.ties) == (1, 2)


def test_numel_counts_stored_entries():
    sizes = {"o": 6, "i": 4, "k1": 3}
    counts = {"... |": 72, "o i | k...": 24 * 9, "| ...": 72**2, "| o, i k...": 36 + 144, "| [o], [i k...]": 18}
    counts |= {"~o | i k...": 144, "| o/3, i k...": 2 * (9 + 144)}
    for text, numel in counts.items():
        layout = Partition(text).layout(sizes)
        assert (layout.numel, layout.nbytes) == (numel, 4 * numel), text


def test_empty_and_scalar_operands_are_fine():
    assert Partition("| ,...").layout({"o": 0, "i": 3}).regions == ()
    layout = Partition("... |").layout({})
    assert layout.numel == 1
    assert torch.equal(layout.unblock(layout.block(torch.ones(2)), torch.ones(2)), torch.ones(2))


LAYERS = [
    nn.Linear(3, 4),
    nn.Conv1d(2, 4, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d(2, 2, 2),
    nn.ConvTranspose2d(4, 6, 2, groups=2),
    nn.Embedding(5, 3),
    nn.LayerNorm((3, 2)),
    nn.BatchNorm1d(4),
    nn.MultiheadAttention(4, 2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_every_layer_kind_takes_partitions_of_its_axes(layer, data):
    for parameter, slot in describe(layer).items():
        layout = Partition(data.draw(partition_texts(slot.sizes))).layout(slot.sizes)
        operand = parameter.detach().view(1, *slot.sizes.values())
        assert torch.equal(layout.unblock(layout.block(operand), operand), operand)


def test_a_layout_takes_no_hash_along_to_another_process():
    layout = Partition("o | i").layout({"o": 3, "i": 4})
    assert hash(layout) == hash(Partition("o | i").layout({"o": 3, "i": 4}))
    assert hash(layout) != hash(Partition("i | o").layout({"o": 3, "i": 4}))
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert "_hash" in vars(layout)
    assert "_hash" not in vars(again)
    assert "_hash" not in vars(again.regions[0])
