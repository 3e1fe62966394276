from __future__ import annotations

import numpy as np
import pytest

from export import parity
from export.engines.base import Logits
from export.images import ImageSet
from export.intervals import wilson
from export.manifest import Parity

LIMITS = parity.Limits(disagreement=0.25, logit_difference=0.1)
NAMES = ("ant", "bee", "cat", "dog")
EXPECTED = np.eye(4, dtype=np.float32)


def _images(labels: list[int] | None = None, n: int = 4) -> ImageSet:
    pixels = np.linspace(0, 1, n * 12, dtype=np.float32).reshape(n, 3, 2, 2)
    numbers = None if labels is None else np.array(labels)
    return ImageSet(pixels, "unit vectors", tuple(f"{name}.png" for name in NAMES[:n]), numbers)


def _compare(answers: Logits, labels: list[int] | None = None, limits: parity.Limits = LIMITS) -> Parity:
    return parity.compare(
        answers, EXPECTED, reference="source", images=_images(labels), limits=limits, class_names=NAMES, machine="here"
    )


def test_equal_logits_pass_with_their_numbers() -> None:
    result = _compare(EXPECTED + np.float32(0.05))
    assert (result.status, result.agreement, result.machine) == ("passed", 1.0, "here")
    assert result.agreement_interval == pytest.approx((0.5101, 1.0), abs=1e-4)
    assert result.max_abs_difference == pytest.approx(0.05)
    assert result.mean_abs_difference == pytest.approx(0.05)
    assert result.images is not None
    assert (result.images.n, result.images.description) == (4, "unit vectors")
    assert result.limits == {"disagreement": 0.25, "logit_difference": 0.1}


def test_other_classes_fail_and_say_how_many() -> None:
    result = _compare(np.roll(EXPECTED, 1, axis=1) * np.float32(0.01))
    assert result.status == "failed"
    assert "top-1 differs on 100.00% of the images, allowed are 25.00%" in result.explanation
    assert "logits differ by up to 1, allowed are 0.1" in result.explanation


def test_the_allowed_difference_grows_with_the_logits() -> None:
    large = EXPECTED * np.float32(1000)
    for shift, status in ((50, "passed"), (150, "failed")):
        result = parity.compare(
            large + np.float32(shift), large, reference="source", images=_images(), limits=LIMITS, class_names=NAMES
        )
        assert result.status == status, shift


def test_accuracies_are_given_where_labels_are_known() -> None:
    assert _compare(EXPECTED).accuracy is None
    answers = EXPECTED.copy()
    answers[0] = [0, 9, 0, 0]
    result = _compare(answers, labels=[1, 1, 2, 0])
    assert (result.accuracy, result.reference_accuracy) == (0.75, 0.5)


def test_the_worst_images_are_named_other_classes_first() -> None:
    answers = EXPECTED.copy()
    answers[1, 1] = 90  # far off, same class
    answers[3] = [1.5, 0, 0, 1]  # not far off, another class
    worst = _compare(answers, labels=[0, 1, 2, 3]).worst
    assert [item.image for item in worst] == ["dog.png", "bee.png", "ant.png", "cat.png"]
    assert (worst[0].answer, worst[0].expected, worst[0].label) == ("ant", "dog", "dog")
    assert worst[1].logit_difference == 89


def test_there_are_at_most_ten_worst_images() -> None:
    expected = np.random.default_rng(0).random((40, 4), dtype=np.float32)
    images = ImageSet(np.zeros((40, 3, 2, 2), np.float32), "black", tuple(map(str, range(40))))
    result = parity.compare(
        expected[::-1], expected, reference="source", images=images, limits=LIMITS, class_names=NAMES
    )
    assert len(result.worst) == 10
    assert result.agreement_interval == wilson(round((result.agreement or 0) * 40), 40)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail(poison: float) -> None:
    answers = EXPECTED.copy()
    answers[2, 0] = poison
    result = _compare(answers)
    assert (result.status, result.explanation) == ("failed", "some logits are not finite")
    assert result.worst[0].image == "cat.png"


def test_another_share_can_be_allowed() -> None:
    answers = EXPECTED.copy()
    answers[0] = answers[1]
    strict, lax = parity.Limits(disagreement=0.01, logit_difference=None), parity.LIMITS["int8"].allowing(0.25)
    assert _compare(answers, limits=strict).status == "failed"
    assert _compare(answers, limits=lax).status == "passed"
    assert parity.LIMITS["int8"].allowing(None) == parity.LIMITS["int8"]
    with pytest.raises(ValueError, match=r"expected a share of the images from 0 to 1, got 2\.0"):
        lax.allowing(2.0)


def test_probabilities_of_many_classes_are_held_to_their_own_size() -> None:
    expected = np.full((4, 4), 1e-3, dtype=np.float32)
    limits = parity.Limits(disagreement=1.0, logit_difference=1e-2)
    for output, status in (("logits", "passed"), ("probabilities", "failed")):
        result = parity.compare(
            expected / 2, expected, reference="s", images=_images(), limits=limits, class_names=NAMES, output=output
        )
        assert result.status == status, output


def test_too_few_images_to_see_the_limit_are_named() -> None:
    few = _compare(EXPECTED, limits=parity.Limits(disagreement=0.01, logit_difference=None))
    assert few.status == "passed"
    assert few.explanation == "one of 4 images is already more than the 1.00% allowed: too few to see less"
    assert not _compare(EXPECTED).explanation


def test_no_images_are_no_proof() -> None:
    with pytest.raises(ValueError, match="expected two equal, non-empty shapes for 4 images"):
        _compare(EXPECTED[:0])
