"""Classifiers of one's own, for recipes to name by their factories."""

from __future__ import annotations

from torch import Tensor, nn


class _Apart(nn.Module):
    """A body and a head that do not make the model up."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        logits: Tensor = self.head(maps if maps.sum() < 0 else -maps)  # which torch.fx cannot trace
        return logits


def apart(num_classes: int) -> nn.Module:
    return _Apart(num_classes)


def dropping(num_classes: int) -> nn.Module:
    """A network with dropout in its body and in its head."""
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, num_classes))
    return nn.Sequential(body, head)


def tied(num_classes: int) -> nn.Module:
    """A network two of whose layers have one weight."""
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(3, num_classes))
    network[1].weight = network[0].weight
    return network
