from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from export.intervals import wilson
from service.audit import gates
from service.audit.gates import Measured, Metric
from service.audit.sequential import Sequential

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.audit.gates import Gate


def prefix(n: int, **columns: np.ndarray) -> Callable[[Metric], Measured | None]:
    """The numbers of the first n images."""

    def measure(metric: Metric) -> Measured | None:
        values = columns[metric.name][:n].astype(float)
        value = float(np.median(values)) if metric.kind == "median" else float(values.mean())
        return Measured(value, 0.0, 1.0, n, values)

    return measure


def run(
    texts: dict[str, str], *, error_rate: float = 0.05, planned: int, slice_size: int = 50, **columns: np.ndarray
) -> Sequential:
    sequential = Sequential(parsed(texts), error_rate=error_rate, planned=planned)
    for samples in range(slice_size, planned + 1, slice_size):
        if sequential.look(prefix(samples, **columns), samples=samples):
            break
    return sequential


def parsed(texts: dict[str, str]) -> dict[str, Gate]:
    return {name: gates.parse(text) for name, text in texts.items()}


def coin(rate: float, *, n: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < rate


def test_a_clear_gate_is_decided_early_and_the_saving_is_said() -> None:
    sequential = run({"robust": "worst_case >= 0.4"}, planned=2000, worst_case=coin(0.7))
    assert sequential.judgements()["robust"].outcome == "pass"
    assert sequential.savings.planned == 2000
    assert sequential.savings.used <= 100
    assert sequential.savings.share == 1 - sequential.savings.used / 2000


def test_all_gates_must_be_decided_before_the_audit_stops() -> None:
    texts = {"clear": "accuracy >= 0.4", "close": "worst_case <= 0.5"}
    sequential = run(texts, planned=2000, accuracy=coin(0.9), worst_case=coin(0.58, seed=1))
    alone = run({"clear": "accuracy >= 0.4"}, planned=2000, accuracy=coin(0.9))
    assert {name: each.outcome for name, each in sequential.judgements().items()} == {"clear": "pass", "close": "fail"}
    assert alone.savings.used < sequential.savings.used < 2000


def test_a_decided_comparison_stays_decided_by_the_look_that_decided_it() -> None:
    accuracy = np.concatenate([np.ones(200), np.zeros(1800)])
    texts = {"first": "accuracy >= 0.5", "never": "worst_case >= 0.5"}
    sequential = run(texts, planned=2000, accuracy=accuracy, worst_case=np.tile([0, 1], 1000))
    judgement = sequential.judgements()["first"]
    assert judgement.outcome == "pass"
    assert judgement.comparisons[0].measured is not None
    assert judgement.comparisons[0].measured.n == 50
    assert sequential.judgements()["never"].outcome == "inconclusive"
    assert (sequential.savings.used, sequential.savings.share) == (2000, 0.0)


def test_an_open_comparison_that_makes_no_difference_keeps_nobody_waiting() -> None:
    text = "accuracy >= 0.4 or worst_case >= 0.5"
    sequential = run({"either": text}, planned=2000, accuracy=coin(0.9), worst_case=np.tile([0, 1], 1000))
    assert sequential.savings.used <= 100


# A number right at its limit, from below, passes only by error. A Wilson interval looked at so often errs in far more
# than a twentieth of the audits, a confidence sequence in fewer.
def test_looking_often_errs_no_more_than_the_error_rate() -> None:
    trials, wrong, wrong_by_wilson = 300, 0, 0
    for trial in range(trials):
        hits = coin(0.3, n=1000, seed=trial)
        sequential = run({"g": "accuracy > 0.3"}, planned=1000, slice_size=20, accuracy=hits)
        wrong += sequential.judgements()["g"].outcome == "pass"
        looks = range(20, 1001, 20)
        wrong_by_wilson += any(wilson(int(hits[:n].sum()), n)[0] > 0.3 for n in looks)
    assert wrong <= 0.05 * trials
    assert wrong_by_wilson > 0.08 * trials


def test_a_smaller_error_rate_takes_more_samples_and_so_do_more_gates() -> None:
    hits = coin(0.6)
    usual = run({"g": "accuracy >= 0.5"}, planned=2000, slice_size=1, accuracy=hits).savings.used
    strict = run({"g": "accuracy >= 0.5"}, error_rate=0.001, planned=2000, slice_size=1, accuracy=hits).savings.used
    texts = {"g": "accuracy >= 0.5", **{f"g{index}": f"accuracy >= 0.{index}" for index in range(1, 5)}}
    several = run(texts, planned=2000, slice_size=1, accuracy=hits).savings.used
    assert usual < several < strict


def test_a_drop_is_paired_by_image() -> None:
    right = coin(0.9)
    robust = right & coin(0.85, seed=1)
    texts = {"drop": 'accuracy - robust_accuracy["pgd", "8/255"] <= 0.25'}
    sequential = run(texts, planned=2000, accuracy=right, robust_accuracy=robust)
    assert sequential.judgements()["drop"].outcome == "pass"
    (compared,) = sequential.judgements()["drop"].comparisons
    assert compared.measured is not None
    assert 0 < compared.measured.low < 0.135 < compared.measured.high < 0.25
    assert sequential.savings.used < 1000


def test_a_difference_of_either_sign_is_bounded_on_both_sides() -> None:
    texts = {"same": "accuracy - mean_error >= -0.2"}
    values = np.random.default_rng(0).random(4000)
    sequential = run(texts, planned=4000, accuracy=coin(0.5, n=4000), mean_error=values)
    (compared,) = sequential.judgements()["same"].comparisons
    assert compared.measured is not None
    assert sequential.judgements()["same"].outcome == "pass"
    assert compared.measured.low <= compared.measured.value <= compared.measured.high


def test_classes_without_values_by_image_are_compared_as_apart() -> None:
    numbers = {"cat": Measured(0.9, 0.8, 1.0, 500), "dog": Measured(0.3, 0.2, 0.4, 500)}
    sequential = Sequential(
        parsed({"fair": 'class_accuracy["cat"] - class_accuracy["dog"] <= 0.1'}), error_rate=0.05, planned=1000
    )
    assert sequential.look(lambda metric: numbers[metric.key[0]], samples=900)
    assert sequential.judgements()["fair"].outcome == "fail"


def test_a_median_is_decided_by_the_images_on_either_side() -> None:
    distances = np.random.default_rng(0).exponential(size=2000)
    distances[::3] = np.inf
    sequential = run({"far": 'median_distance["fmn"] >= 0.5'}, planned=2000, median_distance=distances)
    (compared,) = sequential.judgements()["far"].comparisons
    assert sequential.judgements()["far"].outcome == "pass"
    assert sequential.savings.used < 1000
    assert compared.measured is not None
    assert 0.5 <= compared.measured.low < 1.386 < compared.measured.high


def test_the_calibration_error_waits_for_the_last_sample() -> None:
    sequential = Sequential(parsed({"ece": "ece <= 0.05"}), error_rate=0.05, planned=200)
    measure = {"ece": Measured(0.02, 0.01, 0.03, 200)}
    assert not sequential.look(lambda metric: measure[metric.name], samples=100)
    assert sequential.look(lambda metric: measure[metric.name], samples=200)


def test_what_is_not_measured_yet_is_open() -> None:
    sequential = Sequential(parsed({"g": "accuracy >= 0.5"}), error_rate=0.05, planned=200)
    assert not sequential.look(lambda _metric: None, samples=100)
    assert sequential.judgements()["g"].outcome == "inconclusive"


def test_an_open_gate_says_how_many_samples_would_about_decide_it() -> None:
    sequential = run({"g": "accuracy >= 0.5"}, planned=100, accuracy=np.tile([1, 1, 1, 0, 0], 20))
    samples = sequential.judgements()["g"].samples
    assert samples is not None
    assert 100 < samples < 1000


def test_without_gates_there_is_nothing_to_stop_for() -> None:
    sequential = Sequential({}, error_rate=0.05, planned=10)
    assert not sequential.look(lambda _metric: None, samples=10)


@pytest.mark.parametrize(("error_rate", "planned"), [(0.0, 10), (1.0, 10), (0.05, 0)])
def test_impossible_settings_are_refused(error_rate: float, planned: int) -> None:
    with pytest.raises(ValueError, match=r"expected (an error rate|at least 1 planned)"):
        Sequential({}, error_rate=error_rate, planned=planned)


def test_a_median_without_values_by_image_stays_open() -> None:
    sequential = Sequential(parsed({"far": 'median_distance["fmn"] >= 0.5'}), error_rate=0.05, planned=200)
    assert not sequential.look(lambda _metric: Measured(3.0, 2.0, 4.0, 100), samples=100)


def test_a_gate_on_numbers_of_more_images_than_were_attacked_needs_more_than_those() -> None:
    numbers = {"accuracy": Measured(0.52, 0.5, 0.54, 1000), "worst_case": Measured(0.9, 0.8, 0.95, 100)}
    texts = {"both": "accuracy >= 0.5 and worst_case >= 0.5"}
    sequential = Sequential(parsed(texts), error_rate=0.05, planned=1000)
    sequential.look(lambda metric: numbers[metric.name], samples=100)
    samples = sequential.judgements()["both"].samples
    assert samples is not None
    assert samples > 1000
