"""Ctrl-C in the middle of averages that are formed piece by piece, and the context that holds it."""

from __future__ import annotations

import signal
import sys
import threading

import pytest
import torch
from torch import nn

import curvlib
from curvlib.interrupts import unbroken


def stepped(make, shape, at=None, where=()):
    """A weight's record after two steps, the second with Ctrl-C at the so many-th line of some files; and their lines."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = make([weight])
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if event == "call":
            return trace if frame.f_code.co_filename.endswith(where) else None
        if event == "line":
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    for seed in (0, 1):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        try:
            if seed:
                sys.settrace(trace)
            optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
    held = next(iter(optimizer.held()))
    return {name: value.clone() for name, value in held.state.items() if name.startswith("factor_")}, lines


def settings(**options):
    return lambda parameters: curvlib.MBF(parameters, refresh_every=10, **options)


@pytest.mark.parametrize(
    ("make", "shape", "file"),
    [
        (settings(linear_blocks="output-averaged"), (9, 300), "grams.py"),
        (lambda parameters: curvlib.Shampoo(parameters, refresh_every=10), (300, 20), "grams.py"),
        (settings(), (40, 30, 3, 3), "planes.py"),
    ],
    ids=["panels of MBF", "panels of Shampoo", "planes"],
)
def test_ctrl_c_leaves_each_matrix_old_or_new(make, shape, file):
    where = (file,)
    new, lines = stepped(make, shape, where=where)
    old, _ = stepped(lambda parameters: _still(make(parameters)), shape, where=where)
    assert lines > 5
    for at in range(1, lines + 1):
        found, _ = stepped(make, shape, at, where)
        for name, value in found.items():
            assert torch.equal(value, new[name]) or torch.equal(value, old[name]), (name, at)


def _still(optimizer):
    """Stop before the second step."""
    step = optimizer.step
    calls = []

    def once():
        calls.append(1)
        return step() if len(calls) == 1 else None

    optimizer.step = once
    return optimizer


def test_what_is_held_comes_at_the_end():
    done = []

    def work():
        with unbroken:
            signal.raise_signal(signal.SIGINT)
            with unbroken:
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with unbroken:
        pass  # nothing is left of it


def test_other_handlers_and_other_threads():
    seen, before = [], signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with unbroken:
            signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [1]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with unbroken:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    results = []

    def elsewhere():
        with unbroken:
            results.append(1)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert results == [1]
