"""Saved at any step, loaded in another process, and gone on: bitwise what would have been, for every method.

RESUMES=50 python -m pytest tests/test_resume.py          # so many of every method and dtype
"""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import curvlib
from tests.campaign import METHODS, TWINS
from tests.resuming import DTYPES, NETWORKS, SCHEDULERS, Run, Worker

some = st.sampled_from
POOLS = {
    "labels": ["data", "sampled", "exact"],
    "refresh_every": [1, 2, 3, 5],
    "statistics_every": [1, 2, 3],
    "every": [1, 3],
    "stagger": [False, True],
    "dense_start": [False, True],
    "momentum": [0.0, 0.9],
    "nesterov": [False, True],
    "weight_decay": [0.0, 0.01],
    "damping": [0.1, 1.0],
    "subsample": [1, 2],
    "sharing": ["expand", "reduce"],
    "form": ["inverse", "eigen"],
    "quadratic": [False, True],
    "of": ["gradient", "samples"],
    "window": [None, 3],
    "memory": [None, 2],
    "block_size": [3, 64],
    "grafting": [None, "adam", "sgd"],
    "amsgrad": [False, True],
    "centered": [False, True],
    "debias": [False, True],
}
"""What is drawn for a setting, where a method has it."""
FADING = ("damping", "momentum")
"""Settings that may be callables of the step, where their type says so."""


@pytest.fixture(scope="module")
def worker():
    one = Worker()
    yield one
    one.close()
    assert one.process.returncode == 0


@st.composite
def cases(draw, method, dtype):
    known = inspect.signature(getattr(curvlib, method).__init__).parameters
    chosen = {name: draw(some(pool)) for name, pool in POOLS.items() if name in known and draw(st.booleans())}
    if chosen.get("window"):  # of batch gradients, in blocks that are not averaged
        chosen |= {"linear_blocks": "output", "of": "gradient"}
    fading = [name for name in FADING if chosen.get(name) and "Callable" in str(known[name].annotation)]
    network, total = draw(some(sorted(NETWORKS))), draw(st.integers(1, 12))
    names = [name for name, _ in NETWORKS[network]().named_parameters()]
    lost, first, last = draw(st.sets(some(names), max_size=2)), draw(st.integers(0, total)), draw(st.integers(0, total))
    callable_lr = "Callable" in str(known["lr"].annotation)
    return {
        "method": method,
        "network": network,
        "dtype": dtype,
        "seed": draw(st.integers(0, 99)),
        "model": draw(some([True, True, False])),
        "lr": draw(some([0.003, 0.01])),
        "lr_form": draw(some(["number", "number", "tensor", *(["callable"] if callable_lr else [])])),
        "scheduler": draw(some(sorted(SCHEDULERS))),
        "settings": chosen,
        "fading": [name for name in fading if draw(st.booleans())],
        "frozen": [sorted(lost) if first <= step < last else [] for step in range(total)],
    }


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("method", METHODS)
@settings(
    max_examples=int(os.environ.get("RESUMES", "2")),
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=st.data())
def test_resumed_in_another_process_is_bitwise_uninterrupted(worker, method, dtype, data):
    if method in TWINS and dtype == "float16":
        dtype = "float32"  # as torch's, they keep float16 statistics of float16 parameters, which overflow
    case = data.draw(cases(method, dtype), label="case")
    try:
        run = Run(case)
    except ValueError:  # settings that contradict each other, which the methods refuse by name
        reject()
    run.optimizer.seed = data.draw(st.integers(0, 3), label="seed of draws")  # the other process learns it by loading
    total = len(case["frozen"])
    stop = data.draw(st.integers(0, total), label="saved after")
    run.steps(0, stop)
    resumed = worker.resume(case, run.state(), stop, total)
    run.steps(stop, total)
    assert_identical(resumed, run.state())


def assert_identical(found, wanted, where="the checkpoint"):
    """Bitwise, with types and dtypes."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert found.shape == wanted.shape, where
        same = (found == wanted) | (found.isnan() & wanted.isnan()) if wanted.is_floating_point() else found == wanted
        assert bool(same.all()), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name, value in wanted.items():
            assert_identical(found[name], value, f"{where}, {name}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            assert_identical(found[number], value, f"{where}, {number}")
    else:
        assert found == wanted, where
