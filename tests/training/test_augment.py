from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import augment
from training.recipe import Augmentation, AugMix
from training.stream import Stream

Augment = Callable[[Tensor, Stream], Tensor]


def images(count: int = 8, size: int = 6) -> Tensor:
    return torch.randint(1, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def unit_range(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255


def seeded(seed: int = 0, *, process: int = 0, processes: int = 1) -> Stream:
    return Stream(torch.Generator().manual_seed(seed), process=process, processes=processes)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which pixels (batch, height, width) differ in any channel."""
    return (before != after).any(1)


def boxes(mask: Tensor) -> list[tuple[int, int, int, int]]:
    """The bounding box of each image's mask: top, left, rows, columns."""
    found = []
    for image in mask:
        rows, columns = image.nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        found.append((top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left))
    return found


@given(padding=st.integers(1, 4), seed=st.integers(0, 100))
def test_a_crop_is_a_window_of_the_padded_image(padding: int, seed: int) -> None:
    original = images(count=3, size=5)
    cropped = augment.crop(original, padding=padding, stream=seeded(seed))
    padded = torch.zeros(3, 5 + 2 * padding, 5 + 2 * padding, 3, dtype=torch.uint8)
    padded[:, padding:-padding, padding:-padding] = original
    for image, source in zip(cropped, padded, strict=True):
        windows = source.unfold(0, 5, 1).unfold(1, 5, 1).permute(0, 1, 3, 4, 2)
        assert any(torch.equal(window, image) for row in windows for window in row)


def test_images_of_a_batch_are_shifted_each_on_its_own() -> None:
    same = images(count=1).expand(32, -1, -1, -1)
    assert len(torch.unique(augment.crop(same, padding=2, stream=seeded()), dim=0)) > 5


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    original = images(count=400)
    flipped = augment.flip(original, stream=seeded())
    mirrored = (flipped == original.flip(2)).flatten(1).all(1)
    kept = (flipped == original).flatten(1).all(1)
    assert bool((mirrored | kept).all())
    assert 150 < int(mirrored.sum()) < 250


@given(side=st.integers(1, 12), seed=st.integers(0, 100))
def test_cutout_fills_a_clipped_square_with_grey(side: int, seed: int) -> None:
    original = unit_range(images(count=6, size=8))
    blotted = augment.cutout(original, side=side, stream=seeded(seed))
    mask = changed(original, blotted)
    assert bool((blotted.permute(0, 2, 3, 1)[mask] == 0.5).all())
    for image, (top, left, rows, columns) in zip(mask, boxes(mask), strict=True):
        assert int(image.sum()) == rows * columns
        assert rows == side or (rows < side and (top == 0 or top + rows == 8))
        assert columns == side or (columns < side and (left == 0 or left + columns == 8))
        assert min(rows, columns) >= side // 2 or side > 8


def test_the_centre_of_cutout_is_any_pixel() -> None:
    original = torch.zeros(2000, 3, 5, 5)
    places = boxes(changed(original, augment.cutout(original, side=1, stream=seeded())))
    assert {(top, left) for top, left, _, _ in places} == {(top, left) for top in range(5) for left in range(5)}


def test_random_erasing_replaces_rectangles_of_the_published_sizes() -> None:
    original = torch.full((600, 3, 32, 32), 0.3)  # no value of 8 bits: each one that is erased changes
    erased = augment.random_erasing(original, probability=1.0, stream=seeded())
    mask = changed(original, erased)
    places = torch.tensor(boxes(mask)).float()
    rows, columns = places[:, 2], places[:, 3]
    assert torch.equal(mask.sum((1, 2)).float(), rows * columns)
    areas, ratios = rows * columns / 32**2, rows / columns
    assert 0.015 < areas.min() < 0.04
    assert 0.35 < areas.max() < 0.42
    assert abs(float(areas.mean()) - 0.21) < 0.02
    assert ratios.min() < 0.5
    assert ratios.max() > 2.5
    assert places[:, 0].min() == places[:, 1].min() == 0
    assert (places[:, 0] + rows).max() == (places[:, 1] + columns).max() == 32


def test_random_erasing_fills_with_noise_of_8_bits() -> None:
    original = torch.full((200, 3, 16, 16), 0.3)
    erased = augment.random_erasing(original, probability=1.0, stream=seeded())
    noise = erased[erased != original] * 255
    assert torch.allclose(noise, noise.round(), rtol=0, atol=1e-4)
    counts = torch.bincount(noise.round().long(), minlength=256).float()
    assert len(counts) == 256
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()
    colours = erased.permute(0, 2, 3, 1)[changed(original, erased)]
    assert abs(float(torch.corrcoef(colours.T)[0, 1])) < 0.05


def test_random_erasing_strikes_with_its_probability() -> None:
    original = torch.full((1000, 3, 8, 8), 0.3)
    erased = augment.random_erasing(original, probability=0.25, stream=seeded())
    assert 190 < int(changed(original, erased).any(2).any(1).sum()) < 310


@pytest.mark.parametrize(
    "switched_off",
    [
        lambda stream: augment.crop(images(), padding=0, stream=stream),
        lambda stream: augment.cutout(unit_range(images()), side=0, stream=stream),
        lambda stream: augment.random_erasing(unit_range(images()), probability=0.0, stream=stream),
        lambda stream: augment.views(images(), Augmentation(), stream=stream)[0],
    ],
    ids=["crop", "cutout", "random_erasing", "views"],
)
def test_what_is_switched_off_neither_changes_images_nor_draws(switched_off: Callable[[Stream], Tensor]) -> None:
    stream = seeded()
    result = switched_off(stream)
    expected = images() if result.dtype == torch.uint8 else unit_range(images())
    assert torch.equal(result, expected)
    assert torch.equal(stream.generator.get_state(), seeded().generator.get_state())


EVERYTHING = Augmentation(crop_padding=2, flip=True, cutout=3, random_erasing=0.5, augmix=AugMix(all_operations=True))


@pytest.mark.parametrize(
    ("augmix", "count"), [(None, 1), (AugMix(jsd=0), 1), (AugMix(), 3)], ids=["none", "mixed", "three"]
)
def test_views_are_one_or_three_of_unit_range(augmix: AugMix | None, count: int) -> None:
    settings = EVERYTHING.model_copy(update={"augmix": augmix})
    views = augment.views(images(size=12), settings, stream=seeded())
    assert len(views) == count
    for view in views:
        assert view.shape == (8, 3, 12, 12)
        assert view.dtype == torch.float32
        assert view.min() >= 0
        assert view.max() <= 1


def test_views_share_crop_and_flip_and_the_first_is_clean() -> None:
    settings = Augmentation(crop_padding=2, flip=True, augmix=AugMix())
    clean, first, second = augment.views(images(size=12), settings, stream=seeded())
    stream = seeded()
    expected = augment.flip(augment.crop(images(size=12), padding=2, stream=stream), stream=stream)
    assert torch.equal(clean, unit_range(expected))
    assert not torch.equal(first, clean)
    assert not torch.equal(first, second)


def test_cutout_falls_on_every_view_in_its_own_place() -> None:
    settings = Augmentation(cutout=4, augmix=AugMix())
    views = augment.views(torch.full((16, 9, 9, 3), 200, dtype=torch.uint8), settings, stream=seeded())
    holes = [(view == 0.5).all(1) for view in views]
    assert all(bool(hole.any(2).any(1).all()) for hole in holes)
    assert not torch.equal(holes[0], holes[1])


AUGMENTATIONS: dict[str, Augment] = {
    "crop": lambda pixels, stream: augment.crop(pixels, padding=2, stream=stream),
    "flip": lambda pixels, stream: augment.flip(pixels, stream=stream),
    "cutout": lambda pixels, stream: augment.cutout(unit_range(pixels), side=3, stream=stream),
    "random_erasing": lambda pixels, stream: augment.random_erasing(unit_range(pixels), probability=0.5, stream=stream),
    "views": lambda pixels, stream: torch.stack(augment.views(pixels, EVERYTHING, stream=stream), 1),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_two_processes_augment_their_halves_like_one_the_whole(name: str) -> None:
    pixels = images(count=16, size=12)
    whole = AUGMENTATIONS[name](pixels, seeded())
    halves = [AUGMENTATIONS[name](pixels[8 * p : 8 * p + 8], seeded(process=p, processes=2)) for p in range(2)]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_stream_decides(name: str) -> None:
    first, second, other = (AUGMENTATIONS[name](images(size=12), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
