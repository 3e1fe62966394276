from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from training import data

if TYPE_CHECKING:
    from pathlib import Path


def files(root: Path, sizes: dict[str, tuple[int, int]]) -> data.ImageFiles:
    """Write images of the given widths and heights, by path, with a bright band down the middle of each."""
    for path, (width, height) in sizes.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, width * 2 // 5 : width * 3 // 5] = 200
        Image.fromarray(pixels).save(root / path)
    return data.from_folder(root)


def test_jpeg_and_grey_images_are_taken_and_other_files_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 6), 99, np.uint8)).save(tmp_path / "a" / "grey.PNG")
    Image.fromarray(np.full((4, 6, 3), 99, np.uint8)).save(tmp_path / "a" / "colour.jpg")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._colour.jpg").write_text("what macOS leaves beside an image")
    (tmp_path / ".cache").mkdir()
    loaded = data.from_folder(tmp_path).read()
    assert loaded.images.shape == (2, 4, 6, 3)
    assert abs(loaded.images.astype(int) - 99).max() <= 2


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "a" / "2.png")
    with pytest.raises(
        ValueError, match=r"2\.png: expected 4 x 4 pixels like .*1\.png, got 5 x 4; resize it, or give data\.size"
    ):
        data.from_folder(tmp_path).read()


@pytest.mark.parametrize("kept", [0, 7, 30, 60])
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"1\.png: expected a PNG or JPEG image"):
        data.from_folder(tmp_path).read()


def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 6), 999, np.uint16)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: expected 8 bits per channel, got an image of mode I"):
        data.from_folder(tmp_path).read()


def test_a_file_of_another_format_is_refused_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png", format="GIF")
    with pytest.raises(ValueError, match=r"1\.png: expected a PNG or JPEG image"):
        data.from_folder(tmp_path).read()


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "a" / "1.jpg", exif=exif)
    assert data.from_folder(tmp_path).read().images.shape == (1, 6, 4, 3)


def test_a_file_that_may_not_be_read_is_no_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    monkeypatch.setattr(Image, "open", forbid)
    with pytest.raises(PermissionError, match=r"1\.png"):
        data.from_folder(tmp_path).read()


def test_a_fingerprint_is_of_images_labels_and_names() -> None:
    images, labels = np.zeros((2, 3, 3, 3), np.uint8), np.array([0, 1], np.int64)
    other = images.copy()
    other[1, 2, 2, 2] = 1
    sets = [
        data.LabelledImages(images, labels, ("a", "b")),
        data.LabelledImages(other, labels, ("a", "b")),
        data.LabelledImages(images, labels[::-1].copy(), ("a", "b")),
        data.LabelledImages(images, labels, ("a", "c")),
        data.LabelledImages(images[:1], labels[:1], ("a", "b")),
    ]
    assert len({part.fingerprint() for part in sets}) == len(sets)
    again = data.LabelledImages(images[::-1].copy()[::-1], labels, ("a", "b"))
    assert again.fingerprint() == sets[0].fingerprint()


def test_a_fingerprint_of_files_is_of_contents_paths_labels_and_names(tmp_path: Path) -> None:
    root = tmp_path / "a"
    images = files(root, {"x/1.png": (6, 4), "y/1.png": (6, 4)})
    shutil.copytree(root, tmp_path / "copy")
    assert data.from_folder(tmp_path / "copy").fingerprint() == images.fingerprint()
    swapped = data.ImageFiles(root, images.paths[::-1], images.labels, images.class_names)
    found = [images.fingerprint(), swapped.fingerprint()]
    Image.new("RGB", (6, 4), (1, 2, 3)).save(root / "y" / "1.png")
    found.append(data.from_folder(root).fingerprint())
    (root / "y" / "1.png").rename(root / "y" / "2.png")
    found.append(data.from_folder(root).fingerprint())
    (root / "y").rename(root / "z")
    found.append(data.from_folder(root).fingerprint())
    assert len(set(found)) == len(found)


def test_images_of_many_sizes_are_cut_to_their_centre(tmp_path: Path) -> None:
    images = files(tmp_path, {"a/1.png": (50, 20), "a/2.png": (20, 60), "b/1.png": (20, 20)})
    read = images.read(10)
    assert read.images.shape == (3, 10, 10, 3)
    assert read.labels.tolist() == [0, 0, 1]
    assert read.class_names == ("a", "b")
    for image, band in ((read.images[0], slice(3, 7)), (read.images[1], slice(4, 6))):  # of 10 and of 4 of 20 pixels
        assert (image[:, band] > 150).all()
        assert (image[:, [0, 1, 8, 9]] < 40).all()
    np.testing.assert_array_equal(read.images[2], images.pixels(2, size=10))


def test_only_the_files_of_a_subset_are_opened(tmp_path: Path) -> None:
    images = files(tmp_path, {"a/1.png": (6, 4), "b/1.png": (5, 4), "b/2.png": (6, 4)})
    (tmp_path / "b" / "1.png").write_text("no image")
    subset = images.subset(np.array([2, 0]))
    assert len(subset) == 2
    assert subset.read().labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"b/1\.png: expected a PNG"):
        images.read(8)


def test_a_file_that_went_away_is_no_damaged_image(tmp_path: Path) -> None:
    images = files(tmp_path, {"a/1.png": (6, 4)})
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a/1\.png"):
        images.read()


def test_images_in_memory_have_a_size_already() -> None:
    images = data.LabelledImages(np.zeros((2, 4, 6, 3), np.uint8), np.array([0, 1], np.int64), ("a", "b"))
    assert images.read() is images
    with pytest.raises(ValueError, match=r"data\.size: expected none, .* all of 6 x 4 pixels, got 8; leave it out"):
        images.read(8)


def test_a_folder_that_holds_no_classes_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected nowhere/CLASS/"):
        data.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected one folder per class"):
        data.from_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: expected images"):
        data.from_folder(tmp_path)


def grey(labels: list[int], *, classes: int) -> data.LabelledImages:
    names = tuple(f"class{label}" for label in range(classes))
    return data.LabelledImages(np.zeros((len(labels), 1, 1, 3), np.uint8), np.array(labels, np.int64), names)


@given(counts=st.lists(st.integers(3, 30), min_size=1, max_size=6), count=st.integers(1, 3), seed=st.integers(0, 9))
def test_so_many_images_of_each_class_are_drawn_by_the_seed(counts: list[int], count: int, seed: int) -> None:
    images = grey(np.repeat(np.arange(len(counts)), counts).tolist(), classes=len(counts))
    chosen = data.per_class(images, count=count, seed=seed)
    assert np.bincount(images.labels[chosen]).tolist() == [count] * len(counts)
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    np.testing.assert_array_equal(chosen, data.per_class(images, count=count, seed=seed))


def test_other_seeds_draw_other_images() -> None:
    images = grey([0] * 50 + [1] * 50, classes=2)
    first, other = (data.per_class(images, count=5, seed=seed).tolist() for seed in (1, 2))
    assert first != other


@pytest.mark.parametrize(("labels", "has"), [([0, 0, 0, 1], 1), ([0, 0, 0], 0)])
def test_a_class_with_fewer_images_than_asked_for_is_named(labels: list[int], has: int) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.per_class: expected at most the {has} images of class 'class1', got 3"
    ):
        data.per_class(grey(labels, classes=2), count=3, seed=0)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 9),
)
def test_a_stratified_split_takes_its_share_of_each_class(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    kept, held = data.stratified(labels, fraction=fraction, seed=seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = int((labels[held] == label).sum())
        assert taken == min(max(1, round(fraction * count)), count - 1)
