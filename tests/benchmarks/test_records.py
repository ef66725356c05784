"""Records: one file, which loses nothing, whoever writes and whatever breaks."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os

import pytest

from benchmarks import records
from benchmarks.environment import environment
from benchmarks.records import Point, Record, RecordError, Results, Spec, write_whole


def spec(seed=0, **changes):
    given = {"problem": "p", "method": "m", "settings": {"lr": 0.1}, "seed": seed, "epochs": 2} | changes
    return Spec(**given)


def record(seed=0, **changes):
    points = (Point(0, 0.0, 3.0, 3.5), Point(10, 1.25, 0.1 + 0.2, math.nan, 0.9))
    parts = {"forward and backward": 1.0, "rest": 0.25}
    return Record(spec(seed, **changes), "finished", points, 0.125, 100, {"commit": "abc"}, parts, 5000, "a note")


def test_a_record_comes_back_as_it_was(tmp_path):
    results = Results(tmp_path)
    results.add(record())
    (read,) = Results(tmp_path).records()
    assert read.line() == record().line()
    assert read.spec == record().spec
    assert read.points[-1].train == 0.1 + 0.2
    assert math.isnan(read.points[-1].test)
    json.loads(results.file.read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def test_a_key_is_of_the_contents():
    assert spec().key == spec().key
    others = [spec(1), spec(settings={"lr": 0.2}), spec(problem="q"), spec(method="n"), spec(epochs=3)]
    others += [spec(epochs=None, steps=2), spec(epochs=None, seconds=2.0), spec(purpose="tuning")]
    assert len({one.key for one in [spec(), *others]}) == 9
    assert spec(settings={"lr": 1}) == spec(settings={"lr": 1.0})
    assert spec(settings={"lr": 1}).key == spec(settings={"lr": 1.0}).key
    assert spec(settings={"a": 1, "b": (1, 2)}) == spec(settings={"b": [1, 2], "a": 1})


@pytest.mark.parametrize("changes", [{"epochs": None}, {"steps": 3}])
def test_a_run_has_one_budget(changes):
    with pytest.raises(RecordError, match="one budget of epochs, steps, seconds"):
        spec(**changes)


def test_what_cannot_be_written_down_is_no_setting():
    with pytest.raises(RecordError, match="setting lr must be a finite number"):
        spec(settings={"lr": lambda step: 0.1})


@pytest.mark.parametrize("cut", [1, 50, 0.5])
def test_a_line_that_was_cut_off_is_cut_and_lost_alone(tmp_path, cut):
    results = Results(tmp_path)
    for seed in range(3):
        results.add(record(seed))
    content = results.file.read_bytes()
    lines = content.splitlines(keepends=True)
    torn = lines[-1][: int(cut if cut >= 1 else len(lines[-1]) * cut)]
    results.file.write_bytes(b"".join(lines[:-1]) + torn)
    reader = Results(tmp_path)
    assert [one.spec.seed for one in reader.records()] == [0, 1]
    reader.add(record(2))
    assert results.file.read_bytes() == content
    assert [one.spec.seed for one in reader.records()] == [0, 1, 2]


@pytest.mark.parametrize(
    "damage", [b'{"key": 1}', b"junk", b"[]", b"\xff\xfe", b'{"key": "a", "spec": {}, "points": {}}']
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    results = Results(tmp_path)
    for seed in range(3):
        results.add(record(seed))
    lines = results.file.read_bytes().splitlines()
    results.file.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(RecordError, match=r"records\.jsonl:2 is no record of a run .*remove that line"):
        Results(tmp_path).records()


def test_merging_is_concatenation(tmp_path):
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for seed in seeds:
            Results(tmp_path / name).add(record(seed))
    files = [tmp_path / name / "records.jsonl" for name in "ab"]
    files[0].write_bytes(files[0].read_bytes() + files[1].read_bytes())
    assert [one.spec.seed for one in Results(tmp_path / "a").records()] == [0, 1, 2]


@pytest.mark.parametrize("written", [0, 30])
def test_a_full_disk_is_said_and_harms_nothing(tmp_path, monkeypatch, written):
    results = Results(tmp_path)
    results.add(record(0))
    before = results.file.read_bytes()
    real, room = os.write, [written]

    def full(descriptor, content):
        if room and (taken := room.pop()):
            return real(descriptor, content[:taken])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "write", full)
    with pytest.raises(RecordError, match="the disk is full; nothing that was written before is lost"):
        results.add(record(1))
    monkeypatch.undo()
    assert results.file.read_bytes() == before
    results.add(record(1))
    assert len(Results(tmp_path).records()) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "checkpoints" / "x"
    write_whole(file, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(RecordError, match="checkpoints/x could not be written, the disk is full"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [one.name for one in file.parent.iterdir()] == ["x"]


def _append_many(folder, first):
    results = Results(folder)
    for seed in range(first, first + 40):
        results.add(record(seed))


def test_processes_append_to_one_file_at_once(tmp_path):
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    others = [context.Process(target=_append_many, args=(tmp_path, 100 * number)) for number in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [other.exitcode for other in others] == [0] * 4
    assert len(Results(tmp_path).records()) == 160
    assert len(Results(tmp_path).file.read_bytes().splitlines()) == 160


def test_a_run_is_claimed_once_and_a_dead_process_holds_nothing(tmp_path):
    results = Results(tmp_path)
    lock = results.claim(spec())
    assert results.claim(spec()) is None
    assert results.claim(spec(1)) is not None
    results.leave(spec(), lock)
    again = results.claim(spec())
    assert again is not None
    results.add(record())
    results.known(spec())
    results.checkpoint(spec()).touch()
    results.leave(spec(), again)
    assert not results.checkpoint(spec()).exists()
    assert not results.checkpoint(spec()).with_suffix(".lock").exists()


def test_the_environment_says_what_decides_times():
    found = environment("cpu", "rich.console")
    assert {
        "commit",
        "python",
        "packages",
        "system",
        "processor",
        "cores",
        "device",
        "threads",
        "jobs",
        "precision",
    } == set(found)
    assert {"curvlib", "torch", "rich"} <= set(found["packages"])
    assert "unknown" not in found["packages"].values()
