from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from training import data

if TYPE_CHECKING:
    from pathlib import Path


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> tuple[data.LabelledImages, data.LabelledImages]:
    return data.load("digits", split="train"), data.load("digits", split="test")


def test_digits_are_images_of_ten_classes(digits: tuple[data.LabelledImages, data.LabelledImages]) -> None:
    train, test = digits
    assert len(train) + len(test) == 1797
    assert 0.25 < len(test) / 1797 < 0.30
    assert train.class_names == tuple("0123456789")
    for part in digits:
        assert part.images.shape[1:] == (32, 32, 3)
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert (part.images[..., 0] == part.images[..., 2]).all()
        assert int(part.images.max()) > 200


def test_digits_are_split_by_class_and_without_overlap(
    digits: tuple[data.LabelledImages, data.LabelledImages],
) -> None:
    train, test = digits
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert (abs(shares - 0.28) < 0.01).all()
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_digits_are_the_same_each_time(digits: tuple[data.LabelledImages, data.LabelledImages]) -> None:
    again = data.load("digits", split="test")
    assert (again.images == digits[1].images).all()
    assert (again.labels == digits[1].labels).all()


def test_a_folder_is_loaded_by_class(colours: Path) -> None:
    loaded = data.load("folder", split="train", root=colours)
    assert loaded.class_names == ("blue", "green", "red")
    assert loaded.images.shape == (48, 12, 12, 3)
    for label, channel in enumerate((2, 1, 0)):
        assert loaded.images[loaded.labels == label].mean((0, 1, 2)).argmax() == channel


def test_jpeg_and_grey_images_are_taken_and_other_files_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 6), 99, np.uint8)).save(tmp_path / "a" / "grey.PNG")
    Image.fromarray(np.full((4, 6, 3), 99, np.uint8)).save(tmp_path / "a" / "colour.jpg")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "._colour.jpg").write_text("what macOS leaves beside an image")
    (tmp_path / ".cache").mkdir()
    loaded = data.from_folder(tmp_path)
    assert loaded.images.shape == (2, 4, 6, 3)
    assert abs(loaded.images.astype(int) - 99).max() <= 2


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png: expected 4 x 4 pixels like .*1\.png, got 5 x 4"):
        data.from_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 30, 60])
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"1\.png: expected a PNG or JPEG image"):
        data.from_folder(tmp_path)


def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 6), 999, np.uint16)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: expected 8 bits per channel, got an image of mode I"):
        data.from_folder(tmp_path)


def test_a_file_of_another_format_is_refused_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "1.png", format="GIF")
    with pytest.raises(ValueError, match=r"1\.png: expected a PNG or JPEG image"):
        data.from_folder(tmp_path)


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    Image.new("RGB", (6, 4)).save(tmp_path / "a" / "1.jpg", exif=exif)
    assert data.from_folder(tmp_path).images.shape == (1, 6, 4, 3)


def test_a_file_that_may_not_be_read_is_no_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    monkeypatch.setattr(Image, "open", forbid)
    with pytest.raises(PermissionError, match=r"1\.png"):
        data.from_folder(tmp_path)


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


def test_what_is_not_there_is_named_with_the_way_out(tmp_path: Path, colours: Path) -> None:
    with pytest.raises(ValueError, match="expected one of digits, folder, got 'cifar'"):
        data.load("cifar", split="train")
    with pytest.raises(ValueError, match="expected one of train, test, got 'val'"):
        data.load("digits", split="val")
    with pytest.raises(ValueError, match=r"give data\.root"):
        data.load("folder", split="train")
    with pytest.raises(ValueError, match="leave it out"):
        data.load("digits", split="train", root=colours)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        data.load("folder", split="train", root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        data.load("folder", split="train", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="expected one folder per class"):
        data.from_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: expected images"):
        data.from_folder(tmp_path)


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


@given(count=st.integers(1, 40), batch_size=st.integers(2, 16), seed=st.integers(0, 9))
def test_an_epoch_shows_each_image_at_most_once(count: int, batch_size: int, seed: int) -> None:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    batches = list(data.batches(images, torch.arange(count), batch_size=batch_size, generator=seeded(seed)))
    assert len(batches) == data.steps(count, batch_size=batch_size)
    labels = torch.cat([y for _, y in batches])
    assert len(set(labels.tolist())) == len(labels) >= min(count, batch_size)
    for x, y in batches:
        assert x.dtype == torch.float32
        assert x.shape == (len(y), 3, 2, 2)
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_batches_are_shuffled_by_the_generator_and_augmented_on_request() -> None:
    images = torch.randint(256, (32, 6, 6, 3), generator=seeded(), dtype=torch.uint8)

    def epoch(seed: int, *, crop_padding: int = 0, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        parts = data.batches(
            images,
            torch.arange(32),
            batch_size=8,
            generator=seeded(seed),
            crop_padding=crop_padding,
            flip=flip,
        )
        pixels, labels = zip(*parts, strict=True)
        return torch.cat(pixels), torch.cat(labels)

    pixels, labels = epoch(1)
    assert torch.equal(labels, epoch(1)[1])
    assert not torch.equal(labels, epoch(2)[1])
    assert torch.equal(pixels, data.unit_range(images[labels]))
    for augmented, order in (epoch(1, crop_padding=2), epoch(1, flip=True)):
        assert not torch.equal(augmented, data.unit_range(images[order]))
