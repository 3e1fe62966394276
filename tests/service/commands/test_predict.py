"""`tenet predict` against a real server: the same answer from every form that a model may have."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from service import __main__ as command_line
from tests.service.client.answering import Answering
from tests.service.client.answering import serving as answering_server

if TYPE_CHECKING:
    from pathlib import Path

    from protos.inference import open_inference_pb2 as pb
    from service.server import Serving


@pytest.fixture
def answering() -> Answering:
    return Answering()  # type: ignore[abstract]  # what it does not implement, nobody asks


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    # Of the model's own size, so that nothing is resized.
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return path


def predicted(serving: Serving, *arguments: str) -> Any:
    result = CliRunner().invoke(command_line.app, ["predict", *arguments, "--server", serving.address, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_models_of_one_network_predict_the_same_whatever_they_take_and_answer(
    serving: Serving, picture: Path, weights: Any
) -> None:
    logits = (np.asarray(Image.open(picture), np.float32).transpose(2, 0, 1).ravel() / 255) @ weights(0)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    names = ("plane", "car", "bird", "cat", "deer")
    for model in (["linear", "--version", "1"], ["stored"], ["shares"]):
        (found,) = predicted(serving, str(picture), "--model", *model)
        assert found["class"] == names[shares.argmax()]
        assert found["probability"] == pytest.approx(shares.max(), rel=1e-4)


def test_several_images_are_resized_and_answered_in_their_order(
    serving: Serving, picture: Path, tmp_path: Path
) -> None:
    Image.open(picture).resize((40, 30)).save(tmp_path / "large.png")
    found = predicted(serving, str(picture), str(tmp_path / "large.png"), "--model", "stored")
    assert [each["image"] for each in found] == [str(picture), str(tmp_path / "large.png")]


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tiff", ".ppm"])
def test_other_formats_than_servers_decode_are_converted(
    serving: Serving, picture: Path, tmp_path: Path, suffix: str
) -> None:
    other = tmp_path / f"other{suffix}"
    with Image.open(picture) as image:
        image.save(other)
    with Image.open(other) as image:
        image.convert("RGB").save(tmp_path / "same.png")
    found, same = predicted(serving, str(other), str(tmp_path / "same.png"), "--model", "linear")
    assert (found["class"], found["probability"]) == (same["class"], same["probability"])


@pytest.mark.parametrize("suffix", [".tiff", ".pgm"])
def test_sixteen_bits_are_those_of_the_same_image_as_png(serving: Serving, tmp_path: Path, suffix: str) -> None:
    grey = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    for name in ("deep.png", f"deep{suffix}"):
        Image.fromarray(grey).save(tmp_path / name)
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    names = [f"deep{suffix}", "deep.png", "flat.png"]
    found = predicted(serving, *(str(tmp_path / name) for name in names), "--model", "linear")
    assert found[0]["probability"] == found[1]["probability"] == found[2]["probability"]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_an_image_of_which_nobody_knows_what_is_white_is_refused(
    serving: Serving, tmp_path: Path, dtype: type[np.generic]
) -> None:
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.ones((4, 4), dtype)).save(path)
    assert refusal(serving, path).endswith("it has 32 bits a channel; save it with 8 or 16")


def test_a_tiff_that_was_held_sideways_is_turned_once(serving: Serving, picture: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(picture) as image:
        image.rotate(90, expand=True).save(tmp_path / "sideways.tiff", exif=exif)
    upright, sideways = predicted(serving, str(picture), str(tmp_path / "sideways.tiff"), "--model", "linear")
    assert sideways["probability"] == upright["probability"]


def test_a_photograph_is_seen_upright(serving: Serving, picture: Path, tmp_path: Path) -> None:
    """A camera that was held sideways stores the image so, and says it in EXIF."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(picture).rotate(90, expand=True).save(tmp_path / "sideways.png", exif=exif)
    upright, sideways = predicted(serving, str(picture), str(tmp_path / "sideways.png"), "--model", "linear")
    assert sideways["probability"] == pytest.approx(upright["probability"], rel=1e-4)
    assert sideways["class"] == upright["class"]


def test_a_folder_is_its_images_by_name(serving: Serving, picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    (folder / "below").mkdir(parents=True)
    names = ["b.png", "a.PNG", "below/c.png"]
    for name in names:
        (folder / name).write_bytes(picture.read_bytes())
    (folder / "notes.txt").write_text("no image")
    found = predicted(serving, str(folder), "--model", "linear")
    assert [each["image"] for each in found] == [str(folder / name) for name in sorted(names)]


def test_the_most_probable_classes_come_first(serving: Serving, picture: Path) -> None:
    (found,) = predicted(serving, str(picture), "--model", "linear", "--top", "3")
    shares = [each["probability"] for each in found["top"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert found["top"][0] == {"class": found["class"], "probability": found["probability"]}


def test_the_table_has_a_row_for_each_class(serving: Serving, picture: Path) -> None:
    arguments = ["predict", str(picture), "--model", "linear", "--top", "2", "--server", serving.address]
    result = CliRunner().invoke(command_line.app, arguments)
    assert result.exit_code == 0, result.output
    assert sum("%" in line for line in result.stdout.splitlines()) == 2
    assert result.stdout.count("a.png") == 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff broken"])
def test_the_file_that_is_no_image_is_named(serving: Serving, picture: Path, tmp_path: Path, content: bytes) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(content)
    arguments = ["predict", str(picture), str(broken), "--model", "linear", "--server", serving.address]
    result = CliRunner().invoke(command_line.app, arguments)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith(f"{broken}: expected ")


def refusal(serving: Serving, *paths: Path) -> str:
    arguments = ["predict", *map(str, paths), "--model", "linear", "--server", serving.address]
    result = CliRunner().invoke(command_line.app, arguments)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith(f"{paths[-1]}: expected a whole image, got one that cannot be decoded: ")
    return str(result.exception)


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tiff"])
def test_the_file_that_is_cut_off_is_named(serving: Serving, picture: Path, tmp_path: Path, suffix: str) -> None:
    cut = tmp_path / f"cut{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(cut, compression="tiff_lzw" if suffix == ".tiff" else None)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    refusal(serving, picture, cut)


def test_a_file_that_says_it_is_enormous_is_named(serving: Serving, picture: Path, tmp_path: Path) -> None:
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    bomb = tmp_path / "bomb.bmp"
    bomb.write_bytes(header + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0))
    refusal(serving, picture, bomb)


class Broken(Answering):
    """Answers with what is no number."""

    def _answer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        response = super()._answer(request, context)
        response.raw_output_contents[0] = np.full(3, np.nan, "<f4").tobytes()
        return response


def test_a_model_that_answers_no_numbers_is_json_all_the_same(picture: Path) -> None:
    with answering_server(Broken()) as address:  # type: ignore[abstract]
        arguments = ["predict", str(picture), "--model", "m", "--server", address, "--json", "--top", "2"]
        result = CliRunner().invoke(command_line.app, arguments)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout, parse_constant=pytest.fail)
    assert [each["probability"] for each in found["top"]] == [None, None]


def test_a_folder_without_images_is_named(serving: Serving, tmp_path: Path) -> None:
    arguments = ["predict", str(tmp_path), "--model", "linear", "--server", serving.address]
    result = CliRunner().invoke(command_line.app, arguments)
    assert str(result.exception).startswith(f"{tmp_path}: expected a folder with images, found none")


def test_a_server_that_does_not_decode_is_sent_arrays(answering: Answering, picture: Path) -> None:
    with answering_server(answering) as address:
        arguments = ["predict", str(picture), str(picture), "--model", "m", "--server", address, "--json"]
        result = CliRunner().invoke(command_line.app, arguments)
    assert result.exit_code == 0, result.output
    assert [each["class"] for each in json.loads(result.stdout)] == ["a", "a"]
    (request,) = answering.requests
    assert (request.inputs[0].datatype, list(request.inputs[0].shape)) == ("FP32", [2, 3, 2, 2])
