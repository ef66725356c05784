"""Directions and lengths of MBF's groupings, crossed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import curvlib
from benchmarks import mbf_lengths
from benchmarks.data import Data, Split
from benchmarks.mbf_lengths import GROUPINGS, Twin, crossed, overshoots
from benchmarks.problems import PROBLEMS, autoencoder, batches
from benchmarks.runner import warm_start
from curvlib.optimizers.mbf import PUBLISHED


@pytest.fixture
def train(monkeypatch):
    inputs = torch.rand(60, 12, generator=torch.Generator().manual_seed(0))
    split = Split(inputs, torch.zeros(60, dtype=torch.int64))
    small = replace(
        PROBLEMS["mnist-autoencoder"],
        build=lambda _: autoencoder(12, 8, 6, 5, 3, 5, 6, 8, 12),
        batch_size=10,
        load=lambda _: Data(split, split),
    )
    monkeypatch.setattr(mbf_lengths, "_PROBLEM", small)
    return split


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_uncrossed_is_mbf_as_published(train, grouping):
    problem = mbf_lengths._PROBLEM
    torch.manual_seed(3)
    model = problem.build(Data(train, train))
    optimizer = curvlib.MBF(model, **{**PUBLISHED, "linear_blocks": grouping})
    warm_start(problem, model, optimizer, train, 3)
    average = None
    for batch in batches(problem, train, 3, 0, 12):
        optimizer.zero_grad()
        loss = problem.loss(model(batch.inputs), batch)
        loss.backward()
        optimizer.step()
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
    assert crossed(train, grouping, grouping, 2, seed=3)[-1] == pytest.approx(average, rel=1e-5)


def test_a_crossed_step_has_one_direction_and_another_length(train, monkeypatch):
    moves = []
    monkeypatch.setattr(mbf_lengths, "_move", lambda model, move: moves.append(move))
    crossed(train, "output-averaged", "row-major", 1)
    torch.manual_seed(0)
    model = mbf_lengths._PROBLEM.build(Data(train, train))
    twins = [Twin(model, grouping, train, 0) for grouping in ("output-averaged", "row-major")]
    for batch, found in zip(batches(mbf_lengths._PROBLEM, train, 0, 0, 6), moves, strict=True):
        mbf_lengths._gradient(model, batch)
        direction, length = (twin.step(model) for twin in twins)
        for layer in ("0", "6"):
            d, n, f = (
                torch.cat([one[f"{layer}.{p}"].flatten() for p in ("weight", "bias")])
                for one in (direction, length, found)
            )
            assert torch.allclose(f, d * n.norm() / d.norm(), rtol=1e-4, atol=1e-12)


def test_overshoot_is_that_of_the_exact_quadratic_model(train):
    seen = list(overshoots(train, steps=4, every=2))
    assert [(one.step, one.grouping) for one in seen] == [(step, g) for step in (1, 3) for g in GROUPINGS]
    for one in seen:
        assert one.length > 0
        if math.isfinite(one.ratio):
            assert (one.change < 0) == (one.ratio < 2)
        else:
            assert one.change >= 0


def test_the_command_writes_numbers_and_figure(train, tmp_path, monkeypatch, capsys):
    real = overshoots
    monkeypatch.setattr(mbf_lengths, "overshoots", lambda train: real(train, steps=4))
    assert mbf_lengths.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    content = json.loads((tmp_path / "lengths.json").read_text())
    assert len(content["crossed"]) == 7
    assert (tmp_path / "lengths.svg").read_text().startswith("<svg")
    assert "Crossed" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path, capsys):
    assert mbf_lengths.main(["--epochs", "0"]) == 2
    assert mbf_lengths.main(["--data", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "--epochs must be a whole number from 1, got 0" in out
    assert "train-images-idx3-ubyte" in out
