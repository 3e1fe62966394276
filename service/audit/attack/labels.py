"""True classes, and those that an attack may aim at instead.

Foolbox's criterion --> labels (n,)
clean logits, labels --> rivals (n, k), the likeliest first
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import get_criterion

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor


def labels_of(criterion: Any) -> Int64[Tensor, " n"]:
    """Return the true classes that an attack should move its images away from.

    Args:
        criterion: the labels themselves, or Foolbox's `Misclassification` of them.

    Raises:
        ValueError: it is another criterion.
    """
    wanted = get_criterion(ep.astensor(criterion) if isinstance(criterion, torch.Tensor) else criterion)
    if not isinstance(wanted, foolbox.Misclassification):
        raise ValueError(f"criterion: expected labels or Misclassification, got {type(wanted).__name__}; pass labels")
    labels: Tensor = wanted.labels.raw
    return labels


def rivals(logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"], *, most: int) -> Int64[Tensor, "n k"]:
    """Return the likeliest wrong classes, at most so many, the likeliest first."""
    wrong = logits.detach().scatter(1, labels[:, None], -torch.inf)
    return wrong.argsort(dim=1, descending=True, stable=True)[:, : min(most, logits.shape[1] - 1)]
