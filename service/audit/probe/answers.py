"""Whether a target's answers are those of a classifier that can be attacked: stable, its own, not saturated.

images --twice, alone, in batches of every served size--> logits --compared--> Probe
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from service.audit.shard import Probe

if TYPE_CHECKING:
    from export.engines.base import Images, Logits
    from service.audit.target.base import Target

# Of the spread of all logits. Float16 engines answer within 0.2 % of themselves in another batch, and noise of a
# thousandth changes no attack; more is another answer.
_SAME = 0.01
# A change of class is none of the target's own where the difference is float32's rounding.
_ROUNDING = 1e-4
# Relative to the largest logit: answers that differ by less are equal in float32.
_EQUAL = 1e-6
# Probabilities of an 8-bit softmax add up to 1 within this.
_SUM = 0.01
# Log-probabilities are exact to float32: their exponentials add up to 1 within this.
_LOG_SUM = 1e-3
# The largest number below 1 in float32 is 1 - 2^-24: a confidence above is 1.
_CERTAIN = 2.0**-24


def measured(target: Target, images: Images) -> tuple[Probe, ...]:
    """Measure how a target answers.

    Args:
        target: is asked (3 + its batch sizes) times about each image.
        images: (n, C, H, W) float32, of the target's domain; at least 1.

    Returns:
        One probe for each code, and for each batch size.
    """
    answers = target(images)
    spread = _spread(answers)
    return (
        _changed("randomised_outputs", answers, target(images), spread=spread),
        *_batches(target, images, spread=spread),
        _constant(answers),
        _probabilities(answers),
        _log_probabilities(answers),
    )


def _spread(answers: Logits) -> float:
    """Return the standard deviation of logits, of which an image's mean is taken off: softmax does not see it."""
    return float((answers - answers.mean(axis=1, keepdims=True)).std(dtype=np.float64))


def _changed(code: str, before: Logits, after: Logits, *, spread: float, batch: int | None = None) -> Probe:
    difference = np.abs(before.astype(np.float64) - after).max(axis=1)
    flipped = (before.argmax(axis=1) != after.argmax(axis=1)) & (difference > _ROUNDING * spread)
    return Probe(
        code=code,
        count=int((flipped | (difference > _SAME * spread)).sum()),
        n=len(before),
        details={
            "classes": float(flipped.sum()),
            "largest": float(difference.max() / spread) if spread else float(difference.max()),
            **({} if batch is None else {"batch": float(batch)}),
        },
    )


def _batches(target: Target, images: Images, *, spread: float) -> tuple[Probe, ...]:
    alone = np.concatenate([target(images[row : row + 1]) for row in range(len(images))])
    return tuple(
        _changed("batch_dependent_outputs", alone, _in_batches(target, images, size), spread=spread, batch=size)
        for size in target.batch_sizes
        if size > 1
    )


def _in_batches(target: Target, images: Images, size: int) -> Logits:
    """Return the logits of images in full batches; the last one is filled up with the first images."""
    n = len(images)
    rows = np.arange(-(-n // size) * size) % n
    batches = (np.ascontiguousarray(images[rows[start : start + size]]) for start in range(0, len(rows), size))
    return np.concatenate([target(batch) for batch in batches])[:n]


def _constant(answers: Logits) -> Probe:
    apart = np.abs(answers - answers[:1]).max(axis=1)
    equal = apart <= _EQUAL * max(1e-30, float(np.abs(answers).max()))
    return Probe(code="constant_outputs", count=int(equal.sum()), n=len(answers))


def _probabilities(answers: Logits) -> Probe:
    within = ((answers >= -_EQUAL) & (answers <= 1 + _EQUAL)).all(axis=1)
    complete = np.abs(answers.sum(axis=1, dtype=np.float64) - 1) <= _SUM
    return Probe(code="softmax_outputs", count=int((within & complete).sum()), n=len(answers))


def _log_probabilities(answers: Logits) -> Probe:
    """Count images of which a log-probability says that nothing else is possible."""
    precise = answers.astype(np.float64)
    top = precise.max(axis=1, keepdims=True)
    total = (top + np.log(np.exp(precise - top).sum(axis=1, keepdims=True))).ravel()
    logarithms = (np.abs(total) <= _LOG_SUM) & (precise.max(axis=1) <= _EQUAL)
    certain = logarithms & (precise.max(axis=1) > -_CERTAIN)
    return Probe(
        code="saturated_outputs",
        count=int(certain.sum()),
        n=len(answers),
        details={"logarithms": float(logarithms.sum())},
    )
