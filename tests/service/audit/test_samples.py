from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from export import pictures
from export.manifest import Preprocessing
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


def test_files_come_to_the_input_as_where_the_model_is_served(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = ((40, 30), (16, 12), (33, 50))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index, (width, height) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    files = sorted(tmp_path.glob("*/*.png"))
    for image_shape in ((3, 12, 16), (1, 12, 16)):
        for preprocessing in (Preprocessing(), Preprocessing(resize=20, interpolation="bicubic")):
            found = samples.load(
                Data(folder=tmp_path, samples=6),
                class_names=("cat", "dog"),
                image_shape=image_shape,
                preprocessing=preprocessing,
            )
            for image, index in zip(found.images, found.indices, strict=True):
                encoded = files[index].read_bytes()
                expected = pictures.pixels(encoded, image_shape=image_shape, preprocessing=preprocessing)
                np.testing.assert_array_equal(image, expected)
    # An image of the input's size stays as it is.
    whole = samples.load(Data(folder=tmp_path, samples=6), class_names=("cat", "dog"), image_shape=(3, 12, 16))
    np.testing.assert_array_equal(whole.images[whole.indices == 1][0], np.asarray(Image.open(files[1])))


def test_a_size_of_the_plan_comes_before_that_of_the_model(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "0.png")
    source = Data(folder=tmp_path, samples=2, size=8)
    assert samples.load(source, class_names=("cat", "dog"), image_shape=(3, 8, 8)).images.shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match=r"the images are 8 x 8 of 3 channels, and the model takes 32 x 16 of 3"):
        samples.load(source, class_names=("cat", "dog"), image_shape=(3, 16, 32))


def test_a_grey_model_sees_colours_as_servers_make_them_grey(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), dtype=np.uint8)
    labels = np.arange(2)
    file = tmp_path / "data.npz"
    np.savez(file, train_images=colours, test_images=colours, train_labels=labels, test_labels=labels)
    source = Data(dataset="npz", root=tmp_path / "data.npz", samples=2)
    found = samples.load(source, class_names=("0", "1"), image_shape=(1, 9, 8))
    for image, label in zip(found.images, found.labels, strict=True):
        np.testing.assert_array_equal(image[..., 0], np.asarray(Image.fromarray(colours[label]).convert("L")))


def test_images_of_another_shape_than_the_model_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the images are 32 x 32 of 3 channels, and the model takes 28 x 28 of 3"):
        samples.load(Data(dataset="digits", samples=20), class_names=DIGITS, image_shape=(3, 28, 28))


def test_more_samples_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.samples: expected at most the \d+ that there are, got 5000; lower it"):
        samples.load(Data(dataset="digits", samples=5000), class_names=DIGITS)


def test_labels_outside_the_classes_are_one_error_of_one_line(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "data.npz",
        train_images=images,
        test_images=images,
        train_labels=np.array([0, 1]),
        test_labels=np.array([0, 2]),
        class_names=np.array(["a", "b"]),
    )
    with pytest.raises(ValueError, match=r"expected .*") as raised:
        samples.load(Data(dataset="npz", root=tmp_path / "data.npz", samples=2), class_names=("a", "b"))
    assert "2" in str(raised.value)
    many = tuple(f"class {number}" for number in range(1000))
    with pytest.raises(ValueError, match=r"the data has the class '0'.* and 980 more; name") as raised:
        samples.load(Data(dataset="digits", samples=20), class_names=many)
    assert "\n" not in str(raised.value)


def test_a_model_input_is_float_in_0_to_1_channels_first() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    converted = samples.as_input(images)
    assert converted.shape == (2, 3, 4, 5)
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(converted, images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
