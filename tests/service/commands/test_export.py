from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from export.engines import open_engine
from service.__main__ import app
from training import checkpoint, datasets

if TYPE_CHECKING:
    from export.repository import Repository


def _tenet(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _place(models: Repository, name: str) -> list[str]:
    return ["--repository", str(models.folder), "--name", name]


@pytest.fixture
def digit_folder(tmp_path: Path) -> Path:
    stored = datasets.load("digits", split="test")
    for index in range(150):
        place = tmp_path / "digits" / stored.class_names[stored.labels[index]]
        place.mkdir(exist_ok=True, parents=True)
        Image.fromarray(stored.images[index]).save(place / f"{index}.png")
    return tmp_path / "digits"


def test_a_run_becomes_an_engine_with_its_proof_in_a_line(digits_run: Path, own_models: Repository) -> None:
    done = _tenet("export", str(digits_run), *_place(own_models, "mine"))
    assert done.exit_code == 0, done.output
    assert re.fullmatch(
        r"mine@1: fp32 on onnxruntime, parity with PyTorch checkpoint passed on 504 digits test images: top-1 "
        r"agreement 100\.00% \[99\.2, 100\.0\], accuracy (\d\d\.\d\d)% and \1%, largest logit difference \d.*\n",
        done.stdout,
    )


def test_a_run_becomes_int8_at_once_by_way_of_the_fp32_engine_that_is_there(
    digits_run: Path, own_models: Repository
) -> None:
    done = _tenet("export", str(digits_run), *_place(own_models, "small"), "--precision", "int8", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source"]["model"] == "digits"
    assert "small-fp32" not in own_models.models()
    options = ["--input", "uint8", "--precision", "fp16"]
    done = _tenet("export", str(digits_run), *_place(own_models, "bytes"), *options)
    assert done.exit_code == 0, done.output
    fp32, half, note = done.stdout.splitlines()
    assert fp32.startswith("bytes-fp32@1: fp32")
    assert half.startswith("bytes@1: fp16")
    assert note.startswith("  with activations in fp16, as on a GPU: agrees with bytes-fp32@1 on ")
    assert own_models.find("bytes").manifest.channels_last


def test_a_failed_proof_is_exit_code_1_with_the_images_that_differ(own_models: Repository) -> None:
    options = ["--precision", "int8", "--calibration", "percentile", "--percentile", "60", "--max-disagreement", "0"]
    done = _tenet("export", "--from", "digits", *_place(own_models, "coarse"), *options)
    assert done.exit_code == 1
    assert "error: coarse: not published, parity with digits@1 failed: top-1 differs on" in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("│")]) == 10
    assert "coarse" not in own_models.models()
    done = _tenet("export", "--from", "digits", *_place(own_models, "coarse"), *options, "--block")
    assert done.exit_code == 0
    assert "parity with digits@1 failed, so it is blocked, on" in done.stdout
    assert not own_models.find("coarse").manifest.servable


def test_a_bisection_proposes_flags_that_make_it_pass(own_models: Repository) -> None:
    options = ["--precision", "int8", "--calibration", "percentile", "--percentile", "97", "--parity-images", "128"]
    options += ["--max-disagreement", "0.03"]
    done = _tenet("export", "--from", "digits", *_place(own_models, "cut"), *options, "--bisect")
    assert done.exit_code == 1, done.output
    flags = re.search(r"kept in fp32: (.*)", done.stdout)
    assert flags is not None, done.stdout
    again = _tenet("export", "--from", "digits", *_place(own_models, "cut"), *options, *flags[1].split())
    assert again.exit_code == 0, again.output


def test_a_plan_is_built_from_the_command_line(own_models: Repository) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = ["--runtime", "tensorrt_rtx", "--profile", "1,4,8", "--compute-capability", "8.9", "--workspace", "256"]
    done = _tenet("export", "--from", "digits", *_place(own_models, "plan"), *plan, "--max-batch", "8")
    assert done.exit_code == 0, done.output
    assert "building the plan: " in done.stdout
    manifest = own_models.find("plan").manifest
    assert manifest.requires.compute_capabilities == ("8.9",)
    assert "--profile 1,4,8 --workspace 256 --compute-capability 8.9" in manifest.build.command


def test_a_network_of_ones_own(own_models: Repository, tmp_path: Path, digit_folder: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(num_classes=10).state_dict(), tmp_path / "squeeze.pt")
    (tmp_path / "labels.txt").write_text("\n".join("0123456789") + "\n")
    own = ["--factory", "torchvision.models:squeezenet1_1", "--weights", str(tmp_path / "squeeze.pt")]
    own += ["--input-shape", "3,32,32", "--labels", str(tmp_path / "labels.txt"), "--mean", "0.5,0.5,0.5"]
    done = _tenet("export", *own, *_place(own_models, "squeeze"), "--images", str(digit_folder))
    assert done.exit_code == 0, done.output
    assert "parity with PyTorch network passed on 150 images of digits" in done.stdout
    assert own_models.find("squeeze").manifest.class_names == tuple("0123456789")


def test_anybody_s_onnx(digits_run: Path, own_models: Repository, tmp_path: Path, digit_folder: Path) -> None:
    path = tmp_path / "theirs.onnx"
    _as_a_stranger(digits_run, path)
    meaning = ["--layout", "NHWC", "--channels", "BGR", "--range", "255", "--labels", "0,1,2,3,4,5,6,7,8,9"]
    done = _tenet("import", str(path), *_place(own_models, "theirs"), *meaning, "--images", str(digit_folder))
    assert done.exit_code == 0, done.output
    assert "theirs@1: fp32 on onnxruntime, parity with theirs.onnx passed on 150 images of digits" in done.stdout
    proof = own_models.find("theirs").manifest.parity
    assert proof.accuracy is not None
    assert proof.accuracy > 0.9
    names = ", ".join(f'"{digit}"' for digit in range(10))
    (tmp_path / "mapping.toml").write_text(f'layout = "NHWC"\nchannels = "RGB"\nrange = 255\nlabels = [{names}]\n')
    by_file = ["--mapping", str(tmp_path / "mapping.toml"), "--channels", "BGR"]
    done = _tenet("import", str(path), *_place(own_models, "same"), *by_file)
    assert done.exit_code == 0, done.output
    images = np.random.default_rng(0).random((5, 3, 32, 32), dtype=np.float32)
    answers = []
    for name in ("theirs", "same"):
        with open_engine(own_models.find(name).folder) as engine:
            answers.append(engine.classify(images))
    np.testing.assert_array_equal(answers[0], answers[1])


def test_the_command_in_a_manifest_makes_the_same_engine_again(
    digits_run: Path, own_models: Repository, tmp_path: Path, digit_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_a_stranger(digits_run, tmp_path / "theirs.onnx")
    monkeypatch.chdir(tmp_path)
    meaning = ["--layout", "NHWC", "--channels", "BGR", "--range", "255", "--labels", "0,1,2,3,4,5,6,7,8,9"]
    proof = ["--images", str(digit_folder), "--parity-images", "60", "--max-disagreement", "0.2"]
    made = [
        ["import", "theirs.onnx", *_place(own_models, "theirs"), *meaning, *proof, "--max-batch", "8"],
        ["export", "--from", "theirs", *_place(own_models, "small"), *proof, "--precision", "int8",
         "--calibration", "entropy", "--calibration-images", "30"],
    ]  # fmt: skip
    for arguments in made:
        assert _tenet(*arguments).exit_code == 0
    for name in ("theirs", "small"):
        first = own_models.find(name).manifest
        verb = shlex.split(first.build.command.replace("REPOSITORY", str(own_models.folder)))[1:]
        assert _tenet(*verb).exit_code == 0, verb
        again = own_models.find(name).manifest
        assert (again.version, again.sha256) == (2, first.sha256)
        assert again.parity == first.parity
        assert again.build.command.replace("theirs@2", "theirs@1") == first.build.command


def test_what_is_printed_as_json_is_json(own_models: Repository) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = ["--runtime", "tensorrt_rtx", "--json"]
    assert json.loads(_tenet("export", "--from", "digits", *_place(own_models, "p"), *plan).stdout)["model"] == "p"
    bad = ["--precision", "int8", "--calibration", "percentile", "--percentile", "60", "--max-disagreement", "0"]
    failed = _tenet("export", "--from", "digits", *_place(own_models, "b"), *bad, "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["status"] == "failed"


def _as_a_stranger(run: Path, path: Path) -> None:
    """Write the digits' classifier for images of 0 to 255, channels last and BGR."""

    class Stranger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = checkpoint.load(run).model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            answers: torch.Tensor = self.inner(pixels.permute(0, 3, 1, 2)[:, [2, 1, 0]] / 255)
            return answers

    program = torch.onnx.export(
        Stranger().eval(), (torch.zeros(2, 32, 32, 3),), dynamo=True, verbose=False,
        input_names=["pixels"], output_names=["scores"], dynamic_shapes=({0: torch.export.Dim("n")},),
    )  # fmt: skip
    assert program is not None
    onnx.save(program.model_proto, path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["export", "run", "--from", "digits"], "got a RUN folder and --from NAME; give one alone"),
        (["export", "--from", "digits", "--labels", "a,b"], "--labels: has an effect with --factory alone"),
        (["export", "--from", "digits", "--resize", "40"], "--resize: has an effect with --factory alone"),
        (["export", "--from", "digits", "--input", "uint8"], "--input: has an effect with a RUN folder or --factory"),
        (["export", "--from", "digits", "--profile", "1,2,3"], "--profile: has an effect with --runtime tensorrt"),
        (
            ["export", "--from", "digits", "--keep-fp32", "n"],
            "--keep-fp32: has an effect with --precision fp16 or int8",
        ),
        (["export", "--from", "digits", "--target", "cpu"], "--target: has an effect with --precision int8"),
        (["export", "--factory", "a:b"], "--factory: expected --weights FILE with it"),
        (["export", "--factory", "a:b", "--weights", "w", "--input-shape", "3,x", "--labels", "a,b"], "whole numbers"),
        (["export", "--factory", "a:b", "--weights", "w", "--input-shape", "3,9", "--labels", "a,b"], "got '3,9'"),
        (
            ["export", "--factory", "a:b", "--weights", "w", "--input-shape", "3,8,8", "--labels", "a,a"],
            "'a' more than",
        ),
        (["export", "--factory", "ab", "--weights", "w", "--input-shape", "3,8,8", "--labels", "a,b"], "--factory: "),
        (["export", "--from", "digits", "--precision", "int8", "--max-disagreement", "2"], "from 0 to 1, got 2.0"),
        (["export", "--from", "digits@prod", "--precision", "int8"], "prod"),
        (["import", "none.onnx", "--labels", "a,b"], "none.onnx"),
        (["import", "none.onnx", "--mean", "a"], "--mean: expected numbers with commas between them, got 'a'"),
        (["import", "none.onnx", "--std", "0"], "--std: expected numbers above 0"),
        (
            ["import", "none.onnx", "--mapping", "none.toml"],
            "none.toml: expected a mapping in TOML here, found no file",
        ),
    ],
)
def test_bad_input_is_one_line(own_models: Repository, arguments: list[str], complaint: str) -> None:
    done = _tenet(*arguments, *_place(own_models, "x"))
    assert isinstance(done.exception, (ValueError, FileNotFoundError)), done.output
    assert complaint in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (own_models.folder / "x").exists()
