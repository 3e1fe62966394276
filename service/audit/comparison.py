"""Answers of the target and of a reference to the same images -> how often they differ, and who is right more often.

Outcomes --[clean, corrupted, perturbed]--> Comparison: disagreement, exact McNemar, Holm --> DifferentialReport
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from service.audit import robustness, statistics
from service.audit.report import Comparison, DifferentialReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool

    from service.audit.outcomes import Answers, Outcomes
    from service.audit.report import AttackReport, TargetReport


def report(
    found: Outcomes, *, reference: TargetReport, attacks: Sequence[str], searches: Sequence[AttackReport], seed: int
) -> DifferentialReport:
    """Compare target and reference on all images that both were asked about.

    Args:
        found: by image, with the reference's answers to the clean images.
        reference: who that is.
        attacks: ids of those whose adversarial images are compared.
        searches: of attacks that search for disagreement.
        seed: of the bootstrap.
    """
    theirs = found.clean.reference
    assert theirs is not None
    compared = {"clean": found.clean}
    compared |= {f"{name} {severity}": answers for (name, severity), answers in found.corrupted.items()}
    compared |= {name: found.attacked[name].nearest for name in attacks if name in found.attacked}
    comparisons = _adjusted([_compare(on, answers, found) for on, answers in compared.items() if _both(answers)])
    clean = comparisons[0]
    return DifferentialReport(
        reference=reference,
        reference_accuracy=float((theirs == found.labels[found.clean.rows]).mean()),
        p_value=clean.p_value,
        disagreement=clean.disagreement,
        interval=clean.interval,
        n=clean.n,
        **_mean("corrupted", list(found.corrupted.values()), seed=seed),
        **_mean("perturbed", [found.attacked[name].nearest for name in attacks if name in found.attacked], seed=seed),
        comparisons=comparisons,
        searches=tuple(searches),
    )


def differences(several: Sequence[Answers]) -> Bool[np.ndarray, "rows answers"] | None:
    """Return where the two differ, on the rows that stand in all of several answers; None if there are none."""
    known = [answers for answers in several if _both(answers)]
    if not known:
        return None
    rows = robustness.shared_rows([answers.rows for answers in known])
    return np.stack([_differ(answers)[np.searchsorted(answers.rows, rows)] for answers in known], axis=1)


def _both(answers: Answers) -> bool:
    return answers.reference is not None


def _differ(answers: Answers) -> Bool[np.ndarray, " n"]:
    return np.asarray(answers.predictions != answers.reference)


def _compare(on: str, answers: Answers, found: Outcomes) -> Comparison:
    share = robustness.proportion(_differ(answers))
    ours = found.correct(answers)
    theirs = np.asarray(answers.reference == found.labels[answers.rows])
    ours_only, theirs_only = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    p_value = statistics.mcnemar(ours_only, theirs_only)
    return Comparison(
        on=on,
        disagreement=share.accuracy,
        interval=share.interval,
        n=share.n,
        target_only=ours_only,
        reference_only=theirs_only,
        p_value=p_value,
        adjusted_p_value=p_value,
    )


def _adjusted(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    adjusted = statistics.holm([each.p_value for each in comparisons])
    pairs = zip(comparisons, adjusted, strict=True)
    return tuple(each.model_copy(update={"adjusted_p_value": value}) for each, value in pairs)


def _mean(on: str, several: Sequence[Answers], *, seed: int) -> dict[str, Any]:
    differ = differences(several)
    # An interval over images needs two of them.
    if differ is None or len(differ) < 2:
        return {}
    interval = statistics.bootstrap_mean(differ, seed=seed)
    return {f"{on}_disagreement": float(differ.mean()), f"{on}_interval": interval}
