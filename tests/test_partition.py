"""The language: what parses, what it prints, how partitions compare, and what each error says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib import Partition, PartitionError
from tests.strategies import axis_sizes, partition_texts

DESIGN = [
    "o i k... |",
    "o i | k...",
    "o | i",
    "~i | o",
    "| o, i k...",
    "| o, i, k...",
    "| ,...",
    "| o/1024, i/1024",
    "| ...",
    "~o | i",
    "| [v], d",
    "| [o], [i]",
    "head | d, i",
    "| o/32 i/32",
    "| (o i)~/o",
    "~o/32 | i",
]


@pytest.mark.parametrize("text", DESIGN)
def test_examples_of_the_design_print_as_written(text):
    assert str(Partition(text)) == text


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_printing_and_parsing_again_is_the_identity(data):
    partition = Partition(data.draw(partition_texts(data.draw(axis_sizes()))))
    again = Partition(str(partition))
    assert again == partition
    assert hash(again) == hash(partition)
    assert str(again) == str(partition)


def test_equality_is_about_meaning_not_about_spaces():
    assert Partition("o|i") == Partition("  o  |  i ") == Partition("(o) | i")
    assert Partition("(o i) | k...") == Partition("o i | k...")
    assert Partition("o i | k...") != Partition("i o | k...")
    assert Partition("| o, i") != Partition("| o i")
    assert Partition("| o/2, i") != Partition("| o//2, i")
    assert repr(Partition("o | i")) == "Partition(text='o | i')"


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("o i", "needs a bar", 3),
        ("| o | i", "unexpected '|'", 4),
        ("o/3 |", "makes sense only tied in groups", 0),
        ("o~/3 | i", "stands right of the bar", 0),
        ("| ~o", "stands left of the bar", 2),
        ("| o,", "empty factor", 4),
        ("| o,, i", "empty factor", 4),
        ("| o o", "named twice", 4),
        ("o | o", "named twice", 4),
        ("| ... ...", "named twice", 6),
        ("| o/0", "pieces of 0 entries", 4),
        ("| o/", "a cut needs a size", 4),
        ("| o~//3", "a tied cut is '~/n'", 4),
        ("| (o", "needs names, then ')'", 2),
        ("| ()", "merges nothing", 2),
        ("| [o", "closes with ']'", 4),
        ("| [o] i", "a whole factor", 6),
        ("| o % i", "unexpected '%'", 4),
        ("~ | o", "expected an axis", 2),
        ("| (o (i))", "needs names, then ')'", 2),
    ],
)
def test_a_text_that_is_no_partition_is_refused_with_its_place(text, message, place):
    with pytest.raises(PartitionError) as caught:
        Partition(text)
    first, shown, caret = str(caught.value).splitlines()
    assert message in first
    assert shown.strip() == text.strip()
    assert caret.index("^") - 4 == place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("| o, x", "unknown axis 'x'"),
        ("| o", "axis 'i' is not named"),
        ("| o, i/x", "unknown axis 'x'"),
        ("o | k...", "axis 'i' is not named"),
    ],
)
def test_axes_that_do_not_fit_are_named_with_those_there_are(text, message):
    with pytest.raises(PartitionError) as caught:
        Partition(text).layout({"o": 4, "i": 6})
    assert message in str(caught.value)
    assert text in str(caught.value)
    assert "axes here: o i" in str(caught.value)


def test_a_text_must_be_a_text_and_sizes_whole():
    with pytest.raises(TypeError, match="must be a text"):
        Partition(3)
    with pytest.raises(PartitionError, match="axis 'o' has size -1"):
        Partition("| o").layout({"o": -1})


def test_a_bias_joins_only_input_axes_that_stand_together():
    sizes = {"o": 4, "i": 3, "k1": 2, "k2": 2}
    assert Partition("| o, i k...").layout(sizes, ("i", "k1", "k2")).shape == (4, 13)
    for apart in ("| o, i, k...", "i | o k...", "| o, k... i", "~i | o k..."):
        with pytest.raises(PartitionError, match="join_bias=False"):
            Partition(apart).layout(sizes, ("i", "k1", "k2"))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_refinement_is_containment_of_blocks(data):
    sizes = data.draw(axis_sizes())
    first, second = (Partition(data.draw(partition_texts(sizes))) for _ in range(2))
    if not (first.ordered and second.ordered):
        with pytest.raises(PartitionError, match="only untied partitions"):
            first.refines(second)
        return
    blocks = [partition.layout(sizes).labels().tolist() for partition in (first, second)]
    homes: dict[int, set[int]] = {}
    for fine, coarse in zip(*blocks, strict=True):
        homes.setdefault(fine, set()).add(coarse)
    contained = all(len(coarse) == 1 for coarse in homes.values())
    assert first.refines(second, sizes) == contained
    if first.refines(second):
        assert contained


def test_refinement_for_all_sizes_knows_the_plain_chain():
    chain = [Partition(text) for text in ("... |", "o i | k...", "o | ...", "| ...")]
    for place, fine in enumerate(chain):
        assert [fine.refines(coarse) for coarse in chain] == [at >= place for at in range(len(chain))]
    # 2×3 pieces do not lie inside pieces of 4 when the axis has 6 entries.
    assert not Partition("| o/3 ...").refines(Partition("| o/4 ..."))
