"""The table of LO-FI beside the dense filter."""

import json

import pytest

from benchmarks import filtering


def test_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filtering, "FILTERS", {"LO-FI, L = 2": filtering.FILTERS["LO-FI, L = 2"], "full": {}})
    monkeypatch.setattr(filtering, "PRIORS", (0.1,))
    assert filtering.main(["--out", str(tmp_path / "filtering"), "--seeds", "2", "--length", "20"]) == 0
    content = json.loads((tmp_path / "filtering" / "filtering.json").read_text())
    assert set(content["streams"]) == {"regression", "digits"}
    for results in content["streams"].values():
        assert set(results) == {"LO-FI, L = 2", "full"}
        assert all(len(found["runs"]) == 2 and found["prior_variance"] == 0.1 for found in results.values())
        assert all(found["held_out"]["mean"] < 10 and found["step_ms"] > 0 for found in results.values())
    assert content["environment"]["packages"]["torch"]
    assert "filtering.json" in capsys.readouterr().out


def test_the_seed_decides_the_stream():
    for build in filtering.STREAMS.values():
        one, same, other = build(1, 5), build(1, 5), build(2, 5)
        assert one.train.inputs.equal(same.train.inputs)
        assert one.model[0].weight.equal(same.model[0].weight)
        assert not one.train.inputs.equal(other.train.inputs)


@pytest.mark.parametrize("bad", [["--seeds", "0"], ["--length", "-1"]])
def test_numbers_below_one_are_refused(bad, capsys):
    assert filtering.main(bad) == 2
    assert "must be whole numbers from 1" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert filtering.main(["--out", str(tmp_path / "taken")]) == 2
    assert "--out" in capsys.readouterr().out
