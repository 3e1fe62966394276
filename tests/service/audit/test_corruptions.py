"""The corruptions against the published code's results, and what an audit relies on.

The golden files hold results of the published CIFAR-10-C code (hendrycks/robustness, make_cifar_c.py): the
npz four clean test images and what it made of them; the csv its strength, in grey levels from 0 to 255, on
the 256 images of which these are the first four.
"""

import csv
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float, UInt8

from service.audit import corruptions

GOLDEN = Path(__file__).parents[2] / "golden"
CELLS = [(name, severity) for name in corruptions.NAMES for severity in corruptions.SEVERITIES]
RANDOM_CELLS = [cell for cell in CELLS if cell[0] in ("gaussian_noise", "fog")]
REPEATS = 64  # of the four images, each with a seed of its own
FOGS = {1: (0.2, 3.0), 2: (0.5, 3.0), 3: (0.75, 2.5), 4: (1.0, 2.0), 5: (1.5, 1.75)}  # thickness, decay

Images = UInt8[np.ndarray, "n h w 3"]


@functools.cache
def golden() -> dict[str, Images]:
    with np.load(GOLDEN / "corruptions_cifar.npz") as file:
        return dict(file)


def clean() -> Images:
    return golden()["cifar_images"]


@functools.cache
def published_strengths() -> dict[tuple[str, int], dict[str, float]]:
    with (GOLDEN / "corruptions_cifar.csv").open(newline="") as file:
        return {
            (row.pop("corruption"), int(row.pop("severity"))): {key: float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        }


def seeds_for(n: int, *, name: str, severity: int) -> np.ndarray:
    seeds = [corruptions.image_seed(seed=0, index=index, name=name, severity=severity) for index in range(n)]
    return np.array(seeds, dtype=np.int64)


@functools.cache
def repeated(name: str, severity: int) -> Images:
    """The four images under many seeds, (REPEATS * 4, 32, 32, 3)."""
    images = np.tile(clean(), (REPEATS, 1, 1, 1))
    seeds = seeds_for(len(images), name=name, severity=severity)
    return corruptions.corrupt(images, name=name, severity=severity, seeds=seeds)


def differences(corrupted: Images) -> Float[np.ndarray, "n h w 3"]:
    return corrupted.astype(np.float64) - np.resize(clean(), corrupted.shape)


def random_images(n: int = 6, *, height: int = 32, width: int = 32) -> Images:
    return np.random.default_rng(3).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


# Strength, against the published code.


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Grey levels. Half a level for JPEG: decoders may round differently; the others are arithmetic alone.
    [("defocus_blur", 0.01), ("contrast", 0.01), ("jpeg_compression", 0.5)],
)
def test_a_deterministic_corruption_equals_the_published_one(name: str, severity: int, tolerance: float) -> None:
    seeds = np.arange(4)
    ours = corruptions.corrupt(clean(), name=name, severity=severity, seeds=seeds).astype(np.float64)
    assert np.abs(ours - golden()[f"cifar_{name}_{severity}"]).mean() < tolerance


@pytest.mark.parametrize("power", [1, 2], ids=["mean_abs", "mean_square"])
@pytest.mark.parametrize(("name", "severity"), RANDOM_CELLS)
def test_a_random_corruption_is_as_strong_as_the_published_one(name: str, severity: int, power: int) -> None:
    """Within four standard errors of the stored outputs' mean over four images, one draw each.

    The spread over seeds is measured on ours. Four errors are 3 % of gaussian noise's mean absolute
    difference, and 33 % of fog's, whose thickness and roughness are held more closely below.
    """
    ours = (np.abs(differences(repeated(name, severity))) ** power).mean(axis=(1, 2, 3)).reshape(REPEATS, 4)
    stored = (np.abs(differences(golden()[f"cifar_{name}_{severity}"])) ** power).mean()
    error = np.sqrt(ours.var(axis=0, ddof=1).sum()) / 4
    assert abs(ours.mean() - stored) < 4 * error


@pytest.mark.parametrize(("name", "severity"), RANDOM_CELLS)
def test_a_random_corruption_is_as_strong_as_on_many_images(name: str, severity: int) -> None:
    """Within 3 % for gaussian noise and 8 % for fog of the strength on 256 images.

    Gaussian noise depends on an image only where it clips. Fog pulls every pixel towards its own grey, so its
    strength depends on how bright an image is: the published code's own mean over our four is 2 to 4 % lower.
    """
    ours = differences(repeated(name, severity))
    published = published_strengths()[name, severity]
    tolerance = {"gaussian_noise": 0.03, "fog": 0.08}[name]
    assert np.abs(ours).mean() == pytest.approx(published["mean_abs_difference"], rel=tolerance)
    assert np.sqrt((ours**2).mean()) == pytest.approx(published["rms_difference"], rel=tolerance)


def haze_in(corrupted: Images, *, thickness: float) -> Float[np.ndarray, "n h w"]:
    """Solve the fog equation for the map that was added, known to be in [0, 1]."""
    unit = np.resize(clean(), corrupted.shape) / 255
    brightest = unit.max(axis=(1, 2, 3), keepdims=True)
    before_truncation = (corrupted + 0.5) / 255
    thinned = (before_truncation * (brightest + thickness) / brightest - unit) / thickness
    haze: Float[np.ndarray, "n h w"] = thinned.mean(axis=3)
    return haze


def fogged(source: str, severity: int) -> Images:
    return golden()[f"cifar_fog_{severity}"] if source == "published" else repeated("fog", severity)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize("source", ["published", "ours"])
def test_fog_adds_a_map_from_0_to_1_in_the_published_thickness(source: str, severity: int) -> None:
    thickness, _ = FOGS[severity]
    haze = haze_in(fogged(source, severity), thickness=thickness)
    # Truncation moves a channel by up to half a grey level, which is 1.2 % of the thinnest map's range.
    assert haze.min(axis=(1, 2)) == pytest.approx(0, abs=0.013)
    assert haze.max(axis=(1, 2)) == pytest.approx(1, abs=0.013)


def mean_square_offset(haze: Float[np.ndarray, "n h w"], *, half: int) -> float:
    """How far the diamond-square algorithm moved the points of one round from their neighbours' mean."""
    corner, centre = haze[:, :: 2 * half, :: 2 * half], haze[:, half :: 2 * half, half :: 2 * half]
    below, right = np.roll(corner, -1, 1), np.roll(corner, -1, 2)
    upper, left = haze[:, :: 2 * half, half :: 2 * half], haze[:, half :: 2 * half, :: 2 * half]
    offsets = [
        centre - (corner + below + right + np.roll(below, -1, 2)) / 4,
        upper - (centre + np.roll(centre, 1, 1) + corner + right) / 4,
        left - (centre + np.roll(centre, 1, 2) + corner + below) / 4,
    ]
    return float(np.square(offsets).mean())


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
@pytest.mark.parametrize(
    ("source", "tolerance"),
    # Three standard errors: a ratio of rms values from 48 and 192 draws is uncertain by 7 %, from 64 times as
    # many by 1 %, and by 1.5 % because each map is stretched by a range of its own.
    [("published", 0.22), ("ours", 0.05)],
)
def test_fog_is_as_rough_as_published(source: str, tolerance: float, severity: int) -> None:
    thickness, decay = FOGS[severity]
    haze = haze_in(fogged(source, severity), thickness=thickness)
    grey_level = (1 + thickness) / thickness / 255
    truncation = 5 / 4 * grey_level**2 / 12 / 3  # of a point and four neighbours, mean of three channels
    coarse, fine = (mean_square_offset(haze, half=half) - truncation for half in (8, 4))
    assert np.sqrt(coarse / fine) == pytest.approx(decay**2, rel=tolerance)


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_each_severity_is_stronger_than_the_one_before(name: str) -> None:
    strengths = [np.abs(differences(repeated(name, severity))).mean() for severity in corruptions.SEVERITIES]
    assert strengths == sorted(strengths)


def test_values_are_truncated() -> None:
    # Noise has no preferred sign, so dropping the fraction shows as half a grey level.
    grey = np.full((64, 32, 32, 3), 128, dtype=np.uint8)
    seeds = seeds_for(64, name="gaussian_noise", severity=1)
    noisy = corruptions.corrupt(grey, name="gaussian_noise", severity=1, seeds=seeds)
    assert noisy.mean() - 128 == pytest.approx(-0.5, abs=4 * 10.2 / np.sqrt(grey.size))


# Independence of everything but the image and its seed.


@pytest.mark.parametrize(("name", "severity"), CELLS)
def test_a_result_depends_on_neither_batch_nor_order(name: str, severity: int) -> None:
    images = np.concatenate([clean(), random_images(), np.full((2, 32, 32, 3), 77, dtype=np.uint8)])
    seeds = seeds_for(len(images), name=name, severity=severity)
    together = corruptions.corrupt(images, name=name, severity=severity, seeds=seeds)
    order = np.random.default_rng(5).permutation(len(images))
    shuffled = corruptions.corrupt(images[order], name=name, severity=severity, seeds=seeds[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for split in (1, 5):
        parts = [
            corruptions.corrupt(images[at : at + split], name=name, severity=severity, seeds=seeds[at : at + split])
            for at in range(0, len(images), split)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_a_result_does_not_depend_on_the_number_of_threads(name: str) -> None:
    images = np.tile(clean(), (32, 1, 1, 1))
    seeds = seeds_for(len(images), name=name, severity=3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(corruptions.corrupt(images, name=name, severity=3, seeds=seeds))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_neither_the_images_nor_the_global_generators_change(name: str) -> None:
    images = clean().copy()
    before = np.random.get_state(legacy=False)["state"]["key"].copy(), torch.get_rng_state()  # noqa: NPY002
    corruptions.corrupt(images, name=name, severity=5, seeds=np.arange(4))
    after = np.random.get_state(legacy=False)["state"]["key"], torch.get_rng_state()  # noqa: NPY002
    np.testing.assert_array_equal(images, clean())
    np.testing.assert_array_equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", ["gaussian_noise", "fog"])
def test_images_with_other_seeds_get_other_draws(name: str) -> None:
    one = np.repeat(clean()[:1], 4, axis=0)
    seeds = np.array([7, 7 + 2**32, -7, 7])  # the second differs in its upper half alone
    first, upper_half, negative, same = corruptions.corrupt(one, name=name, severity=3, seeds=seeds)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first.astype(int) - upper_half).mean() > 1
    assert np.abs(first.astype(int) - negative).mean() > 1


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("gaussian_noise", [158, 181, 179, 204, 158, 200, 219, 205]),
        ("fog", [68, 83, 94, 100, 116, 130, 139, 141]),
    ],
)
def test_draws_stay_the_same_from_release_to_release(name: str, pixels: list[int]) -> None:
    """The red of the first image's middle row; what `corrupt` gave when it was written."""
    seeds = np.array([3804092169668011184])
    result = corruptions.corrupt(clean()[:1], name=name, severity=5, seeds=seeds)
    assert result[0, 16, :8, 0].tolist() == pixels


def test_image_seeds_stay_the_same_from_release_to_release() -> None:
    assert corruptions.image_seed(seed=0, index=0, name="fog", severity=1) == 3804092169668011184


def test_image_seeds_differ_in_every_part() -> None:
    parts = [(s, i, name, v) for s in (0, 1) for i in range(1000) for name in ("fog", "contrast") for v in (1, 2)]
    seeds = {corruptions.image_seed(seed=s, index=i, name=name, severity=v) for s, i, name, v in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Shapes, and what is refused.


@pytest.mark.parametrize("size", [(3, 3), (5, 8), (33, 20), (64, 64)])
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_any_size_keeps_its_shape(name: str, size: tuple[int, int]) -> None:
    height, width = size
    images = random_images(2, height=height, width=width)
    result = corruptions.corrupt(images, name=name, severity=4, seeds=np.arange(2))
    assert result.dtype == np.uint8
    assert result.shape == images.shape
    assert not np.array_equal(result, images)


def test_the_fog_of_a_large_image_covers_it_without_repeating() -> None:
    white = np.full((1, 40, 50, 3), 255, dtype=np.uint8)
    fog = corruptions.corrupt(white, name="fog", severity=5, seeds=np.array([1]))[0, ..., 0].astype(int)
    assert np.abs(fog[:8] - fog[32:]).mean() > 1
    assert np.abs(fog[:, :18] - fog[:, 32:]).mean() > 1


def test_black_images_stay_black_in_fog() -> None:
    black = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    assert not corruptions.corrupt(black, name="fog", severity=5, seeds=np.array([1])).any()


def test_names_are_those_of_the_published_set() -> None:
    assert corruptions.NAMES == ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "frogs"}, "expected a corruption among gaussian_noise, .*jpeg_compression, got 'frogs'"),
        ({"severity": 0}, "expected a severity from 1 to 5, got 0"),
        ({"severity": 6}, "expected a severity from 1 to 5, got 6"),
        (
            {"images": np.zeros((2, 32, 32, 3), np.float32)},
            "expected images of uint8 in 0 to 255, got float32",
        ),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, re.escape("(n, h, w, 3), got (2, 3, 32, 32)")),
        ({"images": np.zeros((32, 32, 3), np.uint8)}, re.escape("(n, h, w, 3), got (32, 32, 3)")),
        ({"images": np.zeros((0, 32, 32, 3), np.uint8)}, "expected at least one image, got an empty batch"),
        ({"images": np.zeros((2, 32, 2, 3), np.uint8)}, "expected sides of at least 3 pixels, got 32 x 2"),
        ({"seeds": np.arange(3)}, re.escape("expected seeds of shape (2,), got (3,)")),
        ({"seeds": np.zeros((2, 1), np.int64)}, re.escape("expected seeds of shape (2,), got (2, 1)")),
        ({"seeds": np.zeros(2)}, "expected seeds of int64, got float64"),
    ],
)
def test_wrong_input_is_refused(wrong: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {
        "images": np.zeros((2, 32, 32, 3), np.uint8),
        "name": "fog",
        "severity": 1,
        "seeds": np.arange(2),
    }
    call = right | wrong
    with pytest.raises(ValueError, match=message):
        corruptions.corrupt(call.pop("images"), **call)
