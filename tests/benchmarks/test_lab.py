"""The laboratory's page."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import lab
from benchmarks.cli import main
from benchmarks.lab import SPECIMENS, Attention, load


def run(*arguments):
    console = Console(file=io.StringIO(), width=200)
    status = main(arguments, console)
    return status, console.file.getvalue()


def test_the_page_has_every_figure_and_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    few = {name: SPECIMENS[2].structures[name] for name in ("diagonal", "head | d i", "KFAC", "full layer")}
    specimen = replace(SPECIMENS[2], structures=few, spectra=("diagonal", "KFAC"))
    monkeypatch.setattr(lab, "SPECIMENS", (specimen,))
    monkeypatch.setattr(lab, "look", lambda specimen, folder: LOOK(specimen, folder, examples=40))
    status, text = run("lab", "--out", str(tmp_path))
    assert status == 0
    assert re.search(r"\[1/1\] Fused attention projection 16 to 3×4×4: 4 structures, held-out accuracy 9\d\.\d%", text)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure>") == page.count("<figcaption>") == 4
    for name in ("inverse-project.weight", "spectra", "pareto", "sweep"):
        assert (tmp_path / f"attention-{name}.svg").read_text().startswith("<svg")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "attention.csv").read_text())))
    assert len(rows) == 4 * len(lab.DAMPINGS)
    exact = [row for row in rows if row["approximation"] == "full layer"]
    assert all(float(row["inverse_frobenius"]) < 1e-9 for row in exact)
    heads = next(row for row in rows if row["approximation"] == "head | d i")
    assert f"{float(heads['frobenius']):.3g}" in page


LOOK = lab.look


def test_structures_and_what_is_drawn_of_them_fit():
    for specimen in SPECIMENS:
        assert set(specimen.spectra) <= set(specimen.structures)
        model = specimen.build()
        assert {specimen.layer, *specimen.others} <= {name for name, _ in model.named_parameters()}


def test_small_images_are_enlarged():
    data = load("tanh", None)
    assert data.train.inputs.shape == (1437, 256)
    assert data.train.inputs.min() >= 0
    assert data.train.inputs.mean() == pytest.approx(float(load("conv", None).train.inputs.mean()), rel=0.05)


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    mine = Attention().double()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": mine.project.weight,
            "in_proj_bias": mine.project.bias,
            "out_proj.weight": mine.merge.weight,
            "out_proj.bias": mine.merge.bias,
        }
    )
    x = torch.rand(3, 64, dtype=torch.float64)
    tokens = torch.tanh(mine.embed(x.unflatten(1, (8, 8))) + mine.position)
    pooled = (tokens + theirs(tokens, tokens, tokens, need_weights=False)[0]).mean(1)
    assert torch.allclose(mine(x), mine.classes(pooled), atol=1e-12)


def test_a_folder_without_data_is_named(tmp_path):
    status, text = run("lab", "--data", str(tmp_path / "nothing"))
    assert status == 2
    assert "does not exist" in text
