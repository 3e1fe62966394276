"""Checks that compare attacks on the same images: a function for each code, with when it is raised and what it means.

Probes of service.audit.probe.contests, results of the plan's attacks --exact McNemar--> Contests
                                                                  service.audit.checks --Holm--> Doubts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.audit.attack_tables import epsilon_value
from service.audit.check.evidence import is_single_step
from service.audit.statistics import mcnemar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.audit.check.evidence import Evidence
    from service.audit.plan import Attack
    from service.audit.shard import Probe

# Of all images, by which more steps or restarts may change the number of an attack that has converged.
_CONVERGED = 0.02


@dataclass(frozen=True)
class Contest:
    """Two attacks on the same images, of which the first should not win.

    Attributes:
        code: of the doubt.
        subject: whose number is doubted.
        won: images that only the first fooled.
        lost: images that only the second did.
        n: images.
        explanation: which numbers, and what to do.
        least: share of the images by which the first has to be ahead.
    """

    code: str
    subject: str
    won: int
    lost: int
    n: int
    explanation: str
    least: float = 0.0

    @property
    def p_value(self) -> float:
        """By the exact McNemar test; 1 where the first attack is not ahead, or not by enough."""
        ahead = self.won - self.lost
        return mcnemar(self.won, self.lost) if ahead > max(0.0, self.least * self.n) else 1.0


def single_step_wins(evidence: Evidence) -> list[Contest]:
    """Compare one gradient step with many.

    Raised if: one step (FGSM) fools significantly more images than an iterative attack with the same gradients at the
        same epsilon and norm; of the plan's attacks, and of a short PGD.
    Explanation: more steps can only help where gradients show the way: here they are masked, or the steps have the
        wrong size. The iterative attack's robust accuracy is no bound; attack by scores or decisions as well.
    """
    advice = "gradients do not show the way, or the steps have the wrong size; attack by scores or decisions as well"
    found = [_probed(probe, "one gradient step", advice) for probe in evidence.probes("single_step_wins")]
    return found + _among(evidence, "single_step_wins", is_single_step, advice)


def gradient_free_wins(evidence: Evidence) -> list[Contest]:
    """Compare attacks without gradients with those that have them.

    Raised if: an attack by scores or decisions fools significantly more images than a white-box attack at the same
        epsilon and norm; of the plan's attacks, and of a short Square and a short PGD.
    Explanation: whoever sees less should find less: the gradients are masked or of another model, and the white-box
        attack's robust accuracy is no bound. Look for rounding, saturation and randomness, and rely on the attacks
        without gradients.
    """
    advice = "its gradients are masked or of another model; look for rounding, saturation and randomness in the model"
    found = [_probed(probe, "Square, without gradients,", advice) for probe in evidence.probes("gradient_free_wins")]
    return found + _among(evidence, "gradient_free_wins", _is_gradient_free, advice)


def noise_wins(evidence: Evidence) -> list[Contest]:
    """Compare random noise with an attack.

    Raised if: uniform noise fools significantly more images than a short PGD within the same epsilon; than a short
        Square where there are no gradients.
    Explanation: chance finds what the attack does not: it hardly moves, or the target's answers vary. Do not believe
        any robust accuracy of this audit before zero gradients and random outputs are ruled out.
    """
    advice = "the attack hardly moves, or the answers vary; rule out zero gradients and randomised outputs first"
    return [_probed(probe, "uniform noise", advice) for probe in evidence.probes("noise_wins")]


def transfer_wins(evidence: Evidence) -> list[Contest]:
    """Compare another model's gradients with the target's own.

    Raised if: a transfer attack fools significantly more images than a white-box attack at the same epsilon and norm;
        or PGD with one source of gradients more than with another.
    Explanation: another function's gradients lead further than the target's own: these are masked. Take both sources
        (gradients = "all"), and do not rely on the one that lost.
    """
    advice = 'these are masked, or of another function; take all sources (gradients = "all")'
    found = [
        _probed(probe, "PGD with another source's gradients", advice) for probe in evidence.probes("transfer_wins")
    ]
    return found + _among(evidence, "transfer_wins", lambda attack: attack.access == "transfer", advice)


def not_monotone(evidence: Evidence) -> list[Contest]:
    """Compare an attack with itself within more.

    Raised if: a short PGD fools significantly more images within a smaller epsilon than within a larger one. Each is
        run by itself: within a plan's attack, what succeeds at a small epsilon counts at the larger ones.
    Explanation: what suffices within a small epsilon is allowed within a larger one: the attack does not converge. Give
        it more steps, or smaller ones.
    """
    advice = "what fools within a smaller epsilon may be used within a larger: it does not converge; give it more steps"
    return [
        _probed(probe, f"PGD within the smaller epsilon {probe.details['smaller']:.4g}", advice)
        for probe in evidence.probes("not_monotone")
    ]


def steps_change(evidence: Evidence) -> list[Contest]:
    """Compare an attack with itself with twice the steps.

    Raised if: twice the steps fool significantly more images, and more than 2 % of them; of the plan's gradient attacks
        within an epsilon, or of a short PGD where there is none; without gradients, of Square.
    Explanation: the attack has not converged, and its robust accuracy is that of its steps. Give it more, or take APGD,
        which adapts them.
    """
    advice = "it has not converged; give it more steps, or take APGD"
    return [_probed(probe, "twice the steps", advice, least=_CONVERGED) for probe in evidence.probes("steps_change")]


def restarts_change(evidence: Evidence) -> list[Contest]:
    """Compare an attack with itself with one restart more.

    Raised if: another random start fools significantly more images, and more than 2 % of them; as for steps.
    Explanation: the result depends on where the attack starts, so that another start would find more again. Give it
        more restarts.
    """
    advice = "its result depends on the start; give it more restarts"
    return [
        _probed(probe, "one restart more", advice, least=_CONVERGED) for probe in evidence.probes("restarts_change")
    ]


def _is_gradient_free(attack: Attack) -> bool:
    return attack.access in {"score", "decision"}


def _probed(probe: Probe, challenger: str, advice: str, *, least: float = 0.0) -> Contest:
    own = f"PGD with the gradients of the {probe.attack}" if probe.code == "transfer_wins" else probe.attack
    subject = own or "a short PGD"
    numbers = probe.details
    explanation = (
        f"{subject} fools {numbers['trusted']:.0f} of {probe.n} images within {numbers['epsilon']:.4g}, {challenger} "
        f"{numbers['found']:.0f}, {probe.count} of them others: {advice}"
    )
    return Contest(probe.code, subject, probe.count, int(numbers["trusted_only"]), probe.n, explanation, least=least)


def _among(evidence: Evidence, code: str, is_weaker: Callable[[Attack], bool], advice: str) -> list[Contest]:
    """Compare the plan's attacks of one norm, at every epsilon that both have."""
    return [
        _planned(evidence, code, (other, trusted), epsilon, advice)
        for other, trusted in evidence.pairs()
        if is_weaker(other)
        for epsilon in _shared(other.epsilons, trusted.epsilons)
    ]


def _shared(first: Sequence[str], second: Sequence[str]) -> list[str]:
    sizes = {epsilon_value(epsilon) for epsilon in first}
    return [epsilon for epsilon in second if epsilon_value(epsilon) in sizes]


def _planned(evidence: Evidence, code: str, pair: tuple[Attack, Attack], epsilon: str, advice: str) -> Contest:
    other, trusted = pair
    won, lost, n = evidence.paired(other.id, trusted.id, epsilon_value(epsilon))
    explanation = (
        f"{other.id} fools {won} of {n} images at {epsilon} that {trusted.id} does not, and {trusted.id} only {lost} "
        f"that {other.id} does not: the robust accuracy of {trusted.id} is no bound; {advice}"
    )
    return Contest(code, trusted.id, won, lost, n, explanation)
