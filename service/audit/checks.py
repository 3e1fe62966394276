"""Sanity checks: when an audit's own numbers should not be believed, and why.

Each check is a function of the shards' results; what it raises is a warning with a code and an explanation.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

from service.audit.report import Doubt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.auditor import ShardResult
    from service.audit.report import AttackReport

# Share of images without any gradient from which a gradient attack's number says little.
_ZERO_GRADIENT_SHARE = 0.1


def check(results: Sequence[ShardResult], attacks: Sequence[AttackReport]) -> list[Doubt]:
    """Run all checks."""
    return [
        *_zero_gradients(results),
        *_not_monotone(attacks),
        *_weaker_wins(attacks),
        *_unstable(results),
        *_batch_dependent(results),
    ]


def _zero_gradients(results: Sequence[ShardResult]) -> list[Doubt]:
    """Raised if: the loss has a gradient of exactly zero at 10 % or more of the images of a white-box attack."""
    doubts = []
    for attack in dict.fromkeys(result.shard.subject for result in results if result.shard.kind == "attack"):
        own = [result for result in results if result.shard.kind == "attack" and result.shard.subject == attack]
        zero, n = sum(result.zero_gradients for result in own), sum(len(result.correct) for result in own)
        if zero >= _ZERO_GRADIENT_SHARE * n:
            explanation = (
                f"{attack}: the loss has no gradient at {zero} of {n} images; a gradient attack cannot move there, "
                "so its robust accuracy is no bound. Look for rounding or saturation in front of the model, and "
                "attack with a decision-based method as well"
            )
            doubts.append(Doubt(code="zero_gradients", explanation=explanation))
    return doubts


def _not_monotone(attacks: Sequence[AttackReport]) -> list[Doubt]:
    """Raised if: an attack finds more adversarial images within a smaller epsilon than within a larger one."""
    doubts = []
    for attack in attacks:
        ordered = sorted(attack.results, key=lambda result: result.size)
        for smaller, larger in pairwise(ordered):
            # A point of the interval's half-width is chance; more is an attack that does not converge.
            if larger.robust_accuracy > smaller.interval[1]:
                explanation = (
                    f"{attack.id}: robust accuracy rises from {smaller.robust_accuracy:.3f} at {smaller.epsilon} to "
                    f"{larger.robust_accuracy:.3f} at {larger.epsilon}: it does not converge; give it more steps"
                )
                doubts.append(Doubt(code="not_monotone", explanation=explanation))
    return doubts


def _weaker_wins(attacks: Sequence[AttackReport]) -> list[Doubt]:
    """Raised if: at one epsilon of one norm, a weaker attack finds significantly more than an iterative white-box one.

    Weaker is one gradient step (`single_step_wins`), or no gradient at all (`gradient_free_wins`).
    """
    doubts = []
    for iterative, other in product(attacks, attacks):
        if not _is_iterative(iterative) or _is_iterative(other) or other.norm != iterative.norm:
            continue
        code = "single_step_wins" if other.access == "white-box" else "gradient_free_wins"
        limits = {result.size: result for result in iterative.results}
        for result in other.results:
            beaten = limits.get(result.size)
            if beaten is not None and result.robust_accuracy < beaten.interval[0]:
                explanation = (
                    f"{other.id} leaves {result.robust_accuracy:.3f} robust at {result.epsilon}, {iterative.id} "
                    f"{beaten.robust_accuracy:.3f}: the gradients that {iterative.id} follows are masked or of another "
                    "model; its robust accuracy is no bound"
                )
                doubts.append(Doubt(code=code, explanation=explanation))
    return doubts


def _is_iterative(attack: AttackReport) -> bool:
    return attack.access == "white-box" and attack.name != "FGSM"


def _unstable(results: Sequence[ShardResult]) -> list[Doubt]:
    """Raised if: the same batch sent twice gets two different top-1 classes for an image."""
    if not (count := sum(result.unstable for result in results)):
        return []
    explanation = (
        f"the engine's top-1 class changed for {count} images when the same batch was sent again; attacks that take "
        "one answer for the truth underestimate or overestimate such an engine"
    )
    return [Doubt(code="unstable_outputs", explanation=explanation)]


def _batch_dependent(results: Sequence[ShardResult]) -> list[Doubt]:
    """Raised if: an image alone and in a batch gets two different top-1 classes."""
    if not (count := sum(result.batch_dependent for result in results)):
        return []
    explanation = (
        f"the engine's top-1 class depends on the batch for {count} images; what is measured at one batch size does "
        "not hold at another"
    )
    return [Doubt(code="batch_dependent_outputs", explanation=explanation)]
