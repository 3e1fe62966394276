"""Two engines, one set of images: differences, agreement, verdict.

Logits are compared because a client may threshold them; top-1 agreement because that is what most clients use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.manifest import Parity

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.engines.base import Images, Logits


@dataclass(frozen=True)
class Limits:
    """What still counts as the same classifier.

    Attributes:
        disagreement: largest share of images whose top-1 class may differ.
        logit_difference: largest absolute difference of any logit; None where rounding is the point (int8).
    """

    disagreement: float
    logit_difference: float | None

    def as_record(self) -> dict[str, float]:
        """Return the limits that are set, for the manifest."""
        record = {"disagreement": self.disagreement}
        return record if self.logit_difference is None else {**record, "logit_difference": self.logit_difference}


# fp32 differs by the order of sums alone; int8 rounds, and 3 % is more than sound int8 of small models costs.
LIMITS = {
    "fp32": Limits(disagreement=0.001, logit_difference=1e-3),
    "int8": Limits(disagreement=0.03, logit_difference=None),
}


def compare(answers: Logits, expected: Logits, *, reference: str, images: str, limits: Limits) -> Parity:
    """Compare an engine's logits with its source's on the same images.

    Args:
        answers: (N, classes) of the engine under test.
        expected: (N, classes) of the source.
        reference: what the source is, for the reader.
        images: what the images are, for the reader.
        limits: what is allowed.

    Raises:
        ValueError: the shapes differ or there are no images.
    """
    if answers.shape != expected.shape or not len(answers):
        raise ValueError(f"parity: expected two equal, non-empty shapes, got {answers.shape} and {expected.shape}")
    difference = np.abs(answers - expected)
    agreement = float(np.mean(answers.argmax(axis=1) == expected.argmax(axis=1)))
    maximum = float(difference.max())
    faults = _faults(agreement, maximum, finite=bool(np.isfinite(answers).all()), limits=limits)
    return Parity(
        status="failed" if faults else "passed",
        reference=reference,
        images=images,
        n=len(answers),
        agreement=agreement,
        max_abs_difference=maximum,
        mean_abs_difference=float(difference.mean()),
        limits=limits.as_record(),
        explanation="; ".join(faults),
    )


def batched(run: Callable[[Images], Logits], images: Images, *, batch: int) -> Logits:
    """Run an engine (or anything alike) over any number of images, `batch` at a time."""
    return np.concatenate([run(images[start : start + batch]) for start in range(0, len(images), batch)])


def _faults(agreement: float, maximum: float, *, finite: bool, limits: Limits) -> list[str]:
    faults = []
    if not finite:
        faults.append("some logits are not finite")
    if 1 - agreement > limits.disagreement:
        faults.append(f"top-1 differs on {1 - agreement:.2%} of the images, allowed are {limits.disagreement:.2%}")
    if limits.logit_difference is not None and not maximum <= limits.logit_difference:
        faults.append(f"logits differ by up to {maximum:.2g}, allowed are {limits.logit_difference:.2g}")
    return faults
