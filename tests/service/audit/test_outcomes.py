from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from service.audit import outcomes
from service.audit.shard import Shard, ShardResult


def _clean(start: int, stop: int, predictions: tuple[int, ...]) -> ShardResult:
    shard = Shard(kind="clean", start=start, stop=stop)
    return ShardResult(
        shard=shard, queries=2, seconds=0.0, predictions=predictions, confidences=(0.5,) * len(predictions)
    )


ATTACKED = ShardResult(
    shard=Shard(kind="attack", subject="fmn", start=2, stop=4),
    queries=9,
    seconds=0.0,
    distances=(0.25, None),
    asked=(4, 5),
    first_success=(3, 0),
    adversarial_predictions=(0, 1),
    adversarial_confidences=(0.75, 0.5),
)

LABELS = np.array([0, 1, 1, 1])


def test_slices_are_joined_in_the_samples_order() -> None:
    found = outcomes.gather([_clean(2, 4, (1, 0)), _clean(0, 2, (0, 1)), ATTACKED], labels=LABELS)
    assert found.clean.predictions.tolist() == [0, 1, 1, 0]
    assert found.correct(found.clean).tolist() == [True, True, True, False]
    assert found.attacked["fmn"].rows.tolist() == [2, 3]
    assert found.attacked["fmn"].robust(0.2).tolist() == [True, True]
    assert found.attacked["fmn"].robust(0.25).tolist() == [False, True]


def test_the_file_has_a_line_for_each_sample_and_leaves_out_what_was_not_measured() -> None:
    found = outcomes.gather([_clean(0, 4, (0, 1, 1, 0)), ATTACKED], labels=LABELS)
    text = outcomes.to_csv(found, indices=np.array([7, 3, 9, 1]), class_names=("cat, tabby", "dog"))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["index"] for row in rows] == ["7", "3", "9", "1"]
    assert [row["label"] for row in rows] == ["cat, tabby", "dog", "dog", "dog"]
    assert [row["fmn: distance"] for row in rows] == ["", "", "0.25", ""]
    assert [row["fmn: queries"] for row in rows] == ["", "", "4", "5"]
    assert [row["fmn: queries to success"] for row in rows] == ["", "", "3", ""]
    assert [row["fmn: class"] for row in rows] == ["", "", "cat, tabby", "dog"]
    assert text == outcomes.to_csv(found, indices=np.array([7, 3, 9, 1]), class_names=("cat, tabby", "dog"))


def test_what_was_found_rounded_counts_without_rounding_too() -> None:
    found = outcomes.gather(
        [
            _clean(0, 4, (0, 1, 1, 0)),
            ATTACKED.model_copy(update={"distances": (0.25, 0.5), "unrounded": (None, 0.125)}),
        ],
        labels=LABELS,
    )
    unrounded = found.attacked["fmn"].unrounded
    assert unrounded is not None
    assert unrounded.tolist() == [0.25, 0.125]


def test_an_audit_that_measured_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        outcomes.gather([ATTACKED], labels=LABELS)
