"""What attacks maximise: one number for each image, from its logits and its true class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64
    from torch import Tensor

# The difference of logits ratio looks at the third highest logit; aimed at a class, at the fourth too.
DLR_CLASSES = 3
TARGETED_DLR_CLASSES = 4

# Keeps the ratio finite where all logits agree; far below any difference of float32 logits that matters.
_TINY = 1e-12


def cross_entropy(
    logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"], _rivals: Int64[Tensor, " n"]
) -> Float32[Tensor, " n"]:
    """Return the cross-entropy, in nats."""
    return functional.cross_entropy(logits, labels, reduction="none")


def dlr(
    logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"], _rivals: Int64[Tensor, " n"]
) -> Float32[Tensor, " n"]:
    """Return the difference of logits ratio, above 0 where the class is wrong; logits times a constant change nothing.

    Croce and Hein, "Reliable evaluation of adversarial robustness", 2020, equation 6.

    Raises:
        ValueError: there are fewer than 3 classes.
    """
    _enough(logits, DLR_CLASSES)
    ordered = logits.sort(dim=1).values
    own = _of(logits, labels)
    # The label's own logit does not compete with itself; equal to the highest, either serves.
    other = ordered[:, -1].where(own < ordered[:, -1], ordered[:, -2])
    return (other - own) / (ordered[:, -1] - ordered[:, -3] + _TINY)


def targeted_dlr(
    logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"], rivals: Int64[Tensor, " n"]
) -> Float32[Tensor, " n"]:
    """Return the difference of logits ratio towards a rival class.

    Croce and Hein, 2020, equation 7.

    Raises:
        ValueError: there are fewer than 4 classes.
    """
    _enough(logits, TARGETED_DLR_CLASSES)
    ordered = logits.sort(dim=1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + _TINY
    return (_of(logits, rivals) - _of(logits, labels)) / scale


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _enough(logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"difference of logits ratio: expected at least {least} classes, got {logits.shape[1]}; use cross-entropy"
        )
