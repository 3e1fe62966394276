"""The learning rate over a run, as a share of its peak.

share of the run that is done -> warm-up -> "one-cycle" | "cosine" | "step" | "constant" -> share of the rate
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.recipe import Training

ONE_CYCLE_WARM_UP = 0.3  # share of a one-cycle run in which the rate rises; PyTorch's OneCycleLR has the same
FIRST_RATE = 0.04  # share of the peak that a warm-up starts from; PyTorch's OneCycleLR's 1 / div_factor


def rate(done: float, settings: Training) -> float:
    """Return the learning rate, as a share of its peak, when the share `done` of a run is done.

    A one-cycle run rises along a cosine, others along a line; both falls, "one-cycle" and "cosine", are along a
    cosine to 0 over what the warm-up leaves of the run.
    """
    warm_up = _warm_up(settings)
    if done < warm_up:
        risen = done / warm_up
        if settings.schedule == "one-cycle":
            risen = (1 - math.cos(math.pi * risen)) / 2
        return FIRST_RATE + (1 - FIRST_RATE) * risen
    if settings.schedule in ("one-cycle", "cosine"):
        return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2
    epoch = done * settings.epochs + 1e-9  # an iteration count divided and multiplied again may fall just short
    passed = sum(epoch >= milestone for milestone in settings.milestones)
    return float(settings.decay**passed)


def _warm_up(settings: Training) -> float:
    if settings.warm_up is not None:
        return settings.warm_up
    return ONE_CYCLE_WARM_UP if settings.schedule == "one-cycle" else 0.0
