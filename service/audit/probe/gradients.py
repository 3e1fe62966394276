"""What gradients a source gives, and whether it answers as the target does.

images --source--> cross entropy --backward--> gradients: zero? --> Probe
              '--> class: the target's? ----------------------------^
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from service.audit.shard import Probe

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from service.audit.gradient.source import Source

# Images at once: a large network's activations at 224 x 224, kept for a gradient, are 3 GB.
_CHUNK = 32


class _Connected(nn.Module):
    """A model whose answers have a gradient, if only zero: those of a constant one have none at all."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits if logits.requires_grad or not images.requires_grad else logits + 0 * images.sum()


def connected(source: Source) -> Source:
    """Return a source that gives gradients of zero where it would give none, which attacks do not understand."""
    return replace(source, module=_Connected(source.module))


def measured(
    source: Source,
    *,
    images: Float32[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    predictions: Int64[Tensor, " n"],
) -> tuple[Probe, Probe]:
    """Measure a source's gradients and answers.

    Args:
        source: of gradients.
        images: clean, in [0, 1].
        labels: true classes.
        predictions: the target's.
    """
    zero = disagree = 0
    for chunk in torch.split(torch.arange(len(images)), _CHUNK):
        inputs = images[chunk].to(source.device).requires_grad_()
        logits = source(inputs)
        loss = functional.cross_entropy(logits, labels[chunk].to(logits.device), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, inputs)
        zero += int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())
        disagree += int((logits.detach().argmax(dim=1).cpu() != predictions[chunk]).sum())
    return (
        Probe(code="zero_gradients", attack=source.name, count=zero, n=len(images)),
        Probe(code="source_disagrees", attack=source.name, count=disagree, n=len(images)),
    )
