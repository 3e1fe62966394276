"""What an audit asks an engine, and what it makes of the answers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from export.engines.base import FakeEngine, Inputs, Logits
from export.engines.failures import RunFailed
from export.engines.threads import budget
from export.manifest import Manifest, Parity, Requirements, TensorSpec
from export.repository import Repository
from service.audit.target.base import TargetFailed
from service.audit.target.engine import EngineTarget
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Literal

    from export.engines.base import Images

    Weights = Callable[[int], np.ndarray[tuple[int, int], np.dtype[np.float32]]]

SHAPE = (3, 4, 5)
CLASSES = 6
MAX_BATCH = 12
WEIGHTS = np.random.default_rng(0).standard_normal((60, CLASSES)).astype(np.float32)


class Recording(FakeEngine):
    """A linear classifier of either input that may apply softmax, and keeps what it was asked."""

    def __init__(self, *, stored: bool = False, output: Literal["logits", "probabilities"] = "logits") -> None:
        channels, height, width = SHAPE
        shape = (-1, height, width, channels) if stored else (-1, *SHAPE)
        manifest = Manifest(
            model="linear",
            version=3,
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
        self.fails_after = 1000
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def _run(self, inputs: Inputs) -> Logits:
        self.asked.append(inputs)
        if len(self.asked) > self.fails_after:
            raise RunFailed("linear: the runtime failed: out of memory; take a smaller batch")
        logits = super()._run(inputs)
        return softmax(logits) if self.manifest.output == "probabilities" else logits


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def logits_of(images: Images) -> Logits:
    return np.asarray(images.reshape(len(images), -1) @ WEIGHTS)


@pytest.fixture
def some() -> Images:
    return np.random.default_rng(1).random((2 * MAX_BATCH + 1, *SHAPE), dtype=np.float32)


def test_every_image_asked_is_counted_and_no_batch_is_too_large(some: Images) -> None:
    engine = Recording()
    with EngineTarget(engine) as target:
        assert (target.name, target.class_names, target.image_shape) == ("linear@3", tuple("abcdef"), SHAPE)
        assert target.batch_sizes == (1, 2, 4, 8, 12)
        np.testing.assert_allclose(target(some), logits_of(some), rtol=1e-4, atol=1e-4)
        target.predict(some[:2])
        assert target(some[:0]).shape == (0, CLASSES)
        assert target.queries == len(some) + 2
        assert [len(batch) for batch in engine.asked] == [12, 12, 1, 2]
    assert engine.closed


def test_a_server_that_allows_fewer_images_a_call_is_followed(some: Images) -> None:
    engine = Recording()
    target = EngineTarget(engine, max_batch=8)
    target(some[:12])
    assert target.batch_sizes == (1, 2, 4, 8)
    assert [len(batch) for batch in engine.asked] == [8, 4]


def test_what_an_engine_that_takes_uint8_is_sent_is_what_counts(some: Images) -> None:
    engine = Recording(stored=True)
    target = EngineTarget(engine)
    assert target.domain.kind == "uint8"
    sent = target.domain.sent(torch.from_numpy(some)).numpy()
    assert np.abs(sent - some).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_allclose(target(sent), logits_of(sent), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(engine.asked[0], np.rint(sent[:MAX_BATCH] * 255).transpose(0, 2, 3, 1))


def test_8_bit_images_may_stand_in_front_of_an_engine_that_takes_floats_and_not_the_other_way_round() -> None:
    assert EngineTarget(Recording()).domain.kind == "float32"
    assert EngineTarget(Recording(), wanted="uint8").domain.kind == "uint8"
    with pytest.raises(ValueError, match=r"target\.input: expected 'uint8' or 'auto' for linear@3.*got 'float32'"):
        EngineTarget(Recording(stored=True), wanted="float32")


def test_probabilities_become_logits_that_mean_the_same(some: Images) -> None:
    shares, logits = EngineTarget(Recording(output="probabilities"))(some), logits_of(some)
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


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_nan_is_a_failure_of_the_target(some: Images, output: Literal["logits", "probabilities"]) -> None:
    engine = Recording(output=output)
    engine._weights = WEIGHTS * np.float32(np.nan)
    with pytest.raises(TargetFailed, match="linear@3: expected finite logits, got NaN or infinity for 2 of 2 images"):
        EngineTarget(engine)(some[:2])


def test_a_runtime_that_fails_in_the_middle_is_a_failure_of_the_target(some: Images) -> None:
    engine = Recording()
    engine.fails_after = 1
    with pytest.raises(TargetFailed, match="linear@3: linear: the runtime failed: out of memory"):
        EngineTarget(engine)(some)


def test_a_version_is_opened_as_it_is_served(repository: Path, images: Images, weights: Weights) -> None:
    version = Repository(repository).find("linear", 1)
    settings = Settings.model_validate({"model": {"linear": {"batching": {"max_batch_size": 3}}}})
    with EngineTarget.opened(version, threads=budget(), settings=settings) as target:
        assert target.engine.manifest.sha256 == version.manifest.sha256
        assert target.batch_sizes == (1, 2, 3)
        expected = images.reshape(len(images), -1) @ weights(0)
        np.testing.assert_allclose(target(images), expected, rtol=1e-4, atol=1e-4)
    with EngineTarget.opened(version) as target:
        assert target.max_batch == version.manifest.max_batch
    with pytest.raises(ValueError, match="device"):
        EngineTarget.opened(version, device="tpu")


def test_a_changed_file_is_refused(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "models")
    version = Repository(tmp_path / "models").find("linear", 1)
    (version.folder / "model.onnx").write_bytes(b"not what was published")
    with pytest.raises(ValueError, match="sha256"):
        EngineTarget.opened(version)
