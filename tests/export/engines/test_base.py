"""What every engine promises, by the fake one: real answers without a runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.engines.base import FakeEngine, Inputs, Logits, as_input, as_stored
from tests.export.engines import versions
from tests.export.engines.versions import CHANNELS, CLASSES, HEIGHT, MAX_BATCH, WIDTH, Input

SHAPE = (CHANNELS, HEIGHT, WIDTH)


class Recording(FakeEngine):
    """Keeps what it was called with."""

    def __init__(self, kind: Input) -> None:
        super().__init__(versions.manifest(input=kind), weights=versions.weights_of(0))
        self.batches: list[Inputs] = []

    def _run(self, inputs: Inputs) -> Logits:
        self.batches.append(inputs)
        return super()._run(inputs)


def images_of(n: int, *, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random((n, *SHAPE), dtype=np.float32)


@given(n=st.integers(0, 3 * MAX_BATCH), kind=st.sampled_from(["float32", "uint8"]))
def test_any_number_of_images_is_classified_in_batches_that_the_engine_takes(n: int, kind: Input) -> None:
    engine, images = Recording(kind), images_of(n)
    logits = engine.classify(images)
    assert logits.shape == (n, CLASSES)
    assert logits.dtype == np.float32
    sent = images if kind == "float32" else np.rint(images * 255) / np.float32(255)
    np.testing.assert_allclose(logits, versions.answers(sent), rtol=1e-4, atol=1e-4)
    assert [len(batch) for batch in engine.batches] == [min(MAX_BATCH, n - start) for start in range(0, n, MAX_BATCH)]


def test_images_of_a_uint8_engine_are_rounded_half_to_even_and_turned() -> None:
    images = np.zeros((1, *SHAPE), np.float32)
    # 0.5, 1.5, 2.5 and 254.5 in units of 1/255; all four are exact in float32 after the product.
    images[0, :, 0, 0] = np.array([0.5, 1.5, 2.5], np.float32) / np.float32(255)
    images[0, 0, 1, 2] = 1
    stored = as_input(versions.manifest(input="uint8"), images)
    assert stored.dtype == np.uint8
    assert stored.shape == (1, HEIGHT, WIDTH, CHANNELS)
    assert stored.flags.c_contiguous
    assert stored[0, 0, 0].tolist() == [0, 2, 2]
    assert stored[0, 1, 2].tolist() == [255, 0, 0]
    assert stored.sum() == 255 + 4


def test_what_was_stored_as_uint8_comes_back_as_it_was() -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = stored.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(as_stored(images), stored)


def test_images_of_a_float_engine_are_not_copied() -> None:
    images = images_of(3)
    assert as_input(versions.manifest(), images) is images


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_what_cannot_be_sent_as_uint8_is_refused(value: float) -> None:
    images = images_of(2)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got .*; scale the images"):
        Recording("uint8").classify(images)


@pytest.mark.parametrize(
    ("kind", "inputs", "complaint"),
    [
        (
            "float32",
            np.zeros((1, 4, 5, 3), np.float32),
            r"linear: expected float32 images of shape \(N, 3, 4, 5\), got",
        ),
        ("float32", np.zeros((1, 3, 4, 5)), r"got float64 \(1, 3, 4, 5\)"),
        ("float32", np.zeros((3, 4, 5), np.float32), r"got float32 \(3, 4, 5\)"),
        ("float32", np.float32(1), r"got float32 \(\)"),
        ("float32", np.zeros((9, 3, 4, 5), np.float32), "expected 1 to 8 images a call, got 9"),
        ("float32", np.zeros((0, 3, 4, 5), np.float32), "expected 1 to 8 images a call, got 0"),
        ("uint8", np.zeros((1, 3, 4, 5), np.float32), r"expected uint8 images of shape \(N, 4, 5, 3\), got float32"),
        ("uint8", np.zeros((1, 3, 4, 5), np.uint8), r"expected uint8 images of shape \(N, 4, 5, 3\), got uint8 \(1, 3"),
        ("uint8", np.zeros((9, 4, 5, 3), np.uint8), "expected 1 to 8 images a call, got 9"),
    ],
)
def test_a_batch_of_another_form_is_refused(kind: Input, inputs: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Recording(kind)(inputs)


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 5, 3), np.float32), np.zeros((2, 3, 4, 5)), np.zeros((3, 4, 5), np.float32)]
)
def test_images_to_classify_are_always_float32_nchw(kind: Input, images: Any) -> None:
    with pytest.raises(ValueError, match=r"linear: expected float32 images of shape \(N, 3, 4, 5\), got"):
        Recording(kind).classify(images)


@pytest.mark.parametrize(("kind", "dtype"), [("float32", np.float32), ("uint8", np.uint8)])
def test_an_engine_is_warmed_up_with_what_it_takes(kind: Input, dtype: type[np.generic]) -> None:
    engine = Recording(kind)
    engine.warm_up()
    assert [(batch.dtype, len(batch)) for batch in engine.batches] == [(np.dtype(dtype), 1)]
