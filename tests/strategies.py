"""Hypothesis strategies: axis sizes, and partitions drawn from the whole grammar over given axes."""

from __future__ import annotations

from hypothesis import strategies as st

LAYER_AXES = (
    (),
    ("c",),
    ("o", "i"),
    ("v", "d"),
    ("o", "i", "k1"),
    ("o", "i", "k1", "k2"),
    ("g", "o", "i", "k1"),
    ("head", "d", "i"),
)


@st.composite
def axis_sizes(draw, axes=None, largest=5):
    names = draw(st.sampled_from(LAYER_AXES)) if axes is None else axes
    return {name: draw(st.integers(1, largest)) for name in names}


@st.composite
def cuts(draw, axes, kinds=("/", "//", "~/")):
    limit = draw(st.one_of(st.integers(1, 4).map(str), st.sampled_from(axes)))
    return draw(st.sampled_from(kinds)) + limit


@st.composite
def own_terms(draw, axes):
    """Own axes, some tied, some tied in groups, as a text."""
    words = []
    rest = list(axes)
    while rest:
        count = draw(st.integers(1, len(rest)))
        group, rest = rest[:count], rest[count:]
        kind = draw(st.sampled_from(["plain", "tied", "grouped"]))
        if kind == "grouped":
            merged = group[0] if len(group) == 1 else f"({' '.join(group)})"
            words.append("~" + merged + draw(cuts(list(axes), ("/", "//"))))
        else:
            words += [("~" if kind == "tied" else "") + name for name in group]
    return " ".join(words)


@st.composite
def factor_text(draw, axes, all_axes):
    """The axes of one factor, in this order, some merged and cut."""
    words = []
    rest = list(axes)
    while rest:
        count = draw(st.integers(1, len(rest)))
        group, rest = rest[:count], rest[count:]
        merged = group[0] if len(group) == 1 else f"({' '.join(group)})"
        words.append(merged + (draw(cuts(all_axes)) if draw(st.booleans()) else ""))
    inner = " ".join(words)
    return f"[{inner}]" if draw(st.integers(0, 3)) == 0 else inner


@st.composite
def partition_texts(draw, sizes):
    """A partition that names every axis of ``sizes``, from the whole grammar; sometimes by ellipsis."""
    axes = list(sizes)
    if not axes:
        return draw(st.sampled_from(["... |", "| ...", "| ,...", "|"]))
    shorthand = [
        "... |",
        "| ...",
        "| ,...",
        "| ,.../2",
        "| (...)/3",
        "~(...)/2 |",
        "| ,...//3",
        "| ,[...]",
        "| [...]",
        "~... |",
        f"{axes[0]} | ...",
    ]
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(shorthand))
    order = draw(st.permutations(axes))
    own_count = draw(st.integers(0, len(order)))
    own, inside = order[:own_count], order[own_count:]
    factors = []
    while inside:
        count = draw(st.integers(1, len(inside)))
        factors.append(draw(factor_text(inside[:count], axes)))
        inside = inside[count:]
    return f"{draw(own_terms(own))} | {', '.join(factors)}".strip()
