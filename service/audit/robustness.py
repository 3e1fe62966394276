"""What attacks found, by image -> robust accuracy with its interval, by epsilon, class and attack.

Attacked --attack--> AttackReport
Outcomes --worst_case--> WorstCase: an image counts as robust if every attack failed on it
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from export.intervals import wilson
from service.audit import distribution, outcomes
from service.audit.plan import epsilon_value
from service.audit.report import (
    AttackReport,
    ClassReport,
    CurvePoint,
    EpsilonReport,
    Proportion,
    SourceReport,
    WorstCase,
    WorstCaseReport,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float64, Int64

    from service.audit.outcomes import Attacked, Outcomes
    from service.audit.plan import Attack
    from service.audit.report import Spread

# Intervals between the points of a curve, besides the plan's epsilons: a smooth line in a figure.
_POINTS = 20


def proportion(flags: Bool[np.ndarray, " n"]) -> Proportion:
    """Return the share of at least one flag that is set."""
    hits, n = int(flags.sum()), len(flags)
    return Proportion(accuracy=hits / n, interval=wilson(hits, n), n=n)


def by_class(
    flags: Bool[np.ndarray, " n"], labels: Int64[np.ndarray, " n"], *, class_names: Sequence[str]
) -> tuple[ClassReport, ...]:
    """Return the share of each class that has images."""
    return tuple(
        ClassReport(name=class_names[label], **proportion(flags[labels == label]).model_dump())
        for label in np.unique(labels)
    )


def attack(attack: Attack, found: Outcomes, *, class_names: Sequence[str]) -> AttackReport:
    """Report one attack, at least one shard of which was run."""
    own = found.attacked[attack.id]
    fooled = np.isfinite(own.distances) & (own.distances > 0)
    return AttackReport(
        id=attack.id,
        name=attack.name,
        access=attack.access,
        norm=attack.norm,
        n=len(own.rows),
        results=tuple(_at(epsilon, own, found.labels, class_names=class_names) for epsilon in attack.epsilons),
        curve=_curve(own, sizes(attack)),
        distances=distribution.spread(own.distances),
        within=attack.within,
        unrounded=distribution.quantiles(own.unrounded) if own.unrounded is not None else None,
        queries_to_success=_queries(own.first_success[fooled]),
        queries=int(own.asked.sum()),
        overhead=own.queries - int(own.asked.sum()),
        budget_spent=own.budget_spent,
        sources=tuple(SourceReport(name=name, agreement=share, n=n) for name, (share, n) in own.agreement.items()),
    )


def sizes(attack: Attack) -> list[float]:
    """Return an attack's epsilons in input units, ascending."""
    return sorted(map(epsilon_value, attack.epsilons))


def worst_case(attacks: Sequence[Attack], found: Outcomes) -> WorstCase | None:
    """Report what survives all attacks, over the images that all of them were given.

    Args:
        attacks: that search for a wrong class.
        found: by image.

    Returns:
        None if there are no such images.
    """
    run = [attack for attack in attacks if attack.id in found.attacked]
    rows = shared_rows([found.attacked[each.id].rows for each in run]) if run else np.array([], dtype=np.int64)
    if not len(rows):
        return None
    everywhere = np.logical_and.reduce([survivors([each], found, size=sizes(each)[-1])[0] for each in run])
    return WorstCase(**proportion(everywhere[rows]).model_dump(), results=_by_norm(run, found))


def survivors(
    attacks: Sequence[Attack], found: Outcomes, *, size: float
) -> tuple[Bool[np.ndarray, " samples"], Int64[np.ndarray, " n"]]:
    """Return which samples no attack fooled within a size, and the rows that all of them attacked.

    What one attack finds within a larger epsilon of its own counts if it is within this one, too.
    """
    alive = np.ones(len(found.labels), dtype=bool)
    for each in attacks:
        own = found.attacked[each.id]
        alive[own.rows] &= own.robust(size)
    return alive, shared_rows([found.attacked[each.id].rows for each in attacks])


def shared_rows(rows: Sequence[Int64[np.ndarray, " k"]]) -> Int64[np.ndarray, " n"]:
    """Return the rows that stand in all of several, at least one, ascending."""
    return reduce(np.intersect1d, rows)


def _by_norm(run: Sequence[Attack], found: Outcomes) -> tuple[WorstCaseReport, ...]:
    epsilons = {(each.norm, epsilon_value(epsilon)): epsilon for each in run for epsilon in each.epsilons}
    reports = []
    for (norm, size), epsilon in sorted(epsilons.items()):
        own = [each for each in run if each.norm == norm]
        alive, rows = survivors(own, found, size=size)
        share = proportion(alive[rows]).model_dump()
        ids = tuple(each.id for each in own)
        reports.append(WorstCaseReport(**share, norm=norm, epsilon=epsilon, size=size, attacks=ids))
    return tuple(reports)


def _at(epsilon: str, own: Attacked, labels: Int64[np.ndarray, " n"], *, class_names: Sequence[str]) -> EpsilonReport:
    size = epsilon_value(epsilon)
    robust = own.robust(size)
    share = proportion(robust)
    return EpsilonReport(
        epsilon=epsilon,
        size=size,
        robust_accuracy=share.accuracy,
        interval=share.interval,
        n=share.n,
        queries=float(own.asked.mean()),
        unrounded_accuracy=_mean_robust(own.unrounded, size) if own.unrounded is not None else None,
        parts=_first_to_fool(own, size),
        classes=by_class(robust, labels[own.rows], class_names=class_names),
    )


def _first_to_fool(own: Attacked, size: float) -> dict[str, float | None]:
    """Return for each part the share of images that it was the first to fool; None where none was left for it."""
    shares: dict[str, float | None] = {}
    left = own.distances > 0
    for name, distances in own.parts.items():
        fooled = left & ~outcomes.robust(distances, size)
        shares[name] = float(fooled.mean()) if left.any() else None
        left &= ~fooled
    return shares


def _mean_robust(distances: Float64[np.ndarray, " n"], size: float) -> float:
    return float(outcomes.robust(distances, size).mean())


def _curve(own: Attacked, epsilons: Sequence[float]) -> tuple[CurvePoint, ...]:
    if not epsilons:
        return ()
    points = sorted({*np.linspace(0, epsilons[-1], _POINTS + 1).tolist(), *epsilons})
    return tuple(CurvePoint(size=size, **proportion(own.robust(size)).model_dump()) for size in points)


def _queries(values: Int64[np.ndarray, " n"]) -> Spread | None:
    return distribution.spread(values.astype(np.float64), logarithmic=True) if len(values) else None
