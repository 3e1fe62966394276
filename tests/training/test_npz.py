from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from training import datasets, npz
from training.recipe import Data

if TYPE_CHECKING:
    from pathlib import Path

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def arrays(**changes: np.ndarray[Any, np.dtype[Any]] | None) -> Arrays:
    """Return a data set of three classes, with some of its arrays changed or, where None, left out."""
    generator = np.random.default_rng(0)
    whole: dict[str, np.ndarray[Any, np.dtype[Any]] | None] = {
        "train_images": generator.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": generator.integers(0, 256, (5, 4, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(5) % 3,
    }
    return {name: array for name, array in (whole | changes).items() if array is not None}


def write(folder: Path, contents: Arrays) -> Path:
    np.savez_compressed(folder / "data.npz", **contents)  # type: ignore[arg-type]  # its last keyword is no array
    return folder / "data.npz"


def test_a_file_is_read_by_split(tmp_path: Path) -> None:
    contents = arrays(class_names=np.array(["cat", "dog", "owl", "yak"]))
    path = write(tmp_path, contents)
    for split in datasets.SPLITS:
        read = datasets.load("npz", split=split, root=path)
        np.testing.assert_array_equal(read.images, contents[f"{split}_images"])
        np.testing.assert_array_equal(read.labels, contents[f"{split}_labels"])
        assert read.labels.dtype == np.int64
        assert read.class_names == ("cat", "dog", "owl", "yak")


def test_classes_without_names_are_those_of_both_splits(tmp_path: Path) -> None:
    path = write(tmp_path, arrays(train_labels=np.zeros(12, np.uint8)))
    assert npz.read("train", path).class_names == npz.read("test", path).class_names == ("0", "1", "2")


def test_medmnist_s_layout_is_taken_and_grey_images_get_three_channels(tmp_path: Path) -> None:
    """Its labels are columns of uint8, its grey images have no channels, and it has a validation split."""
    generator = np.random.default_rng(1)
    contents = {}
    for split, count in (("train", 20), ("val", 6), ("test", 8)):
        contents[f"{split}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    path = write(tmp_path, contents)
    parts = datasets.parts(Data(name="npz", root=str(path), validation=0.2), seed=0)
    assert {name: len(images) for name, images in parts.items()} == {"training": 16, "validation": 4, "test": 8}
    images = parts["test"].read().images
    assert images.shape == (8, 28, 28, 3)
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], contents["test_images"])
    assert parts["test"].labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_labels": None, "extra": np.zeros(1)},
            r"expected the arrays train_images, .*, got train_images, train_labels, test_images, extra; add test_lab",
        ),
        (
            {"train_images": np.zeros((12, 4, 5, 3), np.float32)},
            r"train_images: expected uint8 of shape .* got float32 of shape \(12, 4, 5, 3\)",
        ),
        ({"train_images": np.zeros((12, 3, 4, 5), np.uint8)}, r"expected uint8 .*, got uint8 of shape \(12, 3, 4, 5\)"),
        ({"train_images": np.zeros((0, 4, 5, 3), np.uint8)}, r"got uint8 of shape \(0, 4, 5, 3\)"),
        ({"train_labels": np.zeros((12, 14), np.uint8)}, r"train_labels: expected integers .* shape \(12, 14\)"),
        ({"train_labels": np.zeros(12)}, r"train_labels: expected integers from 0, .* got float64 of shape \(12,\)"),
        ({"test_labels": np.arange(5) - 1}, r"test_labels: expected integers from 0, .* from -1"),
        ({"train_labels": np.arange(11)}, "a label for each of the 12 images of train_images, got 11 in train_labels"),
        ({"class_names": np.array(["cat", "dog"])}, r"class_names: expected 3 or more different texts"),
        ({"class_names": np.array(["cat", "dog", "dog"])}, r"class_names: expected 3 or more different texts"),
        (
            {"class_names": np.arange(3)},
            r"class_names: expected 3 or more different texts, .* got int64 of shape \(3,\)",
        ),
        ({"class_names": np.array(["cat", "dog", 3], dtype=object)}, r"of numbers and texts, got another or a damaged"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(tmp_path: Path, changes: Arrays, message: str) -> None:
    path = write(tmp_path, arrays(**changes))
    with pytest.raises(ValueError, match=message) as got:
        datasets.load("npz", split="train", root=path)
    assert str(got.value).startswith(str(path))
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("kept", [0, 300])
@pytest.mark.parametrize("begin", [b"", b"cos\nsystem\n."])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, kept: int, begin: bytes) -> None:
    path = write(tmp_path, arrays())
    path.write_bytes(begin + path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"data\.npz: expected an npz file of numbers and texts, got another") as got:
        datasets.load("npz", split="train", root=path)
    assert "\n" not in str(got.value)


def test_a_damaged_array_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, arrays())
    contents = bytearray(path.read_bytes())
    contents[200] ^= 255
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"data\.npz: expected an npz file .* got another or a damaged one"):
        datasets.load("npz", split="train", root=path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file; expected an npz file of train_images"):
        datasets.load("npz", split="train", root=tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"root: expected the npz file, got none; give data\.root"):
        datasets.load("npz", split="train")
