from __future__ import annotations

import numpy as np
import pytest

from export import parity
from export.engines.base import Logits
from export.manifest import Parity

LIMITS = parity.Limits(disagreement=0.25, logit_difference=0.1)
EXPECTED = np.eye(4, dtype=np.float32)


def _compare(answers: Logits) -> Parity:
    return parity.compare(answers, EXPECTED, reference="source", images="unit vectors", limits=LIMITS)


def test_equal_logits_pass_with_their_numbers() -> None:
    result = _compare(EXPECTED + np.float32(0.05))
    assert (result.status, result.n, result.agreement) == ("passed", 4, 1.0)
    assert result.max_abs_difference == pytest.approx(0.05)


def test_other_classes_fail_and_say_how_many() -> None:
    result = _compare(np.roll(EXPECTED, 1, axis=1) * np.float32(0.01))
    assert result.status == "failed"
    assert "top-1 differs on 100.00% of the images, allowed are 25.00%" in result.explanation
    assert "logits differ by up to 1, allowed are 0.1" in result.explanation


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(poison: float) -> None:
    answers = EXPECTED.copy()
    answers[0, 0] = poison
    assert "not finite" in _compare(answers).explanation


def test_no_images_are_no_proof() -> None:
    with pytest.raises(ValueError, match="expected two equal, non-empty shapes"):
        parity.compare(EXPECTED[:0], EXPECTED[:0], reference="source", images="none", limits=LIMITS)
