"""Checks of gradients and of single attacks: a function for each code, with when it is raised and what it means.

Probes, results of the plan's attacks --intervals--> Doubts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.intervals import wilson
from service.audit import outcomes
from service.audit.attack_tables import epsilon_value
from service.audit.report import Doubt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64

    from service.audit.check.evidence import Evidence
    from service.audit.plan import Attack
    from service.audit.shard import Distances

# Share of images without any gradient from which a gradient attack's number says little.
_ZERO_GRADIENTS = 0.1
# Of clean images; as gradient.source accepts one.
_AGREEMENT = 0.99
# Share of images that a part may add to those before it: more, and those were too weak.
_ADDED = 0.05
# The same for Square after white-box attacks, which should leave it nothing (AutoAttack's own check).
_ADDED_WITHOUT_GRADIENTS = 0.01
# Of the images that an attack does not fool, the share without queries left from which the budget is what ended it.
_MOST = 0.5
# Of the images that a half of the budget was left for: the share that the first half must fool, for it to be an attack
# at all, and that the second half may fool.
_FOUND = 0.05


def zero_gradients(evidence: Evidence) -> list[Doubt]:
    """Check that there are gradients to follow.

    Raised if: the cross entropy has a gradient of exactly zero at 10 % of the images or more.
    Explanation: a gradient attack cannot move there, so its robust accuracy is no bound. Look for rounding in front of
        the model and for logits so large that softmax saturates, take gradients from another source, and attack by
        scores or decisions as well.
    """
    return [
        Doubt(
            code="zero_gradients",
            explanation=(
                f"the gradient of the {probe.attack} is exactly zero at {probe.count} of {probe.n} images: attacks "
                "that follow it cannot move there, and their robust accuracy is no bound. Look for rounding in front "
                "of the model and for logits so large that softmax saturates; attack by scores or decisions as well"
            ),
        )
        for probe in evidence.probes("zero_gradients")
        if probe.count and probe.count >= _ZERO_GRADIENTS * probe.n
    ]


def source_disagrees(evidence: Evidence) -> list[Doubt]:
    """Check that a source of gradients is a model of the target.

    Raised if: a source gives the target's class to fewer than 99 % of the clean images, by its 95 % interval.
    Explanation: its gradients are those of another function, and attacks with them are transfer attacks. Take the
        checkpoint or the ONNX file that the engine was built from.
    """
    return [
        Doubt(
            code="source_disagrees",
            explanation=(
                f"the {probe.attack} gives another class than the target to {probe.count} of {probe.n} clean images: "
                "its gradients are those of another function. Take the checkpoint or the ONNX file that the engine "
                "was built from"
            ),
        )
        for probe in evidence.probes("source_disagrees")
        if wilson(probe.n - probe.count, probe.n)[1] < _AGREEMENT
    ]


def large_epsilon(evidence: Evidence) -> list[Doubt]:
    """Check that an attack succeeds where it must.

    Raised if: PGD within 64/255 in Linf, or Square where there are no gradients, leaves a robust accuracy above chance,
        1 over the number of classes, by its 95 % interval.
    Explanation: so large a perturbation can remove what an image shows; an attack that fails there fails for reasons of
        its own, such as gradients that lead nowhere. Only images of a few high contrasts, as handwriting, may
        withstand it.
    """
    return [
        Doubt(
            code="large_epsilon",
            explanation=(
                f"{probe.attack or 'PGD'} within 64/255 leaves {probe.count} of {probe.n} images robust, where chance "
                f"is 1 in {probe.details['classes']:.0f}: within so much nearly any classifier can be fooled, so the "
                "attack fails, and its numbers at smaller epsilons are no bounds. Look for masked gradients, and "
                "attack by scores or decisions as well"
            ),
        )
        for probe in evidence.probes("large_epsilon")
        if wilson(probe.count, probe.n)[0] > 1 / probe.details["classes"]
    ]


def parts_differ(evidence: Evidence) -> list[Doubt]:
    """Check that the parts of a union tell the same story.

    Raised if: at an epsilon, of an attack with several sources of gradients, a later one adds more than 5 % of the
        images to what those before it fooled; of a suite, Square adds more than 1 % to what the white-box attacks
        fooled; both by the 95 % interval.
    Explanation: the union counts what any part found, and where the parts differ so much, at least one of them follows
        gradients that are masked or of another function; another part yet might find more. Compare the parts in
        the report, and attack with another kind of attack.
    """
    found = ([_adding(evidence, attack, epsilon) for epsilon in attack.epsilons] for attack in evidence.attacks)
    # One epsilon of each attack is enough to doubt it.
    return [raised[0] for attack in found if (raised := [doubt for doubt in attack if doubt is not None])]


def _adding(evidence: Evidence, attack: Attack, epsilon: str) -> Doubt | None:
    parts = list(evidence.parts(attack.id, epsilon_value(epsilon)).items())
    if len(parts) <= 1:
        return None
    before = parts[0][1]
    for name, fooled in parts[1:]:
        added = int((fooled & ~before).sum())
        if wilson(added, len(fooled))[0] > _allowed(attack, name):
            explanation = (
                f"{attack.id}: {name} fools {added} of {len(fooled)} images at {epsilon} that the parts before it do "
                "not: these follow gradients that are masked or of another function, and another attack yet might "
                "find more. Compare the parts, and attack in another way as well"
            )
            return Doubt(code="parts_differ", explanation=explanation)
        before = before | fooled
    return None


def _allowed(attack: Attack, part: str) -> float:
    """Return which share of the images a part may add; a suite's white-box attacks any, as they are made for that."""
    if attack.name != "AutoAttack":
        return _ADDED
    return _ADDED_WITHOUT_GRADIENTS if part.endswith("Square") else 1.0


def budget_spent(evidence: Evidence) -> list[Doubt]:
    """Check that a budget leaves time to find something.

    Raised if: at an epsilon, queries ended the attack on more than half of the images that it does not fool, and it
        fools no more than 5 % of those that need a perturbation; or the second half of the budget still fooled more
        than 5 % of the images that it was left for, by the 95 % interval.
    Explanation: the robust accuracy is then one of the budget, and not of the target. Give more queries per image, or
        an attack that needs fewer.
    """
    found = (
        next(filter(None, (_spending(evidence, attack, attack.budget, epsilon) for epsilon in attack.epsilons)), "")
        for attack in evidence.attacks
        if attack.budget is not None
    )
    return [Doubt(code="budget_spent", explanation=explanation) for explanation in found if explanation]


def _spending(evidence: Evidence, attack: Attack, budget: int, epsilon: str) -> str:
    """Return what speaks against a budget at one epsilon; nothing if it was enough."""
    shards = [each for each in evidence.shards(attack.id) if each.asked]
    distances = _sizes([each.distances for each in shards])
    halfway = _sizes([each.halfway or each.distances for each in shards])
    asked = np.array([count for each in shards for count in each.asked], dtype=np.int64)
    size = epsilon_value(epsilon)
    robust = outcomes.robust(distances, size)
    spent = int((robust & (asked >= budget)).sum())
    if spent <= _MOST * robust.sum():
        return ""
    ended = f"{attack.id}: the budget of {budget} queries was spent on {spent} of {len(robust)} images"
    advice = "Give more queries per image"
    fooled = int((~robust & (distances > 0)).sum())
    if fooled <= _FOUND * (fooled + robust.sum()):
        found = "anything was found on any" if not fooled else f"more than {fooled} were fooled"
        return f"{ended} before {found} at {epsilon}: its robust accuracy is one of the budget. {advice}"
    open_halfway = outcomes.robust(halfway, size)
    late, left = int((open_halfway & ~robust).sum()), int(open_halfway.sum())
    if wilson(late, left)[0] <= _FOUND:
        return ""
    return (
        f"{ended}, and its second half still fooled {late} of the {left} left at {epsilon}: with more of it, the "
        f"robust accuracy would be lower. {advice}"
    )


def _sizes(distances: Sequence[Distances]) -> Float64[np.ndarray, " n"]:
    return np.array([np.inf if size is None else size for each in distances for size in each], dtype=np.float64)
