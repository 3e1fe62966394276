"""Checks of a target's answers: a function for each code, with when it is raised and what it means.

Probes of service.audit.probe.answers --> Doubts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit.report import Doubt

if TYPE_CHECKING:
    from service.audit.check.evidence import Evidence

# Share of images whose answer says that nothing else is possible from which attacks by scores have too little to go by.
_SATURATED = 0.1
# Answers that nearly all add up to 1 do not do so by chance.
_NEARLY_ALL = 0.99


def randomised_outputs(evidence: Evidence) -> list[Doubt]:
    """Check that the same batch gets the same answers.

    Raised if: the same batch, sent twice, gets another class for an image, or logits that differ by more than 1 % of
        the spread of all logits.
    Explanation: an attack that takes one answer for the truth overestimates such a target where it gives up, and
        underestimates it where it is lucky. Turn the randomness off, or attack the mean of many answers.
    """
    return [
        Doubt(
            code="randomised_outputs",
            explanation=(
                f"the same batch sent twice got other answers for {probe.count} of {probe.n} images (another class for "
                f"{probe.details.get('classes', 0):.0f}; the largest difference is "
                f"{probe.details.get('largest', 0):.3g} of the logits' spread); one answer is not the truth about this "
                "target, and attacks that take it for that find too much or too little. Turn the randomness off, or "
                "attack the mean of many answers"
            ),
        )
        for probe in evidence.probes("randomised_outputs")
        if probe.count
    ]


def batch_dependent_outputs(evidence: Evidence) -> list[Doubt]:
    """Check that an image alone and in batches of every served size gets the same answers.

    Raised if: an image alone and in a batch gets another class, or logits that differ by more than 1 % of the spread of
        all logits; not where the same batch gets different answers anyway.
    Explanation: what is measured at one batch size does not hold at another. Look for normalisation over the batch, and
        for scales that an 8-bit engine computes from it; or serve, and audit, one batch size only.
    """
    probes = [probe for probe in evidence.probes("batch_dependent_outputs") if probe.count]
    if not probes or randomised_outputs(evidence):
        return []
    sizes = ", ".join(f"{probe.details.get('batch', 0):.0f} ({probe.count} of {probe.n})" for probe in probes)
    explanation = (
        f"images alone and in a batch got different answers, at batch sizes of {sizes} images; what is measured at one "
        "batch size does not hold at another. Look for normalisation over the batch and for scales computed from it, "
        "or serve and audit one batch size only"
    )
    return [Doubt(code="batch_dependent_outputs", explanation=explanation)]


def constant_outputs(evidence: Evidence) -> list[Doubt]:
    """Check that different images get different answers.

    Raised if: all images get the same logits, to float32's rounding.
    Explanation: the target does not look at its input, so that nothing can change its class, and no accuracy is one of
        robustness. Check the exported file, and how images are preprocessed.
    """
    return [
        Doubt(
            code="constant_outputs",
            explanation=(
                f"all {probe.n} images got the same logits: the target does not look at its input, and what cannot "
                "change is not robust. Check the exported file, and how images are preprocessed"
            ),
        )
        for probe in evidence.probes("constant_outputs")
        if probe.n > 1 and probe.count == probe.n
    ]


def softmax_outputs(evidence: Evidence) -> list[Doubt]:
    """Check that a target answers with logits.

    Raised if: at least 99 % of the answers are numbers from 0 to 1 that add up to 1.
    Explanation: losses take the softmax of what already is one: their gradients are small where the target is
        confident, and no margin is left that an attack could follow. Export the model without its softmax.
    """
    return [
        Doubt(
            code="softmax_outputs",
            explanation=(
                f"{probe.count} of {probe.n} answers are numbers from 0 to 1 that add up to 1, so probabilities and no "
                "logits: losses take their softmax a second time, and have hardly a gradient where the target is "
                "confident. Export the model without its softmax"
            ),
        )
        for probe in evidence.probes("softmax_outputs")
        if probe.count >= _NEARLY_ALL * probe.n
    ]


def saturated_outputs(evidence: Evidence) -> list[Doubt]:
    """Check that probabilities leave something to go by.

    Raised if: the answers are log-probabilities, and at 10 % of the images or more the first class has all of it: the
        confidence is 1 in float32.
    Explanation: what the probabilities of the other classes were is lost, and attacks by scores search blindly there.
        Serve logits, or attack by decisions as well.
    """
    return [
        Doubt(
            code="saturated_outputs",
            explanation=(
                f"the target answers with probabilities, and {probe.count} of {probe.n} images have a confidence of 1 "
                "in float32: attacks by scores cannot see whether they get nearer there. Serve logits, or attack by "
                "decisions as well"
            ),
        )
        for probe in evidence.probes("saturated_outputs")
        if probe.count and probe.count >= _SATURATED * probe.n
    ]
