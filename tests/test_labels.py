"""Labels drawn from the model's own predictions."""

from __future__ import annotations

import pytest
import torch

from curvlib import sample_labels
from curvlib.labels import seeds

COUNT = 40000


def test_categorical_frequencies_are_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(COUNT, 3)
    labels = sample_labels(logits, "categorical", torch.Generator().manual_seed(0))
    assert labels.shape == (COUNT,)
    expected = logits[0].softmax(0)
    # five standard deviations of a frequency
    bound = 5 * (expected * (1 - expected) / COUNT).sqrt()
    assert ((torch.bincount(labels) / COUNT - expected).abs() < bound).all()
    assert sample_labels(torch.randn(2, 3, 4), "categorical").shape == (2, 3)


def test_bernoulli_and_gaussian_moments():
    logits = torch.full((COUNT,), 0.7)
    draws = sample_labels(logits, "bernoulli", torch.Generator().manual_seed(0))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert abs(draws.mean() - logits[0].sigmoid()) < 5 * 0.5 / COUNT**0.5
    draws = sample_labels(logits, "gaussian", torch.Generator().manual_seed(0))
    assert abs(draws.mean() - 0.7) < 5 / COUNT**0.5
    assert abs(draws.std() - 1) < 5 / COUNT**0.5


def test_draws_repeat_with_their_generator_and_carry_no_graph():
    logits = torch.randn(4, 3, requires_grad=True)
    first, second = (sample_labels(logits, "gaussian", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    with pytest.raises(
        ValueError, match="likelihood must be one of 'categorical', 'bernoulli', 'gaussian', got 'poisson'"
    ):
        sample_labels(logits, "poisson")


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_outputs_that_are_not_finite_give_labels_and_gradients_that_tell(likelihood):
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    labels = sample_labels(logits, likelihood, torch.Generator().manual_seed(0))
    assert len(labels) == 3
    (seed,) = seeds(logits, likelihood, "sampled", generator=torch.Generator().manual_seed(0))
    assert seed[0].isfinite().all()
    assert not seed[1].isfinite().all()
