import pytest
import torch

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from tests.benchmarks.tiny import TINY, WILD


@pytest.fixture
def tiny(monkeypatch):
    """A problem and a method that diverges, by name."""
    monkeypatch.setitem(PROBLEMS, "tiny", TINY)
    monkeypatch.setitem(METHODS, "wild", WILD)
    return TINY


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """What a study does to torch's threads is its own process's affair."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
