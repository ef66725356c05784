import torch
from torch import nn

import curvlib


def test_every_named_method_lowers_a_loss():
    for make in (curvlib.SGD, curvlib.Adam, curvlib.AdamW, curvlib.RMSprop, curvlib.Adagrad, curvlib.Shampoo):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        inputs, targets = torch.randn(64, 6), torch.randint(0, 3, (64,))
        optimizer = make(model, lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
