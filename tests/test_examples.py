"""The examples run, their losses fall, and their optimizers hear what they should."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import curvlib

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {
    "plain_loop": (),
    "lightning_module": ("lightning",),
    "hf_trainer": ("transformers", "accelerate"),
    "accelerate_loop": ("accelerate",),
    "timm_model": ("timm",),
}
UNHEARD = {"timm_model": {"cls_token", "pos_embed"}}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES} == NEEDS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::curvlib.TapWarning")
def test_an_example_trains_and_hears_its_layers(path):
    for package in ("sklearn", *NEEDS[path.stem]):
        pytest.importorskip(package, reason="needs the extra trainers")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses, optimizer = module.main()
    first, last = (sum(some) / len(some) for some in (losses[:3], losses[-3:]))
    assert last < 0.9 * first
    assert isinstance(optimizer, curvlib.CurvatureOptimizer)
    assert optimizer.health().ok
    listening = {unit.name for unit, recipe in optimizer._recipes().items() if recipe.moment.listens}
    heard = {unit.name for unit in optimizer._recipes() if unit.lead in optimizer._taps.ears}
    assert listening == heard != set()
    silent = {name for name, why in optimizer.routing().items() if "on the batch gradient" in why}
    assert silent == UNHEARD.get(path.stem, set())
    assert all(int(optimizer.state[ear.unit.lead]["updates"]) > 0 for ear in optimizer._taps.ears.values())
