"""The speed suite on tiny shapes: both sides compute the same, and the table has its form. No times are asserted."""

from __future__ import annotations

import argparse
import json
import math
import sys

import pytest
import torch
from rich.console import Console

from benchmarks.cli import main
from benchmarks.speed import command, peers, timing
from benchmarks.speed.calibrate import crossing
from benchmarks.speed.case import Case, at_most, faster
from benchmarks.speed.cases import CASES
from benchmarks.speed.limits import Allocations
from benchmarks.speed.table import COLUMNS
from benchmarks.speed.timing import Contest, Differs, Setting, Target, measure
from curvlib.calibration import KINDS, read

CPU = torch.device("cpu")
SETTING = Setting(CPU, quick=True, repetitions=1, peers=None)


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    monkeypatch.setattr(command.torch, "set_num_threads", lambda _: None)


def contest(ours=2.0, theirs=1.0, difference=0.0, **settings):
    return Contest(lambda: ours, lambda: theirs, lambda: difference, 0.1, **settings)


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_on_tiny_shapes_and_both_sides_agree(name):
    row = command.run_case(name, SETTING)
    if row.measured is None:
        assert row.note.startswith("skipped: ")
        pytest.skip(row.note)
    assert row.measured.difference <= row.measured.tolerance
    assert len(row.measured.ratios) == 1
    assert len(row.cells()) == len(COLUMNS)


def test_the_table_and_the_numbers_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CASES, "absent", Case("absent", "ours", "theirs", at_most(1), at_most(1), _absent))
    names = ["adam-200x16", "slab-cholesky-256", "absent"]
    arguments = ["speed", "--quick", "--repetitions", "2", "--case", *names, "--out", str(tmp_path / "speed")]
    assert main(arguments) == 0
    assert "speed.json" in capsys.readouterr().out
    content = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert [one["name"] for one in content["cases"]] == names
    assert all(content["about"][name] for name in ("hardware", "versions", "threads", "repetitions", "commit"))
    adam, slab, absent = content["cases"]
    assert len(adam["measured"]["ratios"]) == 2
    assert adam["met"] == (adam["measured"]["ratio"] <= 0.65)
    assert slab["met"] == (slab["measured"]["ratio"] >= 0.6)
    assert absent["measured"] is None
    lines = (tmp_path / "speed" / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + len(names)
    assert {line.count(" | ") for line in rows} == {len(COLUMNS) - 1}
    assert "skipped: nobody is not installed" in rows[-1]


def _absent(_):
    raise peers.Missing("nobody is not installed")


def test_a_peer_is_found_in_the_folder_and_missed_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "soap", raising=False)
    with pytest.raises(peers.Missing, match=r"SOAP .* is not installed"):
        peers.official_soap(SETTING, 10)
    (tmp_path / "soap.py").write_text("class SOAP:\n    def __init__(self, parameters, **settings):\n        pass\n")
    build = peers.official_soap(Setting(CPU, True, 1, tmp_path), 10)
    assert type(build([])).__name__ == "SOAP"
    assert peers.versions()["soap"].startswith("sha256 of soap.py")
    monkeypatch.delitem(sys.modules, "soap")


def test_a_peer_that_breaks_while_it_is_imported_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "soap", raising=False)
    (tmp_path / "soap.py").write_text("import no_such_thing_anywhere\n")
    with pytest.raises(peers.Missing, match=r"cannot be imported: .*no_such_thing_anywhere"):
        peers.official_soap(Setting(CPU, True, 1, tmp_path), 10)


def test_sides_that_differ_are_not_timed(monkeypatch):
    with pytest.raises(Differs, match=r"differ by 2\.0e-01, tolerance 1\.0e-01"):
        measure(contest(difference=0.2), at_most(1), 1)
    with pytest.raises(Differs):
        measure(contest(difference=math.nan), at_most(1), 1)
    monkeypatch.setitem(CASES, "other", Case("other", "", "", at_most(1), at_most(1), lambda _: contest(difference=1)))
    row = command.run_case("other", SETTING)
    assert row.measured is None
    assert row.note.startswith("not timed: ")
    assert row.met is None


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [(at_most(2.0), 2.0, True), (at_most(1.9), 2.0, False), (faster(0.5), 0.5, True), (faster(0.6), 0.5, False)],
)
def test_ratios_and_targets(target, ratio, met):
    measured = measure(contest(), target, 3)
    assert measured.ratios == (ratio,) * 3
    assert target.met(measured.ratio) is met
    assert Target(None).met(measured.ratio) is None


def test_sides_alternate_and_warm_up_is_not_counted():
    calls = []

    def side(name):
        return lambda: calls.append(name) or float(len(calls))

    one = Contest(side("ours"), side("theirs"), lambda: 0.0, 0.0, turns=2, warm_up=1)
    measured = measure(one, at_most(None), 2)
    order = ["ours", "theirs"]
    assert calls == [*order, *order, *order[::-1], *order[::-1], *order]
    assert measured.ratios == ((3 + 6) / (4 + 5), (8 + 9) / (7 + 10))


def test_work_is_timed_and_the_device_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(timing.torch.cuda, "synchronize", waited.append)
    assert timing.timed(lambda: None, torch.device("cuda", 0)) >= 0
    assert len(waited) == 2
    timing.timed(lambda: None, CPU)
    assert len(waited) == 2


def test_allocations_count_what_lives():
    given = torch.zeros(100)
    with Allocations() as tracker:
        kept = given + 1
        view = kept[:50]
        gone = torch.cat([kept, kept])
        del gone
        kept.add_(1)
    assert tracker.live == 400
    assert tracker.peak == 1200
    del kept
    assert tracker.live == 400
    del view
    assert tracker.live == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--case", "nobody", "unknown case 'nobody'; there are adam-large"),
        ("--threads", "0", "--threads must be a whole number from 1, got 0"),
        ("--repetitions", "0", "--repetitions must be a whole number from 1, got 0"),
        ("--peers", "no/such/folder", "--peers: the folder no/such/folder does not exist"),
        ("--device", "nonsense", "--device nonsense: "),
    ],
)
def test_what_cannot_be_is_refused(option, value, message, capsys):
    assert main(["speed", "--quick", option, value]) == 2
    assert message in capsys.readouterr().out


def test_a_gpu_is_asked_for_its_own_numbers():
    assert CASES["mbf-autoencoder"].target(torch.device("cuda")).limit == 1.1
    assert CASES["mbf-autoencoder"].target(CPU).limit == 1.4


def test_the_command_shows_every_case(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CASES", {"one": CASES["adam-200x16"]})
    options = argparse.Namespace(
        case=["one"], device="cpu", threads=1, repetitions=1, quick=True, calibrate=False, peers=None, out=tmp_path
    )
    console = Console(record=True, width=200)
    command.run_speed(options, console)
    assert "Adam, 200 matrices of 16²" in console.export_text()


def test_a_calibration_can_be_read_and_leaves_nothing_behind(tmp_path, capsys):
    before = dict(KINDS)
    assert main(["speed", "--calibrate", "--quick", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    file = tmp_path / "calibration.json"
    assert "CURVLIB_CALIBRATION=" in capsys.readouterr().out
    assert dict(KINDS) == before
    content = json.loads(file.read_text())
    assert content["about"]["hardware"]
    assert {one["number"] for one in content["measured"]} >= {
        "halves_rows",
        "lapack_rows",
        "planes_rows",
        "newton_rows",
    }
    assert read(file)["cpu"].chunk == before["cpu"].chunk


@pytest.mark.parametrize(
    ("ratios", "found"), [([2.0, 2.0], 1), ([0.5, 2.0], 2), ([2.0, 0.5], None), ([2.0, 0.5, 3.0], 3), ([1.0], None)]
)
def test_the_first_size_from_which_on_a_way_is_quicker(ratios, found):
    assert crossing(range(1, len(ratios) + 1), lambda size: ratios[size - 1], [], "") == found
