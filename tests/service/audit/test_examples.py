from __future__ import annotations

import io

import numpy as np
from PIL import Image

from service.audit import examples

CLEAN = np.random.default_rng(0).random((4, 3, 8, 8), dtype=np.float32) * np.float32(0.9)
ADVERSARIAL = CLEAN + np.float32(0.03)


def _nearest(attack: str = "pgd", start: int = 10) -> tuple[examples.Example, ...]:
    distances = np.array([0.0, 0.05, np.inf, 0.03])
    return examples.nearest(attack=attack, start=start, clean=CLEAN, adversarial=ADVERSARIAL, distances=distances)


def test_the_nearest_are_kept_exactly_and_never_what_needed_no_perturbation() -> None:
    near, far = _nearest()
    assert [(each.row, each.distance) for each in (near, far)] == [(13, 0.03), (11, 0.05)]
    again = examples.Example.model_validate_json(near.model_dump_json())
    np.testing.assert_array_equal(again.images(), np.stack([CLEAN[3], ADVERSARIAL[3]]))


def test_the_worst_are_chosen_attack_by_attack() -> None:
    found = [*_nearest(start=10), *_nearest(attack="fmn"), *_nearest(start=0)]
    assert [(each.attack, each.row) for each in examples.worst(found, count=3)] == [
        ("pgd", 3),
        ("pgd", 13),
        ("pgd", 1),
        ("fmn", 13),
        ("fmn", 11),
    ]


def test_the_arrays_are_exact_and_the_file_is_the_same_every_time() -> None:
    content = examples.to_npz(_nearest())
    assert content == examples.to_npz(_nearest())
    with np.load(io.BytesIO(content)) as arrays:
        np.testing.assert_array_equal(arrays["pgd-13.adversarial"], ADVERSARIAL[3])
        np.testing.assert_array_equal(arrays["pgd-11.clean"], CLEAN[1])


def test_a_picture_shows_clean_adversarial_and_difference_side_by_side() -> None:
    (near, _) = _nearest()
    picture = np.asarray(Image.open(io.BytesIO(examples.to_png(near))))
    assert picture.shape == (128, 3 * 128, 3)
    np.testing.assert_allclose(picture[::16, :128:16] / 255, CLEAN[3].transpose(1, 2, 0), atol=0.51 / 255)
    # Every pixel rose by the same, so that the difference is white.
    assert picture[:, 256:].min() > 200


def test_a_grey_image_and_one_that_did_not_change_are_pictures_too() -> None:
    grey = np.full((1, 1, 200, 200), 0.5, np.float32)
    (example,) = examples.nearest(attack="a", start=0, clean=grey, adversarial=grey, distances=np.array([0.1]))
    picture = np.asarray(Image.open(io.BytesIO(examples.to_png(example))))
    assert picture.shape == (200, 600)
    assert (picture[:, 400:] == 128).all()
