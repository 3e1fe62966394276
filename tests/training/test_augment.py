from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import augment


def images(count: int = 8, size: int = 6) -> Tensor:
    return torch.randint(1, 256, (count, size, size, 3), generator=seeded(), dtype=torch.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(padding=st.integers(1, 4), seed=st.integers(0, 100))
def test_a_crop_is_a_window_of_the_padded_image(padding: int, seed: int) -> None:
    original = images(count=3, size=5)
    cropped = augment.crop(original, padding=padding, generator=seeded(seed))
    padded = torch.zeros(3, 5 + 2 * padding, 5 + 2 * padding, 3, dtype=torch.uint8)
    padded[:, padding:-padding, padding:-padding] = original
    for image, source in zip(cropped, padded, strict=True):
        windows = source.unfold(0, 5, 1).unfold(1, 5, 1).permute(0, 1, 3, 4, 2)
        assert any(torch.equal(window, image) for row in windows for window in row)


def test_no_padding_crops_nothing() -> None:
    assert torch.equal(augment.crop(images(), padding=0, generator=seeded()), images())


def test_images_of_a_batch_are_shifted_each_on_its_own() -> None:
    same = images(count=1).expand(32, -1, -1, -1)
    assert len(torch.unique(augment.crop(same, padding=2, generator=seeded()), dim=0)) > 5


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    original = images(count=400)
    flipped = augment.flip(original, generator=seeded())
    mirrored = (flipped == original.flip(2)).flatten(1).all(1)
    kept = (flipped == original).flatten(1).all(1)
    assert bool((mirrored | kept).all())
    assert 150 < int(mirrored.sum()) < 250


def test_the_generator_decides() -> None:
    first, second, other = (augment.crop(images(), padding=2, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
