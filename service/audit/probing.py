"""Measure what the reliability checks need to know, on some of an audit's images, whatever attacks its plan has.

images --> probe.answers (stable? of the batch? constant? probabilities?) --\
       --> probe.gradients of each source (zero? the target's class?) -------> Probes --> service.audit.checks
       --> probe.contests (PGD against FGSM, Square, noise, itself) ---------/
           without sources, Square stands for PGD
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from service.audit.probe import answers, contests, gradients
from service.audit.shard import Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float32, Int64
    from torch import Tensor

    from service.audit import plan
    from service.audit.gradient.source import Source
    from service.audit.target.base import Target


def probe(
    *,
    target: Target,
    sources: Sequence[Source],
    attacks: Sequence[plan.Attack],
    images: Float32[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    seed: int,
) -> tuple[Probe, ...]:
    """Measure a target, its gradient sources, and how attacks that should be weak or strong do on it.

    Args:
        target: what is audited.
        sources: of its gradients; without any, Square stands where PGD would, nothing that needs gradients is
            measured, and a probe "no_gradients" says so.
        attacks: of the plan; their epsilons are used, and those that take steps are run with more of them.
        images: clean, in [0, 1]; at least 1.
        labels: true classes.
        seed: of every random choice, at least 0.

    Raises:
        ValueError: there are no images.
        TargetFailed: see `Target`.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least 1 for the reliability checks, got none; give more samples")
    sent = target.domain.sent(images).cpu()
    array = sent.contiguous().numpy()
    found = answers.measured(target, array)
    field = contests.Field(target, sent, labels, seed)
    if not sources:
        missing = Probe(code="no_gradients", count=len(images), n=len(images))
        return (*found, missing, *contests.without_gradients(field, attacks=attacks))
    predictions = torch.from_numpy(target.predict(array))
    sources = [gradients.connected(source) for source in sources]
    for source in sources:
        found += gradients.measured(source, images=sent, labels=labels, predictions=predictions)
    return (*found, *contests.measured(field, sources=sources, attacks=attacks))
