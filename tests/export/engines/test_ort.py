from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from export.engines import open_engine
from export.manifest import FILE_NAME, sha256_of

if TYPE_CHECKING:
    from export.engines.base import Engine, Images
    from export.repository import Repository


@pytest.fixture
def engine(digits_models: Repository) -> Engine:
    return open_engine(digits_models.find("digits").folder)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), r"expected float32 images of shape \(N, 3, 32, 32\)"),
        (np.zeros((1, 3, 32, 32), np.float64), "got float64"),
        (np.zeros((3, 32, 32), np.float32), r"got float32 \(3, 32, 32\)"),
        (np.zeros((65, 3, 32, 32), np.float32), "expected 1 to 64 images a call, got 65"),
        (np.zeros((0, 3, 32, 32), np.float32), "got 0"),
    ],
)
def test_images_of_another_form_are_refused(engine: Engine, images: Images, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        engine(images)


def test_an_answer_does_not_depend_on_the_batch(engine: Engine) -> None:
    images = np.random.default_rng(0).random((16, 3, 32, 32), dtype=np.float32)
    together = engine(images)
    for index, image in enumerate(images):
        np.testing.assert_allclose(engine(image[None])[0], together[index], atol=1e-4)


def test_an_unknown_device_is_named(digits_models: Repository) -> None:
    with pytest.raises(ValueError, match="device 'tpu': expected one of cpu, cuda"):
        open_engine(digits_models.find("digits").folder, device="tpu")


def test_a_file_that_is_no_model_is_refused(own_models: Repository) -> None:
    version = own_models.find("digits")
    path = version.folder / "model.onnx"
    path.write_bytes(b"not a model")
    forged = version.manifest.model_copy(update={"sha256": sha256_of(path)})
    (version.folder / FILE_NAME).write_text(forged.model_dump_json())
    with pytest.raises(ValueError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        open_engine(version.folder)
