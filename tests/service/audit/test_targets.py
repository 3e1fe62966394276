"""What an audit asks an engine, and what it makes of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export.engines.base import FakeEngine, Inputs, Logits
from export.manifest import Manifest, Parity, Requirements, TensorSpec
from service.audit.targets import EngineTarget

if TYPE_CHECKING:
    from typing import Literal

    from export.engines.base import Images

SHAPE = (3, 4, 5)
CLASSES = 6
MAX_BATCH = 4
WEIGHTS = np.random.default_rng(0).standard_normal((60, CLASSES)).astype(np.float32)


class Recording(FakeEngine):
    """A linear classifier of either input that may apply softmax, and keeps what it was asked."""

    def __init__(self, *, stored: bool = False, output: Literal["logits", "probabilities"] = "logits") -> None:
        channels, height, width = SHAPE
        shape = (-1, height, width, channels) if stored else (-1, *SHAPE)
        manifest = Manifest(
            model="linear",
            version=1,
            file="model.onnx",
            sha256="",
            runtime="onnxruntime",
            precision="fp32",
            inputs=(TensorSpec(name="images", datatype="UINT8" if stored else "FP32", shape=shape),),
            outputs=(TensorSpec(name=output, datatype="FP32", shape=(-1, CLASSES)),),
            output=output,
            class_names=tuple("abcdef"),
            max_batch=MAX_BATCH,
            requires=Requirements(runtime=">=1.27"),
            parity=Parity(status="passed", reference="numpy"),
        )
        super().__init__(manifest, weights=WEIGHTS)
        self.asked: list[Inputs] = []

    def _run(self, inputs: Inputs) -> Logits:
        self.asked.append(inputs)
        logits = super()._run(inputs)
        return softmax(logits) if self.manifest.output == "probabilities" else logits


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


@pytest.fixture
def images() -> Images:
    return np.random.default_rng(1).random((2 * MAX_BATCH + 1, *SHAPE), dtype=np.float32)


def logits_of(images: Images) -> Logits:
    return np.asarray(images.reshape(len(images), -1) @ WEIGHTS)


def test_every_image_asked_is_counted_and_no_batch_is_too_large(images: Images) -> None:
    engine = Recording()
    target = EngineTarget(engine)
    np.testing.assert_allclose(target(images), logits_of(images), rtol=1e-4, atol=1e-4)
    target.predict(images[:2])
    assert target.queries == len(images) + 2
    assert [len(batch) for batch in engine.asked] == [MAX_BATCH, MAX_BATCH, 1, 2]


def test_an_engine_that_takes_uint8_is_asked_what_can_be_sent(images: Images) -> None:
    engine = Recording(stored=True)
    target = EngineTarget(engine)
    logits = target(images)
    assert all(batch.dtype == np.uint8 for batch in engine.asked)
    seen = target.seen(images)
    assert seen.dtype == np.float32
    assert np.abs(seen - images).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(np.rint(seen * 255), np.rint(images * 255))
    np.testing.assert_allclose(logits, logits_of(seen), rtol=1e-4, atol=1e-4)


def test_a_perturbation_too_small_to_be_sent_changes_nothing() -> None:
    target = EngineTarget(Recording(stored=True))
    grey = np.full((1, *SHAPE), 100 / 255, np.float32)
    np.testing.assert_array_equal(target(grey + np.float32(0.4 / 255)), target(grey))
    assert (target(grey + np.float32(0.6 / 255)) != target(grey)).any()


def test_an_engine_that_takes_floats_sees_images_as_they_are(images: Images) -> None:
    assert EngineTarget(Recording()).seen(images) is images


def test_probabilities_become_logits_that_mean_the_same(images: Images) -> None:
    shares, logits = EngineTarget(Recording(output="probabilities"))(images), logits_of(images)
    np.testing.assert_allclose(softmax(shares), softmax(logits), rtol=1e-4, atol=1e-6)
    # The same differences between classes, which is what margins and losses are made of.
    np.testing.assert_allclose(shares - shares[:, :1], logits - logits[:, :1], rtol=1e-3, atol=1e-3)


def test_a_probability_of_zero_is_a_finite_logit() -> None:
    images = np.zeros((1, *SHAPE), np.float32)
    images[0, :, 0, 0] = 1
    engine = Recording(output="probabilities")
    engine._weights = WEIGHTS * 1000
    logits = EngineTarget(engine)(images)
    assert np.isfinite(logits).all()
    assert logits.argmax() == logits_of(images).argmax()
