"""The highest classes: in their order, whatever the scores are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from service.inference.classification import top_classes
from service.inference.datatypes import Array


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (np.array([[1, -128, 127]], np.int8), [[b"127:2:c", b"1:0:a", b"-128:1"]]),
        (np.array([[0, 255, 255]], np.uint8), [[b"255:1", b"255:2:c", b"0:0:a"]]),
        (np.array([[2**63 - 1, -(2**63)]]), [[b"9223372036854775807:0:a", b"-9223372036854775808:1"]]),
        (np.array([[False, True]]), [[b"1:1", b"0:0:a"]]),
        (np.array([[0.5, 1.5]], np.float16), [[b"1.500000:1", b"0.500000:0:a"]]),
        (np.array([[1e-9, 1 / 3]]), [[b"0.333333:1", b"0.000000:0:a"]]),
        (np.array([[np.nan, 1, np.inf, -np.inf]], np.float32), [[b"inf:2:c", b"1.000000:1", b"-inf:3", b"nan:0:a"]]),
        # Whatever axes an item has, they are one row of classes.
        (
            np.array([[[1.0], [2.0]], [[4.0], [3.0]]]),
            [[b"2.000000:1", b"1.000000:0:a"], [b"4.000000:0:a", b"3.000000:1"]],
        ),
        (np.array([3, 4]), [[b"3:0:a"], [b"4:0:a"]]),
    ],
)
def test_classes_of_any_scores(scores: Array, expected: list[list[bytes]]) -> None:
    assert top_classes(scores, 9, class_names=("a", "", "c")).tolist() == expected


@given(
    scores=st_numpy.arrays(np.float32, st_numpy.array_shapes(min_dims=2, max_dims=2), elements=st.integers(-5, 5)),
    k=st.integers(1, 12),
)
def test_no_class_left_out_has_a_higher_score(scores: Array, k: int) -> None:
    classes = top_classes(scores, k, class_names=())
    assert classes.shape == (len(scores), min(k, scores.shape[1]))
    for row, given_ in zip(scores, classes.tolist(), strict=True):
        indices = [int(one.split(b":")[1]) for one in given_]
        # Python's sort keeps equal scores in the order of the classes.
        assert indices == sorted(range(len(row)), key=lambda index: -row[index])[:k]
