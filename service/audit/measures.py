"""The numbers that gates compare, from what became of every image.

Metric --Measures--> Measured: value, interval, n, and each image's own value, so that differences can be paired
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from export.intervals import wilson
from service.audit import calibration, comparison, robustness, statistics
from service.audit.attack_tables import epsilon_value
from service.audit.measured import Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float64, Int64

    from service.audit.metric import Metric
    from service.audit.outcomes import Attacked, Outcomes
    from service.audit.plan import Attack, Plan

# An interval over images needs two of them.
_FEWEST = 2


class Measures:
    """The numbers of one audit, or of that part of it that has been run: what was not measured is None."""

    def __init__(self, plan: Plan, found: Outcomes, *, class_names: Sequence[str]) -> None:
        self._plan = plan
        self._found = found
        self._class_names = class_names
        self._by_name: dict[str, Callable[..., Measured | None]] = {
            "accuracy": self._accuracy,
            "class_accuracy": self._class_accuracy,
            "robust_accuracy": self._robust_accuracy,
            "worst_case": self._worst_case,
            "mean_error": self._mean_error,
            "disagreement": self._disagreement,
            "corrupted_disagreement": self._corrupted_disagreement,
            "perturbed_disagreement": self._perturbed_disagreement,
            "ece": self._ece,
            "median_distance": self._median_distance,
        }

    def __call__(self, metric: Metric) -> Measured | None:
        """Return a number with its 95 % interval; None if it was not measured."""
        return self._by_name[metric.name](*metric.key)

    def _accuracy(self) -> Measured | None:
        clean = self._found.clean
        return _share(self._found.correct(clean), clean.rows)

    def _class_accuracy(self, name: str) -> Measured | None:
        clean = self._found.clean
        own = self._found.labels[clean.rows] == self._class_names.index(name)
        return _share(self._found.correct(clean)[own], None) if own.any() else None

    def _robust_accuracy(self, attack: str, epsilon: str) -> Measured | None:
        own = self._attacked(attack)
        return None if own is None else _share(own.robust(epsilon_value(epsilon)), own.rows)

    def _worst_case(self, epsilon: str | None = None) -> Measured | None:
        """Return the share that survives all attacks: within their largest epsilons, or those that have this one."""
        attacks = [each for each in adversarial(self._plan) if epsilon is None or epsilon in each.epsilons]
        if not attacks or any(self._attacked(each.id) is None for each in attacks):
            return None
        alive = np.ones(len(self._found.labels), dtype=bool)
        rows = self._found.clean.rows
        for each in attacks:
            size = robustness.sizes(each)[-1] if epsilon is None else epsilon_value(epsilon)
            alive &= robustness.survivors([each], self._found, size=size)[0]
            rows = np.intersect1d(rows, self._found.attacked[each.id].rows)
        return _share(alive[rows], rows)

    def _mean_error(self) -> Measured | None:
        corrupted = list(self._found.corrupted.values())
        if not corrupted:
            return None
        rows = robustness.shared_rows([answers.rows for answers in corrupted])
        wrong = [~self._found.correct(each)[np.searchsorted(each.rows, rows)] for each in corrupted]
        return self._mean(np.stack(wrong, axis=1), rows)

    def _disagreement(self) -> Measured | None:
        clean = self._found.clean
        differ = comparison.differences([clean])
        return None if differ is None else _share(differ[:, 0], clean.rows)

    def _corrupted_disagreement(self) -> Measured | None:
        corrupted = list(self._found.corrupted.values())
        differ = comparison.differences(corrupted)
        if differ is None:
            return None
        return self._mean(differ, robustness.shared_rows([each.rows for each in corrupted]))

    def _perturbed_disagreement(self, attack: str | None = None) -> Measured | None:
        names = [attack] if attack is not None else [each.id for each in adversarial(self._plan)]
        perturbed = [own.nearest for name in names if (own := self._attacked(name)) is not None]
        differ = comparison.differences(perturbed)
        if differ is None:
            return None
        return self._mean(differ, robustness.shared_rows([each.rows for each in perturbed]))

    def _ece(self) -> Measured | None:
        clean = self._found.clean
        if clean.confidences is None:
            return None
        correct = self._found.correct(clean)
        return calibration.expected_calibration_error(clean.confidences, correct, seed=self._plan.data.seed)

    def _median_distance(self, attack: str) -> Measured | None:
        own = self._attacked(attack)
        if own is None:
            return None
        values = np.sort(own.distances)
        low, high = statistics.median_interval(values.tolist())
        # A value that occurs: the mean of two would be infinite where one of them is.
        middle = float(values[(len(values) - 1) // 2])
        return Measured(middle, max(low, 0.0), high, len(values), _paired(own.distances, own.rows))

    def _attacked(self, attack: str) -> Attacked | None:
        return self._found.attacked.get(attack)

    def _mean(self, values: Bool[np.ndarray, "n cells"], rows: Int64[np.ndarray, " n"]) -> Measured | None:
        if len(values) < _FEWEST:
            return None
        low, high = statistics.bootstrap_mean(values, seed=self._plan.data.seed)
        return Measured(float(values.mean()), low, high, len(values), _paired(values.mean(axis=1), rows))


def adversarial(plan: Plan) -> list[Attack]:
    """Return the plan's attacks that search for a wrong class; others search for disagreement of two engines."""
    return [attack for attack in plan.attacks if attack.name != "Disagreement"]


def _share(flags: Bool[np.ndarray, " n"], rows: Int64[np.ndarray, " n"] | None) -> Measured | None:
    hits, n = int(flags.sum()), len(flags)
    if n == 0:
        return None
    per_image = None if rows is None else _paired(flags.astype(np.float64), rows)
    return Measured(hits / n, *wilson(hits, n), n, per_image)


def _paired(values: Float64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]) -> Any:
    """Return values by image if they are of the first n samples, as pairs are made; None otherwise."""
    return values if np.array_equal(rows, np.arange(len(rows))) else None
