"""The command line: studies that run, stop, resume and report; processes; and errors in one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import runner, session
from benchmarks.cli import main
from benchmarks.display import span
from benchmarks.records import Results
from tests.benchmarks.tiny import spec

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CURVLIB_DATA", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def drawn(monkeypatch):
    """Figures take longer than the runs; who looks at them asks for them."""
    return monkeypatch.setattr(session, "write_report", REPORT)


REPORT = session.write_report


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    def quick(records, folder, title, tuning, chosen):
        assert [*records, *tuning]
        folder.mkdir(exist_ok=True)
        (folder / "index.html").write_text(title)
        return folder / "index.html"

    monkeypatch.setattr(session, "write_report", quick)


def run(*arguments):
    console = Console(record=True, width=200, force_terminal=False, file=open(os.devnull, "w"))  # noqa: SIM115
    return main([*map(str, arguments)], console), console.export_text()


def write(text):
    Path("study.toml").write_text(text)
    return "study.toml"


STUDY = """
title = "A study"
problems = ["tiny"]
methods = ["mbf", "adam", "Other=torch.optim:NAdam"]
seeds = [0, 1]
[budget]
steps = 12
[tuning]
trials = 3
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "cifar"), "unknown problem 'cifar'; did you mean"),
        (("run", "tiny", "--methods", "adam", "tiger"), "unknown method 'tiger'; there are"),
        (("run", "tiny", "--methods", "torch.optim:Adan"), "torch.optim has no 'Adan'; did you mean 'Adam'?"),
        (("run", "tiny", "--seeds", "0"), "--seeds must be a whole number from 1, got 0"),
        (("run", "tiny", "--threads", "-1"), "--threads must be a whole number from 1, got -1"),
        (("run", "tiny", "--jobs", "0"), "--jobs must be a whole number from 1, got 0"),
        (("run", "tiny", "--steps", "3", "--epochs", "1"), "--epochs and --steps are two budgets; give one"),
        (("run", "tiny", "--seconds", "-3"), "budget.seconds must be a finite number above 0, got -3"),
        (("run", "tiny", "--slice", "3/2"), "--slice must be I/N with I from 1 to N, such as 2/8, got '3/2'"),
        (("run", "tiny", "--device", "tpu"), "device must be cpu, cuda, cuda:N, mps or xpu, got 'tpu'"),
        (("run", "tiny", "--device", "cuda:99"), "nothing can run on the device 'cuda:99': "),
        (("run", "no.toml"), "the study file no.toml does not exist"),
        (("run", "mnist-autoencoder", "--data", "no/such/folder"), "no/such/folder does not exist"),
        (("tune", "tiny", "--trials", "0"), "--trials must be a whole number from 1, got 0"),
        (("tune", "tiny", "--tuning-seeds", "1"), "seeds 1 are of tuning and of the report"),
        (("report", "no/such/folder"), "holds no finished runs"),
        (("compare", "no/such/folder", "other"), "holds no finished runs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, words):
    status, text = run(*arguments)
    assert status == 2
    assert words in text
    assert text.count("\n") == 1


def test_a_typo_in_a_study_file_is_said_in_one_line():
    status, text = run("run", write(STUDY.replace("trials", "trails")))
    assert (status, text.count("\n")) == (2, 1)
    assert "study.toml: unknown key 'trails' in tuning; did you mean 'trials'?" in text


def test_a_budget_does_not_change_what_a_schedule_means():
    file = write(STUDY.replace("[tuning]\ntrials = 3", "[schedule.adam]\nfactor = 0.1\nevery = 4"))
    status, text = run("run", file, "--epochs", "1", "--out", "out")
    assert (status, text.count("\n")) == (2, 1)
    assert "--epochs: step sizes of this study fall by steps; give --steps" in text
    assert run("run", file, "--steps", "2", "--out", "out")[0] == 0


def test_help_teaches(capsys):
    for arguments in (["--help"], ["run", "--help"], ["tune", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "examples:" in capsys.readouterr().out
    assert run("list")[0] == 0


def test_options_may_be_repeated_and_lists_split():
    command = ("run", "tiny", "--method", "adam", "--methods", "sgd", "mbf", "--method", "adam", "--seeds", "1")
    assert run(*command, "--steps", "2", "--out", "out")[0] == 0
    assert [record.spec.method for record in Results(Path("out")).records()] == ["adam", "sgd", "mbf"]


@pytest.mark.parametrize("arguments", [("--traceback", "report", "none"), ("report", "none", "--traceback")])
def test_a_traceback_is_shown_where_it_is_asked_for(arguments):
    status, text = run(*arguments)
    assert status == 2
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("error: none holds no finished runs")


def test_a_study_file_tunes_runs_and_reports(drawn):
    status, text = run("run", write(STUDY), "--out", "out")
    assert status == 0
    results = Results(Path("out"))
    purposes = [record.spec.purpose for record in results.records()]
    assert (purposes.count("tuning"), purposes.count("report")) == (9, 6)
    assert "[15/15]" in text
    assert "Report: " in text
    assert Path("out/index.html").is_file()
    assert "A study" in Path("out/study.toml").read_text()
    before = results.file.read_bytes()
    status, text = run("run", "study.toml", "--out", "out")
    assert status == 0
    assert results.file.read_bytes() == before
    status, text = run("tune", "study.toml", "--out", "out")
    assert status == 0
    assert text.count("best of 3 trials") == 3
    assert results.file.read_bytes() == before
    assert run("report", "out", "--out", "elsewhere")[0] == 0
    assert Path("elsewhere/index.html").is_file()


def test_a_study_stops_resumes_and_reports(monkeypatch):
    command = ("run", "tiny", "--methods", "adam", "mbf", "--seeds", "2", "--epochs", "3", "--out", "out")
    real, calls = runner._step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "_step", interrupted)
    status, text = run(*command)
    assert status == 130
    assert "The same command goes on" in text
    monkeypatch.setattr(runner, "_step", real)
    status, text = run(*command)
    assert status == 0
    assert "[3/3]" in text  # the first was done
    assert len(Results(Path("out")).records()) == 4


def test_slices_and_merging_make_the_whole():
    write(STUDY.replace("[tuning]\ntrials = 3", ""))
    for number in (1, 2):
        status, _ = run("run", "study.toml", "--slice", f"{number}/2", "--out", f"part{number}")
        assert status == 0
    assert run("run", "study.toml", "--out", "whole")[0] == 0
    assert run("report", "part1", "part2", "--out", "both")[0] == 0
    parts, whole = Path("part1/records.jsonl"), Path("whole/records.jsonl")
    parts.write_bytes(parts.read_bytes() + Path("part2/records.jsonl").read_bytes())
    status, text = run("compare", "part1", "whole")
    assert status == 0
    assert text.count("× 1.00") >= 3
    found = [{r.spec.key: r.reproducible() for r in Results(file.parent).records()} for file in (parts, whole)]
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_slices_of_a_search_are_read_together():
    write(STUDY)
    for number in (1, 2):
        status, text = run("run", "study.toml", "--slice", f"{number}/2", "--out", f"part{number}")
        assert status == 0
        assert "the search is not over" in text  # of the methods of the other slice
    status, text = run("report", "part1", "part2", "--out", "both")
    assert status == 0
    assert text.count("best of 3 trials") == 3
    assert "the search is not over" not in text


def test_a_run_that_fails_does_not_stop_the_others():
    methods = ("tests.benchmarks.tiny:broken", "adam")
    status, text = run("run", "tiny", "--methods", *methods, "--seeds", "1", "--out", "out")
    assert status == 2
    assert "1 of the runs failed, all others are done" in text
    assert "RuntimeError: the third step (tiny.py:" in text
    assert [record.spec.method for record in Results(Path("out")).records()] == ["adam"]


def test_settings_that_are_refused_are_said_before_anything_runs():
    status, text = run("run", write(STUDY + "[settings.adam]\nmomentun = 0.9\n[settings.Other]\nlr = -1.0\n"))
    assert (status, text.count("\n")) == (2, 1)
    assert "adam refuses the settings" in text
    assert "momentun" in text


def test_a_results_folder_that_cannot_be_used_is_named():
    Path("file").touch()
    status, text = run("run", "tiny", "--out", "file")
    assert (status, text.count("\n")) == (2, 1)
    assert "file: File exists" in text


def test_damaged_records_are_named_and_nothing_is_run_over_them():
    command = ("run", "tiny", "--methods", "adam", "--seeds", "2", "--epochs", "1", "--out", "out")
    assert run(*command)[0] == 0
    file = Path("out/records.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    damaged = lines[0][:100] + b"\n" + lines[1]
    file.write_bytes(damaged)
    for arguments in (command, ("report", "out")):
        status, text = run(*arguments)
        assert (status, text.count("\n")) == (2, 1)
        assert "out/records.jsonl:1 is no record of a run" in text
        assert file.read_bytes() == damaged
    file.write_bytes(lines[1])
    assert run(*command)[0] == 0
    assert len(file.read_bytes().splitlines()) == 2


def test_budgets_are_not_mixed():
    command = ("run", "tiny", "--methods", "adam", "adam", "--seeds", "2", "--out", "out")
    for epochs in ("1", "2"):
        assert run(*command, "--epochs", epochs)[0] == 0
    assert run("report", "out")[0] == 0  # of the last study
    Path("out/study.toml").unlink()
    status, text = run("report", "out")
    assert status == 2
    assert "runs of adam on tiny that differ in settings or budget" in text


def test_without_a_network_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("CURVLIB_CACHE", "cache")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    status, text = run("run", "mnist-autoencoder", "--methods", "adam")
    assert (status, text.count("\n")) == (2, 1)
    assert "could not download" in text
    assert "Max retries" not in text  # what is below it is told
    assert "--data" in text


def test_several_processes_stop_cleanly_and_end_with_the_same_numbers(tmp_path):
    text = (
        STUDY.replace('"tiny"', '"digits-cnn"').replace("steps = 12", "steps = 80").replace("[tuning]\ntrials = 3", "")
    )
    Path("study.toml").write_text(text.replace("seeds = [0, 1]", "seeds = [0]\nthreads = 1"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks", "run", "study.toml", "--jobs", "2", "--out", "many"]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(Path("many").glob("checkpoints/*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert "their times share the machine" in output
    assert "Stopped; nothing is lost" in output
    left = [file for file in Path("many/checkpoints").iterdir() if not file.suffix]
    assert left or Results(Path("many")).records()
    for folder in ("many", "one"):  # in processes of their own: this one's threads are not theirs
        subprocess.run([*command[:-3], "1", "--out", folder], env=environment, check=True, capture_output=True)
    found = [{r.spec.key: r.reproducible() for r in Results(Path(name)).records()} for name in ("many", "one")]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    shutil.rmtree("many")


def test_spans_of_time_are_readable():
    assert [span(seconds) for seconds in (None, 5, 119, 121, 7300, 200000)] == [
        "–",
        "5 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]
    assert [spec(epochs=count).budget for count in (1, 5)] == ["1 epoch", "5 epochs"]
