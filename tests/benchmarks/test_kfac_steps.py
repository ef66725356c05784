"""The table of KFAC's first steps and costs."""

import json

import pytest

from benchmarks import kfac_steps


def test_the_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kfac_steps.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(kfac_steps, "COSTS", {"Adam": kfac_steps.COSTS["Adam"]})
    assert kfac_steps.main(["--out", str(tmp_path / "kfac"), "--threads", "1", "--iterations", "1"]) == 0
    content = json.loads((tmp_path / "kfac" / "kfac.json").read_text())
    assert set(content["first_steps"]) == {"Adam, lr 1e-3", *kfac_steps.FIRST}
    assert all(loss < 1 for name in kfac_steps.FIRST for loss, _ in content["first_steps"][name])
    assert set(content["costs"]["Adam | 1"]) == {"mean", "median", "adam_ms"}
    assert content["environment"]["packages"]["torch"]
    assert "kfac.json" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--threads", "0"], ["--iterations", "-1"]])
def test_numbers_below_one_are_refused(bad, capsys):
    assert kfac_steps.main(bad) == 2
    assert "must be whole numbers from 1" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert kfac_steps.main(["--out", str(tmp_path / "taken")]) == 2
    assert "--out" in capsys.readouterr().out
