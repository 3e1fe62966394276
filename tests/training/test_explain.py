from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from training import checkpoint, explain, grad_cam, models, recipe

if TYPE_CHECKING:
    from pathlib import Path

    from training.explain import Pictures

CLASSES = ("blue", "green", "red")


def make_run(
    folder: Path, *, seed: int = 0, classes: tuple[str, ...] = CLASSES, size: int = 12, tenet: bool = False
) -> Path:
    """Make a RUN folder of an untrained network."""
    document: dict[str, Any] = {
        "data": {"name": "digits"},
        "model": {"depth": 8, "width": 4},
        "training": {"epochs": 1},
    }
    decoded = recipe.decode(document | ({"tenet": {"stage": "layer2"}} if tenet else {}), source="recipe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(decoded.model, classes=len(classes))
    checkpoint.finish(
        folder.with_name(f"{folder.name}.partial"),
        out=folder,
        model=model,
        recipe=decoded,
        class_names=classes,
        input_shape=(3, size, size),
        data={},
        metrics={},
    )
    return folder


def save(path: Path, *, size: tuple[int, int] = (12, 12), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def read(folder: Path, *, count: int = 8, size: tuple[int, int] = (12, 12)) -> Pictures:
    return explain.read(folder, size=size, class_names=CLASSES, count=count)


def test_two_runs_are_compared_on_the_same_images(colours: Path, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "plain"), make_run(tmp_path / "tenet", seed=1, tenet=True)]
    record = explain.compare(runs, images=colours / "test", out=tmp_path / "out", count=4)
    assert json.loads((tmp_path / "out" / "explain.json").read_text()) == record
    assert [(run["run"], run["tenet"], run["layer"]) for run in record["runs"]] == [
        ("plain", False, "layer3"),
        ("tenet", True, "layer3"),
    ]
    assert [image["file"] for image in record["images"]] == ["blue/0.png", "blue/3.png", "green/2.png", "red/1.png"]
    assert [image["true_class"] for image in record["images"]] == ["blue", "blue", "green", "red"]
    with Image.open(tmp_path / "out" / "explain.png") as picture:
        assert picture.height > picture.width


def test_predictions_and_spreads_are_the_models_own(colours: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    record = explain.compare([run], images=colours / "test", out=tmp_path / "out", layer="layer2", count=15)
    model, images = checkpoint.load(run).model, read(colours / "test", count=15).images
    probabilities, classes = model(images).softmax(1).max(1)
    spreads = grad_cam.spread(grad_cam.grad_cam(model, images, classes, layer="layer2"))
    found = [image["predictions"][0] for image in record["images"]]
    assert [prediction["class"] for prediction in found] == [CLASSES[index] for index in classes.tolist()]
    assert [prediction["probability"] for prediction in found] == pytest.approx(probabilities.tolist(), rel=1e-4)
    assert [prediction["spread"] for prediction in found] == pytest.approx(spreads.tolist(), abs=0.01)
    (summary,) = record["runs"]
    assert summary["n"] == 15
    assert summary["mean_spread"] == pytest.approx(np.mean([prediction["spread"] for prediction in found]))
    expected = np.std([prediction["spread"] for prediction in found], ddof=1) / np.sqrt(15)
    assert summary["standard_error"] == pytest.approx(expected, rel=1e-4)


def test_one_image_has_no_standard_error(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    record = explain.compare([make_run(tmp_path / "run")], images=tmp_path / "images", out=tmp_path / "out")
    assert record["runs"][0]["standard_error"] is None


def test_batches_do_not_show(tmp_path: Path) -> None:
    model = checkpoint.load(make_run(tmp_path / "run")).model
    images = torch.rand(explain.BATCH + 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = explain.explain(model, images)
    last = explain.explain(model, images[-2:])
    assert len(whole.maps) == len(images)
    torch.testing.assert_close(whole.maps[-2:], last.maps, atol=1e-4, rtol=1e-3)
    assert torch.equal(whole.classes[-2:], last.classes)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", seed=1)]
    save(tmp_path / "images" / "a.png")
    record = explain.compare(runs, images=tmp_path / "images", out=tmp_path / "out")
    assert [run["run"] for run in record["runs"]] == [str(run) for run in runs]


def test_runs_of_other_classes_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", classes=("blue", "red"))]
    with pytest.raises(ValueError, match=r"b: expected the classes of .*a \(blue, green, red\), got blue, red$"):
        explain.compare(runs, images=tmp_path, out=tmp_path / "out")


def test_runs_of_other_input_sizes_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", size=16)]
    with pytest.raises(ValueError, match=r"b: expected an input of 12 x 12 pixels as of .*a, got 16 x 16 pixels$"):
        explain.compare(runs, images=tmp_path, out=tmp_path / "out")


def test_an_unknown_layer_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"layer1, layer2\.0, layer2, layer3\.0, layer3\), got 'layer9'"):
        explain.compare([run], images=tmp_path / "images", out=tmp_path / "out", layer="layer9")
    assert not (tmp_path / "out").exists()


def test_a_file_is_not_written_over_as_a_folder(tmp_path: Path) -> None:
    out = save(tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"out\.png: expected a folder to write, got a file"):
        explain.compare([make_run(tmp_path / "run")], images=tmp_path, out=out)


def test_a_model_without_maps_is_told() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(ValueError, match="model: expected one with maps of more than one pixel, got Sequential"):
        explain.explain(model, torch.rand(2, 3, 8, 8))


def test_a_flat_folder_tells_no_classes(tmp_path: Path) -> None:
    for index, name in enumerate(["b.PNG", "a.jpg", ".hidden.png"]):
        save(tmp_path / name, seed=index)
    (tmp_path / "notes.txt").write_text("no image")
    pictures = read(tmp_path)
    assert pictures.files == ("a.jpg", "b.PNG")
    assert pictures.true_classes == (None, None)


def test_images_are_read_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    (image,) = read(tmp_path).images
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_other_sizes_are_scaled_and_cropped_at_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((24, 72, 3), dtype=np.uint8)
    pixels[:, 22:50] = 255  # the middle third, and what scaling mixes into it, is white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (image,) = read(tmp_path).images
    assert image.shape == (3, 12, 12)
    assert torch.equal(image, torch.ones(3, 12, 12))


def test_a_size_that_is_not_square_is_height_by_width(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert read(tmp_path, size=(6, 10)).images.shape == (1, 3, 6, 10)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
def test_images_are_evenly_spaced(count: int, colours: Path) -> None:
    files = read(colours / "test", count=count).files
    assert len({*files}) == len(files) == min(count, 15)
    if count >= 3:
        assert {file.split("/")[0] for file in files} == {*CLASSES}


def test_a_folder_of_no_class_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "yellow" / "a.png")
    complaint = r"yellow: expected a folder named after a class of the run \(blue, green, red\), got 'yellow'$"
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path)


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "blue").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected images \(\.jpeg, \.jpg, \.png\), .*, got none$"):
        read(tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png: expected a PNG or JPEG image"):
        read(tmp_path)
