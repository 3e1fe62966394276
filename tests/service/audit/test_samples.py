from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.audit import samples
from service.audit.plan import Data

DIGITS = tuple("0123456789")


def test_a_sample_is_stratified_shuffled_and_repeatable() -> None:
    first = samples.load(Data(dataset="digits", samples=100, seed=3), class_names=DIGITS)
    again = samples.load(Data(dataset="digits", samples=100, seed=3), class_names=DIGITS)
    other = samples.load(Data(dataset="digits", samples=100, seed=4), class_names=DIGITS)
    np.testing.assert_array_equal(first.indices, again.indices)
    assert set(first.indices) != set(other.indices)
    assert np.bincount(first.labels).min() >= 9
    assert (np.diff(first.labels) != 0).mean() > 0.5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 3))
def test_every_class_gets_its_share(labels: list[int], count: int, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    chosen = samples.stratified(array, samples=count, seed=seed)
    assert len(set(chosen)) == len(chosen) == min(count, len(labels))
    for label in set(labels):
        share = count * labels.count(label) / len(labels)
        assert abs((array[chosen] == label).sum() - min(share, labels.count(label))) <= len(set(labels))


def test_a_folder_is_labelled_as_the_model_labels(tmp_path: Path) -> None:
    for name, grey in (("dog", 200), ("cat", 100)):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / name / f"{index}.png")
    found = samples.load(Data(folder=tmp_path, samples=6), class_names=("bird", "dog", "cat"))
    for image, label in zip(found.images, found.labels, strict=True):
        assert ("bird", "dog", "cat")[label] == {200: "dog", 100: "cat"}[int(image[0, 0, 0])]
    with pytest.raises(ValueError, match="the data has the class 'dog', which the model does not"):
        samples.load(Data(folder=tmp_path, samples=6), class_names=("bird", "cat"))


def test_a_model_input_is_float_in_0_to_1_channels_first() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    converted = samples.as_input(images)
    assert converted.shape == (2, 3, 4, 5)
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(converted, images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
