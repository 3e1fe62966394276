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


def test_a_data_set_that_a_run_can_be_trained_on_can_be_audited(tmp_path: Path) -> None:
    for name, grey in (("cat", 100), ("dog", 200)):
        (tmp_path / "test" / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (20 + index, 30), (grey + index,) * 3).save(tmp_path / "test" / name / f"{index}.png")
    source = Data(dataset="folder", root=tmp_path, size=16, samples=8)
    found = samples.load(source, class_names=("dog", "cat"))
    assert found.images.shape == (8, 16, 16, 3)
    for image, label, index in zip(found.images, found.labels, found.indices, strict=True):
        assert int(image[0, 0, 0]) == (200, 100)[label] + index % 6
    for index in {*range(12)} - {*found.indices.tolist()}:
        (tmp_path / "test" / ("cat", "dog")[index // 6] / f"{index % 6}.png").write_text("no image")
    np.testing.assert_array_equal(samples.load(source, class_names=("dog", "cat")).images, found.images)
    with pytest.raises(ValueError, match=r"resize it, or give data\.size"):
        samples.load(Data(dataset="folder", root=tmp_path, samples=8), class_names=("dog", "cat"))
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py: no such folder"):
        samples.load(Data(dataset="cifar10", root=tmp_path), class_names=("dog", "cat"))


def test_a_model_input_is_float_in_0_to_1_channels_first() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    converted = samples.as_input(images)
    assert converted.shape == (2, 3, 4, 5)
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(converted, images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
