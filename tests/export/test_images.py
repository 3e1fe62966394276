from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import images, pictures
from export.images import Share
from export.manifest import Preprocessing
from training import checkpoint, datasets

SHAPE = (3, 16, 16)


def _folder(root: Path, *, count: int = 6, base: int = 50) -> Path:
    for offset, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (20 + index, 30), base + 50 * offset + index).save(root / name / f"{index}.png")
    return root


def _levels(chosen: images.ImageSet) -> list[int]:
    return [round(float(image.mean() * 255)) for image in chosen.images]


def test_a_folder_s_images_are_shuffled_resized_and_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "pets")
    chosen = images.from_folder(folder, share=Share(9), image_shape=SHAPE, class_names=("bird", "cat", "dog"))
    assert chosen.images.shape == (9, *SHAPE)
    assert chosen.record.description == "images of pets"
    assert chosen.labels is not None
    by_name = dict(zip(chosen.names, zip(_levels(chosen), chosen.labels, strict=True), strict=True))
    assert len(by_name) == 9
    assert all(
        (level, label) == ((50 if name.startswith("cat") else 100) + int(name[4]), 1 if name.startswith("cat") else 2)
        for name, (level, label) in by_name.items()
    )
    assert {1, 2} == set(chosen.labels)


def test_labels_are_unknown_where_a_folder_is_no_class(tmp_path: Path) -> None:
    chosen = images.from_folder(_folder(tmp_path), share=Share(4), image_shape=SHAPE, class_names=("cat", "cow"))
    assert chosen.labels is None
    assert chosen.record.description.endswith("(no accuracy: 'dog' is no class of the model)")


@pytest.mark.parametrize(("proof", "calibration", "sizes"), [(8, 4, (8, 4)), (16, 8, (8, 4)), (90, 10, (11, 1))])
def test_a_calibration_takes_other_images_than_the_proof(
    tmp_path: Path, proof: int, calibration: int, sizes: tuple[int, int]
) -> None:
    folder = _folder(tmp_path)
    share = Share(proof, calibration)
    parts = [
        images.from_folder(
            folder, share=share, image_shape=SHAPE, class_names=("cat", "dog"), to_calibrate=to_calibrate
        )
        for to_calibrate in (False, True)
    ]
    assert (len(parts[0]), len(parts[1])) == sizes
    assert not set(parts[0].names) & set(parts[1].names)
    assert "own" not in parts[1].record.description


def test_one_image_serves_both_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "cat" / "0.png")
    chosen = images.from_folder(tmp_path, share=Share(5, 5), image_shape=SHAPE, class_names=("cat",), to_calibrate=True)
    assert chosen.record.description.endswith(", the proof's own")


def test_the_hash_is_of_the_pixels(tmp_path: Path) -> None:
    one, other = _folder(tmp_path / "one"), _folder(tmp_path / "other", base=51)
    records = [
        images.from_folder(folder, share=Share(12), image_shape=SHAPE, class_names=()).record
        for folder in (one, one, other)
    ]
    assert records[0].sha256 == records[1].sha256 != records[2].sha256


@pytest.mark.parametrize("shape", [(3, 16, 20), (1, 16, 16), SHAPE], ids=str)
@pytest.mark.parametrize("preprocessing", [Preprocessing(), Preprocessing(resize=22, interpolation="bicubic")], ids=str)
def test_images_are_what_a_server_makes_of_the_files(
    shape: tuple[int, int, int], preprocessing: Preprocessing, tmp_path: Path
) -> None:
    (tmp_path / "cat").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "cat" / "0.png")
    chosen = images.from_folder(
        tmp_path, share=Share(1), image_shape=shape, class_names=("cat",), preprocessing=preprocessing
    )
    content = (tmp_path / "cat" / "0.png").read_bytes()
    served = pictures.pixels(content, image_shape=shape, preprocessing=preprocessing)
    np.testing.assert_array_equal(chosen.images[0], served.transpose(2, 0, 1) / np.float32(255))


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cat/0\.png: expected a JPEG, PNG or WebP image"):
        images.from_folder(tmp_path, share=Share(1), image_shape=SHAPE, class_names=("cat",))


def test_an_input_of_one_channel_gets_grey_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / "cat" / "0.png")
    chosen = images.from_folder(tmp_path, share=Share(1), image_shape=(1, 16, 16), class_names=("cat",))
    assert chosen.images.shape == (1, 1, 16, 16)
    assert round(float(chosen.images.mean() * 255)) == Image.new("RGB", (1, 1), (200, 30, 90)).convert("L").getpixel(
        (0, 0)
    )


def test_a_run_s_images_are_those_that_it_was_tested_with(digits_run: Path, tmp_path: Path) -> None:
    for split, base in (("train", 50), ("test", 150)):
        _folder(tmp_path / "images" / split, base=base)
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    record = json.loads((run / checkpoint.RUN).read_text())
    record["recipe"]["data"] = {"name": "folder", "root": str(tmp_path / "images"), "size": 16}
    record["input_shape"] = SHAPE
    (run / checkpoint.RUN).write_text(json.dumps(record))
    chosen = images.from_run(run, split="test", count=9, class_names=("cat", "dog"))
    assert chosen.record.description == "folder test images"
    assert set(_levels(chosen)) <= {*range(150, 156), *range(200, 206)}
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="or name a folder of images by --images"):
        images.from_run(run, split="test", count=9, class_names=("cat", "dog"))


def test_a_run_s_labels_are_the_data_set_s(digits_run: Path) -> None:
    chosen = images.from_run(digits_run, split="test", count=600, class_names=tuple("0123456789"))
    assert chosen.labels is not None
    stored = datasets.load("digits", split="test")
    assert [int(name) for name in chosen.names[:3]] != [0, 1, 2]
    np.testing.assert_array_equal(chosen.labels, stored.labels[[int(name) for name in chosen.names]])


def test_noise_is_varied_seeded_and_on_the_grid_of_8_bits() -> None:
    drawn = images.noise(count=32, image_shape=SHAPE)
    assert drawn.record == images.noise(count=32, image_shape=SHAPE).record
    assert drawn.record.seed == images.NOISE_SEED
    assert drawn.record.sha256 != images.noise(count=32, image_shape=SHAPE, seed=1).record.sha256
    assert drawn.images.dtype == np.float32
    assert (drawn.images >= 0).all()
    assert (drawn.images <= 1).all()
    np.testing.assert_allclose(drawn.images * 255, np.round(drawn.images * 255), atol=1e-4)
    contrasts = drawn.images.std(axis=(1, 2, 3))
    assert contrasts.max() > 2 * contrasts.min()
