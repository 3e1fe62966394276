from __future__ import annotations

import numpy as np
import pytest

from service.audit import calibration


def sampled(n: int, *, overconfidence: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(0.3, 1.0, size=n)
    return confidences, rng.random(n) < confidences - overconfidence


def test_the_error_by_hand() -> None:
    # Bins (0.2, 0.4], (0.8, 1] of five: gaps |0.3 - 0.5| and |0.95 - 1|, half the images each.
    confidences, correct = np.array([0.3, 0.3, 0.9, 1.0]), np.array([True, False, True, True])
    found = calibration.expected_calibration_error(confidences, correct, seed=0, bins=5)
    assert found.value == pytest.approx(0.5 * 0.2 + 0.5 * 0.05)
    assert found.n == 4


def test_the_diagram_has_a_bar_for_each_bin_with_its_upper_edge() -> None:
    bars = calibration.reliability(np.array([0.2, 0.21, 0.4, 1.0, 0.0]), np.array([1, 0, 1, 1, 0], dtype=bool), bins=5)
    assert [bar.n for bar in bars] == [2, 2, 0, 0, 1]
    assert bars[0].accuracy == 0.5
    assert bars[1].confidence == pytest.approx(0.305)
    assert (bars[2].accuracy, bars[2].confidence) == (None, None)
    assert (bars[4].low, bars[4].high) == pytest.approx((0.8, 1.0))


def test_the_error_is_the_diagrams_gaps_weighted() -> None:
    confidences, correct = sampled(500, overconfidence=0.1, seed=3)
    bars = calibration.reliability(confidences, correct)
    assert len(bars) == 15
    gaps = sum(
        bar.n * abs(bar.accuracy - bar.confidence) for bar in bars if bar.accuracy is not None and bar.confidence
    )
    assert calibration.expected_calibration_error(confidences, correct, seed=0).value == pytest.approx(gaps / 500)


@pytest.mark.parametrize("overconfidence", [0.02, 0.1])
def test_the_interval_covers_the_truth_although_chance_makes_the_error_larger(
    overconfidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_RESAMPLES", 200)
    hits = 0
    for trial in range(60):
        confidences, correct = sampled(400, overconfidence=overconfidence, seed=trial)
        found = calibration.expected_calibration_error(confidences, correct, seed=trial)
        assert found.low <= found.value <= found.high
        hits += found.low <= overconfidence <= found.high
    assert hits >= 54


def test_an_overconfident_classifier_is_told_from_a_calibrated_one() -> None:
    calibrated = calibration.expected_calibration_error(*sampled(2000, overconfidence=0, seed=0), seed=0)
    overconfident = calibration.expected_calibration_error(*sampled(2000, overconfidence=0.15, seed=0), seed=0)
    assert calibrated.low < 0.005
    assert calibrated.high < overconfident.low
    assert overconfident.low <= 0.15 <= overconfident.high


def test_the_shift_is_paired() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0.3, 1.0, size=300)
    after = before - 0.05 + rng.normal(scale=0.01, size=300)
    found = calibration.confidence_shift(before, after, seed=0)
    assert found.low < -0.05 < found.high
    assert found.high - found.low < 0.004


@pytest.mark.parametrize(
    ("confidences", "correct", "message"),
    [
        (np.array([0.5]), np.array([True, False]), "expected a confidence and a truth value for each image"),
        (np.array([]), np.array([], dtype=bool), "expected a confidence and a truth value for each image"),
        (np.array([1.5]), np.array([True]), "expected confidences from 0 to 1"),
        (np.array([np.nan]), np.array([True]), "expected confidences from 0 to 1"),
    ],
)
def test_impossible_confidences_are_refused(confidences: np.ndarray, correct: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration.expected_calibration_error(confidences, correct, seed=0)
    with pytest.raises(ValueError, match=message):
        calibration.reliability(confidences, correct)


def test_a_shift_needs_pairs() -> None:
    with pytest.raises(ValueError, match="expected as many confidences before as after"):
        calibration.confidence_shift(np.ones(3), np.ones(4), seed=0)
