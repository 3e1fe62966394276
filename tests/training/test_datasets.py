from __future__ import annotations

import hashlib
import http.server
import pickle
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from training import archives, data, datasets
from training.archives import Archive
from training.recipe import Data

if TYPE_CHECKING:
    from collections.abc import Iterator

WNIDS = ("n02124075", "n01443537")  # in the order of the list, which is not sorted
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross")


@pytest.fixture(scope="module")
def digits() -> tuple[data.LabelledImages, data.LabelledImages]:
    return datasets.load("digits", split="train"), datasets.load("digits", split="test")


def test_digits_are_images_of_ten_classes(digits: tuple[data.LabelledImages, data.LabelledImages]) -> None:
    train, test = digits
    assert len(train) + len(test) == 1797
    assert 0.25 < len(test) / 1797 < 0.30
    assert train.class_names == tuple("0123456789")
    for part in digits:
        assert part.images.shape[1:] == (32, 32, 3)
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert (part.images[..., 0] == part.images[..., 2]).all()
        assert int(part.images.max()) > 200


def test_digits_are_split_by_class_and_without_overlap(
    digits: tuple[data.LabelledImages, data.LabelledImages],
) -> None:
    train, test = digits
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert (abs(shares - 0.28) < 0.01).all()
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_digits_are_the_same_each_time(digits: tuple[data.LabelledImages, data.LabelledImages]) -> None:
    again = datasets.load("digits", split="test")
    assert (again.images == digits[1].images).all()
    assert (again.labels == digits[1].labels).all()


def test_a_folder_is_loaded_by_class(colours: Path) -> None:
    loaded = datasets.load("folder", split="train", root=colours)
    assert loaded.class_names == ("blue", "green", "red")
    assert loaded.images.shape == (48, 12, 12, 3)
    for label, channel in enumerate((2, 1, 0)):
        assert loaded.images[loaded.labels == label].mean((0, 1, 2)).argmax() == channel


def grey(path: Path, level: int, *, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path, format="JPEG")


def level(image: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    return round(float(image.mean()))


def save_cifar(folder: Path, file: str, **contents: object) -> list[str]:
    """Write a pickled batch as published, and return what torchvision lists of it: its name and md5."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps(contents))
    return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]


def cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, published: type, folder: str, labels: str, names: str
) -> None:
    """Write a small data set in the published layout, and let torchvision take it for the published one."""

    def batch(file: str, *numbers: int) -> list[str]:
        pixels = np.stack([np.full(3072, number, np.uint8) for number in numbers])
        pixels[:, :1024] = 255  # the red plane comes first
        return save_cifar(root / folder, file, data=pixels, **{labels: list(numbers)})

    monkeypatch.setattr(published, "train_list", [batch("data_batch_1", 0, 1), batch("data_batch_2", 2, 1)])
    monkeypatch.setattr(published, "test_list", [batch("test_batch", 2)])
    file, md5 = save_cifar(root / folder, "batches.meta", **{names: ["cat", "dog", "owl"]})
    monkeypatch.setattr(published, "meta", {"filename": file, "key": names, "md5": md5})


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    published = torchvision.datasets.CIFAR10
    cifar(
        tmp_path, monkeypatch, published=published, folder="cifar-10-batches-py", labels="labels", names="label_names"
    )
    return tmp_path


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    published = torchvision.datasets.CIFAR100
    names = "fine_label_names"
    cifar(tmp_path, monkeypatch, published=published, folder="cifar-100-python", labels="fine_labels", names=names)
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_published(name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(name)
    train, test = (datasets.load(name, split=split, root=root) for split in datasets.SPLITS)
    assert train.images.shape == (4, 32, 32, 3)
    assert train.labels.tolist() == [0, 1, 2, 1]
    assert train.class_names == test.class_names == ("cat", "dog", "owl")
    assert test.labels.tolist() == [2]
    assert test.images[0, 5, 7].tolist() == [255, 2, 2]


def test_cifar_files_that_are_not_the_published_ones_are_never_unpickled(cifar10: Path) -> None:
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py: expected the published files, .* remove .* fetch it"):
        datasets.load("cifar10", split="test", root=cifar10)


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        for index in range(3):
            grey(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", 100 * number + 10 * index)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    for index in range(2):
        grey(folder / "val" / "images" / f"val_{index}.JPEG", 200 + index)
    rows = [f"val_{index}.JPEG\t{WNIDS[1 - index]}\t0\t0\t62\t62\n" for index in range(2)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    return tmp_path


def test_tiny_imagenet_is_found_as_published(tiny_imagenet: Path) -> None:
    train = datasets.load("tiny-imagenet", split="train", root=tiny_imagenet)
    assert train.images.shape == (6, 64, 64, 3)
    assert train.class_names == ("n01443537", "n02124075")
    assert [level(image) for image in train.images] == [100, 110, 120, 0, 10, 20]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    test = datasets.load("tiny-imagenet", split="test", root=tiny_imagenet)
    assert [level(image) for image in test.images] == [200, 201]
    assert test.labels.tolist() == [0, 1]
    assert test.class_names == train.class_names


def test_a_part_of_tiny_imagenet_that_is_missing_or_another_is_named(tiny_imagenet: Path) -> None:
    folder = tiny_imagenet / "tiny-imagenet-200"
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn99\t0\t0\t62\t62\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: expected ids of wnids\.txt, got n99; remove"):
        datasets.find("tiny-imagenet", split="test", root=tiny_imagenet)
    annotations.write_text("val_0.JPEG\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: expected lines of FILE WNID"):
        datasets.find("tiny-imagenet", split="test", root=tiny_imagenet)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt: no such file; expected it as published"):
        datasets.find("tiny-imagenet", split="test", root=tiny_imagenet)
    shutil.rmtree(folder / "train" / WNIDS[0])
    with pytest.raises(FileNotFoundError, match=rf"{WNIDS[0]}/images: expected images"):
        datasets.find("tiny-imagenet", split="train", root=tiny_imagenet)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    folder = tmp_path / "CUB_200_2011"
    lists: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    for index in range(10):
        bird, training = index % 2, int(index < 6)
        path = f"{BIRDS[bird]}/photo_{index}.jpg"
        grey(folder / "images" / path, 20 * index, size=(30 + index, 20))
        for name, word in zip(lists, (path, bird + 1, training), strict=True):
            lists[name].append(f"{index + 1} {word}\n")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "classes.txt").write_text("".join(f"{number + 1} {bird}\n" for number, bird in enumerate(BIRDS)))
    return tmp_path


def test_cub_is_found_as_published(cub: Path) -> None:
    train = datasets.load("cub-200-2011", split="train", root=cub, size=16)
    assert train.images.shape == (6, 16, 16, 3)
    assert train.class_names == BIRDS
    assert [level(image) for image in train.images] == [0, 20, 40, 60, 80, 100]
    assert train.labels.tolist() == [0, 1] * 3
    test = datasets.load("cub-200-2011", split="test", root=cub, size=16)
    assert [level(image) for image in test.images] == [120, 140, 160, 180]
    assert test.class_names == BIRDS


def test_photographs_need_a_size(cub: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected 30 x 20 pixels like .*, got 31 x 20; resize it, or give data\.size"
    ):
        datasets.load("cub-200-2011", split="train", root=cub)
    with pytest.raises(ValueError, match=r"give data\.size"):
        datasets.parts(Data(name="cub-200-2011", root=str(cub)), seed=0)


def test_lists_of_cub_that_differ_are_refused(cub: Path) -> None:
    (cub / "CUB_200_2011" / "train_test_split.txt").write_text("1 1\n2 0\n")
    with pytest.raises(ValueError, match="CUB_200_2011: expected lists of the same images and classes"):
        datasets.find("cub-200-2011", split="train", root=cub)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("tiny-imagenet", "tiny-imagenet-200"),
        ("cub-200-2011", "CUB_200_2011"),
    ],
)
def test_published_data_that_are_missing_say_where_to_put_them(name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"{folder}: no such folder; give data\.download = true .* http"
    ) as got:
        datasets.load(name, split="test", root=tmp_path)
    assert "\n" not in str(got.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"root: expected the folder that holds, .* {folder}, got none; give data\.r"):
        datasets.load(name, split="test")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in tmp_path/served."""
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, archive: Archive) -> None:
    """Let Tiny-ImageNet come from another address."""
    monkeypatch.setattr(archives, "TINY_IMAGENET", archive)
    monkeypatch.setitem(datasets.LOADERS, "tiny-imagenet", datasets.Loader(archives.tiny_imagenet, "root", archive))


def test_data_with_a_public_address_are_downloaded_once(
    tiny_imagenet: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(shutil.make_archive(str(tmp_path / "served" / "tiny"), "zip", tiny_imagenet, "tiny-imagenet-200"))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    publish(monkeypatch, Archive(f"{address}/tiny.zip", md5, "tiny-imagenet-200"))
    settings = Data(name="tiny-imagenet", root=str(tmp_path / "new" / "data"), download=True)
    parts = datasets.parts(settings, seed=0)
    assert {name: len(images) for name, images in parts.items()} == {"training": 4, "validation": 2, "test": 2}
    file.unlink()
    assert len(datasets.parts(settings, seed=0)) == 3
    assert [path.name for path in (tmp_path / "new" / "data").glob("[!.]*")] == ["tiny-imagenet-200"]


def test_a_download_that_fails_is_one_line_and_leaves_no_folder(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / "other.zip").write_bytes(b"something else")
    for url, reason in (
        ("http://127.0.0.1:9/tiny.zip", "refused"),
        (f"{address}/none.zip", "404"),
        (f"{address}/other.zip", "corrupted"),
    ):
        publish(monkeypatch, Archive(url, "0" * 32, "tiny-imagenet-200"))
        with pytest.raises(OSError, match=f"{url}: the download into .* failed: .*{reason}.*; try again, or") as got:
            datasets.find("tiny-imagenet", split="train", root=tmp_path / "data", download=True)
        assert "\n" not in str(got.value)
        assert not (tmp_path / "data" / "tiny-imagenet-200").exists()


def test_what_is_not_there_is_named_with_the_way_out(tmp_path: Path, colours: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of digits, folder, npz, cifar10, .* got 'cifar'"):
        datasets.load("cifar", split="train")
    with pytest.raises(ValueError, match="expected one of train, test, got 'val'"):
        datasets.load("digits", split="val")
    with pytest.raises(ValueError, match=r"give data\.root"):
        datasets.load("folder", split="train")
    with pytest.raises(ValueError, match="leave it out"):
        datasets.load("digits", split="train", root=colours)
    with pytest.raises(ValueError, match='download: expected false, as "folder" has no public address'):
        datasets.load("folder", split="train", root=colours, download=True)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; expected it to hold train/CLASS"):
        datasets.load("folder", split="train", root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train: no such folder"):
        datasets.load("folder", split="train", root=tmp_path)


def contents(images: data.Images) -> set[bytes]:
    return {image.tobytes() for image in images.read().images}


def test_what_is_validated_with_is_held_out_by_class(colours: Path) -> None:
    parts = datasets.parts(Data(name="folder", root=str(colours), validation=0.25), seed=3)
    whole, test = (datasets.load("folder", split=split, root=colours) for split in datasets.SPLITS)
    assert list(parts) == ["training", "validation", "test"]
    assert all(isinstance(images, data.LabelledImages) for images in parts.values())
    assert np.bincount(parts["validation"].labels).tolist() == [4, 4, 4]
    assert not contents(parts["training"]) & contents(parts["validation"])
    assert contents(parts["training"]) | contents(parts["validation"]) == contents(whole)
    assert contents(parts["test"]) == contents(test)


def test_parts_are_drawn_by_the_seed(colours: Path) -> None:
    settings = Data(name="folder", root=str(colours), per_class=8)
    first, again, other = (datasets.parts(settings, seed=seed)["validation"].fingerprint() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_few_images_of_each_class_are_to_train_and_validate_with(colours: Path) -> None:
    parts = datasets.parts(Data(name="folder", root=str(colours), validation=0.25, per_class=8), seed=0)
    assert np.bincount(parts["training"].labels).tolist() == [6, 6, 6]
    assert np.bincount(parts["validation"].labels).tolist() == [2, 2, 2]
    assert len(parts["test"]) == 15
    with pytest.raises(ValueError, match=r"data\.per_class: expected at most the 16 images of class 'blue', got 17"):
        datasets.parts(Data(name="folder", root=str(colours), per_class=17), seed=0)


def test_with_a_size_images_stay_in_files(colours: Path, cub: Path) -> None:
    for root, name in ((colours, "folder"), (cub, "cub-200-2011")):
        parts = datasets.parts(Data.model_validate({"name": name, "root": str(root), "size": 8}), seed=0)
        assert all(isinstance(images, data.ImageFiles) for images in parts.values())
    with pytest.raises(ValueError, match=r"data\.size: expected none, .* 32 x 32 pixels, got 8"):
        datasets.parts(Data(name="digits", size=8), seed=0)


def test_splits_that_are_not_alike_are_refused(colours: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "colours"))
    settings = Data(name="folder", root=str(root))
    for path in (root / "test").glob("*/*.png"):
        Image.new("RGB", (12, 10)).save(path)
    with pytest.raises(ValueError, match=r"data\.root: .* \(12, 12, 3\), in the test split, got \(10, 12, 3\)"):
        datasets.parts(settings, seed=0)
    assert len(datasets.parts(settings.model_copy(update={"size": 8}), seed=0)["test"]) == 15
    (root / "test" / "red").rename(root / "test" / "reed")
    with pytest.raises(ValueError, match=r"data\.root: expected the classes .*'red'.* got .*'reed'"):
        datasets.parts(settings, seed=0)


def test_one_image_of_each_class_cannot_be_split(tmp_path: Path) -> None:
    for split in datasets.SPLITS:
        for name in "ab":
            grey(tmp_path / split / name / "1.jpg", 100)
    with pytest.raises(ValueError, match="expected a class with an image to validate with, got 2 images"):
        datasets.parts(Data(name="folder", root=str(tmp_path)), seed=0)
