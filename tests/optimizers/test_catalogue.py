"""The catalogue of methods, and its copy in the README."""

from __future__ import annotations

from pathlib import Path

import torch

import curvlib
from curvlib.optimizers import table

README = Path(__file__).parents[2] / "README.md"


def test_every_method_is_there_with_its_source():
    state = torch.get_rng_state()
    methods = {method.name: method for method in table()}
    assert torch.equal(state, torch.get_rng_state())
    classes = {
        name
        for name in curvlib.optimizers.__all__
        if isinstance(getattr(curvlib.optimizers, name), type)
        and issubclass(getattr(curvlib.optimizers, name), curvlib.CurvatureOptimizer)
    }
    assert {name for name in methods if "(" not in name} == classes
    assert {"KBFGS(memory=100)", "MBF(window=32)"} <= set(methods)
    assert all(any(digit.isdigit() for digit in method.source) for method in methods.values() if method.name != "SGD")
    adam = methods["Adam"]
    assert (adam.partition, adam.moment, adam.root, adam.bytes) == ("... |", "EMA of gradient", "-0.5", "8")
    assert methods["SGD"].bytes == "0"
    assert methods["Eva"].root == "-1, RankOneBlock"
    assert methods["KFAC"].bytes == "20"


def test_its_text_is_a_table():
    lines = str(table()).splitlines()
    assert lines[0].split() == ["method", "partition", "moment", "root", "rule", "bytes", "/", "weight", "source"]
    assert len(lines) == 1 + len(table().methods)


def test_the_readme_shows_it():
    assert table().markdown() in README.read_text(), "put curvlib.optimizers.table().markdown() into README.md"
