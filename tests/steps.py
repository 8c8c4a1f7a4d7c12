"""A few steps of an optimiser on one batch."""

import torch
from torch import nn


def losses_of(model: nn.Module, images, targets, *, lr: float, steps: int) -> list[float]:
    """What a model that gives its losses by name loses at each of a few steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr), []
    for _ in range(steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
