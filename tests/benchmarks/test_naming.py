"""Names: what other people's modules may do, what a method is whatever it is called, and titles that tell."""

from __future__ import annotations

import pytest
import torch

import curvlib
from benchmarks.methods import METHODS, MethodError, check_titles, label, method, named, origin
from benchmarks.naming import UnknownName, imported, problem


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('x')", r"module mine\d cannot be imported, KeyError: 'x' \(mine\d\.py:1\)"),
        ("def (", r"module mine\d cannot be imported, SyntaxError: .*"),
        ("import sys\nsys.exit(3)", r"module mine\d cannot be imported, SystemExit: 3 \(mine\d\.py:2\)"),
        ("import nothing_of_this_name", r"there is no module 'nothing_of_this_name'"),
        ("Other = 3", r"module mine\d has no 'Class'"),
    ],
)
def test_what_goes_wrong_in_other_people_s_modules_is_said_in_one_line(tmp_path, monkeypatch, body, words):
    number = abs(hash(body)) % 10
    (tmp_path / f"mine{number}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, f"mine{number}", raising=False)
    with pytest.raises(UnknownName, match=words) as caught:
        imported(f"mine{number}:Class")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [":Adam", "a b:Adam", ".x:Adam", "a..b:Adam"])
def test_what_is_no_name_of_a_module_is_said(name):
    with pytest.raises(UnknownName, match="is no name of a module; give module:Name"):
        imported(name)


def test_what_is_no_problem_is_said():
    with pytest.raises(UnknownName, match="torch:nn is no Problem, but module"):
        problem("torch:nn")


def test_a_method_is_what_it_is_whatever_its_label():
    assert origin("Ours=adam") is origin("adam") is curvlib.Adam
    assert origin("A=B=torch.optim:Adam") is torch.optim.Adam
    assert origin("nobody.has.this:Class") is None
    assert named("Ours=sgd") is METHODS["sgd"]
    assert named("torch.optim:SGD") is None
    assert method("A=B=adam").title == label("A=B=adam") == "A"


@pytest.mark.parametrize("name", ["=adam", " =adam", "=torch.optim:Adam", "Label="])
def test_half_a_label_is_refused(name):
    with pytest.raises(MethodError, match="is no Label=METHOD; give Label="):
        method(name)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("KFAC=torch.optim:SGD",), "'KFAC' is what kfac is called, not KFAC=torch.optim:SGD; give it another label"),
        (("adam=sgd",), "'adam' is what adam is called, not adam=sgd"),
        (("adam", "Adam=torch.optim:Adam"), "adam and Adam=torch.optim:Adam are both called 'Adam'"),
    ],
)
def test_labels_that_mislead_are_refused(names, words):
    with pytest.raises(MethodError) as caught:
        check_titles(names)
    assert words in str(caught.value)


def test_labels_that_tell_are_taken():
    check_titles(["Adam=torch.optim:Adam", "Mine=torch.optim:SGD", "sgd", "MBF=mbf"])
