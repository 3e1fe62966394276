from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from export import manifest as manifests
from export import onnx_graph, parity, precision, publish, twin
from export.engines import open_engine
from export.manifest import Preprocessing
from export.mapping import Mapping
from export.parity import ParityFailed
from export.publish import Form, Terms
from export.variant import Variant, publish_variant
from training import augment, checkpoint, datasets

if TYPE_CHECKING:
    from export.engines.base import Images
    from export.repository import Repository


def _digits(count: int) -> Images:
    return augment.unit_range(torch.from_numpy(datasets.load("digits", split="test").images[:count])).numpy()


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the digits' test images, as a folder of class folders."""
    folder: Path = tmp_path_factory.mktemp("digits")
    stored = datasets.load("digits", split="test")
    for index in range(120):
        place = folder / stored.class_names[stored.labels[index]]
        place.mkdir(exist_ok=True)
        Image.fromarray(stored.images[index]).save(place / f"{index}.png")
    return folder


def test_the_engine_answers_as_the_checkpoint(digits_models: Repository, digits_run: Path) -> None:
    images = _digits(100)
    with open_engine(digits_models.find("digits").folder) as engine, torch.inference_mode():
        expected = checkpoint.load(digits_run).model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(engine.classify(images), expected, atol=1e-4)
        for batch in (1, 7, 64):
            np.testing.assert_allclose(parity.batched(engine, images, batch=batch), expected, atol=1e-4)


def test_the_manifest_carries_the_proof(digits_models: Repository) -> None:
    proof = digits_models.find("digits").manifest.parity
    assert (proof.status, proof.agreement, proof.reference) == ("passed", 1.0, "PyTorch checkpoint")
    assert proof.images is not None
    assert (proof.images.n, proof.images.description, proof.images.seed) == (504, "digits test images", None)
    assert proof.accuracy == proof.reference_accuracy
    assert proof.accuracy is not None
    assert proof.accuracy > 0.9
    assert len(proof.worst) == 10
    assert proof.worst[0].label in set("0123456789")
    assert proof.machine


def test_the_manifest_says_where_the_engine_comes_from(digits_models: Repository, digits_run: Path) -> None:
    manifest = digits_models.find("digits").manifest
    record = json.loads((digits_run / checkpoint.RUN).read_text())
    provenance = manifest.provenance
    assert provenance is not None
    assert (provenance.kind, provenance.sha256) == ("run", record["sha256"])
    assert provenance.recipe == record["recipe"]
    assert provenance.data == record["data"]
    assert provenance.commit == record["commit"]
    assert manifest.requires.runtime.startswith(">=1.")
    assert manifest.build.command == "tenet export digits --repository REPOSITORY --name digits"
    assert set(manifest.files) == {"checkpoint/weights.safetensors", "checkpoint/run.json"}
    assert digits_models.find("digits-int8").manifest.provenance == provenance


def test_the_onnx_file_holds_no_path_and_is_the_same_every_time(
    digits_models: Repository, digits_run: Path, tmp_path: Path
) -> None:
    published = (digits_models.find("digits").folder / "model.onnx").read_bytes()
    trained = checkpoint.load(digits_run)
    again = tmp_path / "again.onnx"
    onnx_graph.onnx_from_module(trained.model, again, image_shape=trained.input_shape, class_names=trained.class_names)
    assert again.read_bytes() == published
    assert not re.search(rb"site-packages|\.py\b|" + str(Path.cwd()).encode(), published)


def test_an_engine_for_bytes_that_gives_probabilities(digits_run: Path, own_models: Repository) -> None:
    version = publish.publish_checkpoint(
        digits_run, repository=own_models, name="bytes", form=Form("uint8", "probabilities", max_batch=8)
    )
    manifest = version.manifest
    assert (manifest.channels_last, manifest.image_shape, manifest.max_batch) == (True, (3, 32, 32), 8)
    assert (manifest.output, manifest.parity.status) == ("probabilities", "passed")
    images = _digits(20)
    with open_engine(version.folder) as engine, torch.inference_mode():
        logits = checkpoint.load(digits_run).model(torch.from_numpy(images))
        np.testing.assert_allclose(engine.classify(images), logits.softmax(dim=1).numpy(), atol=1e-5)
        pixels = (images[:3].transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(engine(pixels), engine.classify(images[:3]))


def test_images_of_ones_own_prove_it_instead(digits_run: Path, own_models: Repository, digit_folder: Path) -> None:
    version = publish.publish_checkpoint(
        digits_run, repository=own_models, name="own", terms=Terms(images=digit_folder, count=50)
    )
    proof = version.manifest.parity
    assert proof.images is not None
    assert (proof.images.n, proof.images.description) == (50, f"images of {digit_folder.name}")
    assert proof.accuracy is not None
    assert re.fullmatch(r"\d/\d+\.png", proof.worst[0].image)


def test_an_engine_that_does_not_agree_is_refused_and_nothing_is_published(
    own_models: Repository, digits_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LIMITS, "fp32", parity.Limits(disagreement=0.0, logit_difference=1e-12))
    with pytest.raises(ParityFailed, match=r"strict: not published, parity with PyTorch checkpoint failed: logits"):
        publish.publish_checkpoint(digits_run, repository=own_models, name="strict")
    assert not (own_models.folder / "strict").exists()


def test_or_it_is_published_as_blocked(
    own_models: Repository, digits_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LIMITS, "fp32", parity.Limits(disagreement=0.0, logit_difference=1e-12))
    version = publish.publish_checkpoint(digits_run, repository=own_models, name="strict", terms=Terms(block=True))
    assert version.manifest.parity.status == "failed"
    assert not version.manifest.servable
    with pytest.raises(ParityFailed):
        publish.verify(version, repository=own_models)
    monkeypatch.undo()
    assert publish.verify(version, repository=own_models).manifest.servable


def test_a_proof_can_be_completed_later(own_models: Repository) -> None:
    for name in ("digits", "digits-int8"):
        version = own_models.find(name)
        own_models.record_proof(version, publish.not_run("something", "there was no time"))
        assert not own_models.find(name).manifest.servable
        assert publish.verify(own_models.find(name), repository=own_models).manifest == version.manifest


def test_a_proof_on_images_is_not_replaced_by_one_on_noise(
    own_models: Repository, tmp_path: Path, digit_folder: Path
) -> None:
    path = tmp_path / "theirs.onnx"
    path.write_bytes((own_models.find("digits").folder / "model.onnx").read_bytes())
    version = publish.publish_onnx(
        path, repository=own_models, name="theirs", mapping=Mapping(), terms=Terms(images=digit_folder)
    )
    with pytest.raises(ValueError, match=r"its proof was on 120 images of .*, and there are none here; name a folder"):
        publish.verify(version, repository=own_models)
    assert publish.verify(version, repository=own_models, images=digit_folder).manifest == version.manifest


def test_a_flipped_byte_in_any_file_is_noticed(own_models: Repository) -> None:
    version = own_models.find("digits")
    for path in sorted(path for path in version.folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 2):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(path.name)):
                manifests.verify_all(version.folder)
        path.write_bytes(whole)
    manifests.verify_all(version.folder)


def test_a_corrupt_checkpoint_is_refused_and_nothing_is_published(
    digits_run: Path, own_models: Repository, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    weights = bytearray((run / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"weights\.safetensors: expected sha256"):
        publish.publish_checkpoint(run, repository=own_models, name="broken")
    assert "broken" not in own_models.models()


def test_a_network_of_ones_own_has_its_weights_for_a_twin(own_models: Repository, tmp_path: Path) -> None:
    network = twin.Network(
        factory="torchvision.models:squeezenet1_1",
        input_shape=(3, 48, 48),
        class_names=("a", "b", "c"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    from torchvision import models

    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(num_classes=3).state_dict(), tmp_path / "squeeze.pt")
    version = publish.publish_network(network, tmp_path / "squeeze.pt", repository=own_models, name="squeeze")
    manifest = version.manifest
    assert manifest.provenance is not None
    assert (manifest.provenance.kind, manifest.provenance.factory) == ("weights", network.factory)
    assert manifest.parity.status == "passed"
    assert manifest.parity.images is not None
    assert (manifest.parity.images.description, manifest.parity.images.seed) == ("noise of seed 0", 0)
    module = twin.load(version, repository=own_models)
    assert module is not None
    images = np.random.default_rng(0).random((4, 3, 48, 48), dtype=np.float32)
    with open_engine(version.folder) as engine, torch.inference_mode():
        np.testing.assert_allclose(engine.classify(images), module(torch.from_numpy(images)).numpy(), atol=1e-4)
    assert "--mean 0.485,0.456,0.406" in manifest.build.command
    again = publish.verify(version, repository=own_models)
    assert again.manifest == manifest


def _foreign(run: Path, path: Path) -> Path:
    """Write a classifier as a stranger would: another name for the input, normalisation left to the caller."""
    network = checkpoint.load(run).model.get_submodule("network")
    onnx_graph.onnx_from_module(network, path, image_shape=(3, 32, 32), class_names=tuple("0123456789"))
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    return path


def test_anybody_s_onnx_is_proved_against_itself(digits_run: Path, own_models: Repository, tmp_path: Path) -> None:
    path = _foreign(digits_run, tmp_path / "theirs.onnx")
    mapping = Mapping(mean=(0.5,), std=(0.25,))
    version = publish.publish_onnx(
        path, repository=own_models, name="theirs", mapping=mapping, labels="0,1,2,3,4,5,6,7,8,9"
    )
    manifest = version.manifest
    assert (manifest.parity.reference, manifest.parity.status) == ("theirs.onnx", "passed")
    assert manifest.provenance is not None
    assert (manifest.provenance.kind, manifest.provenance.sha256) == ("onnx", manifests.sha256_of(path))
    assert manifest.twin is None
    images = _digits(50)
    with open_engine(version.folder) as engine, torch.inference_mode():
        expected = checkpoint.load(digits_run).model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(engine.classify(images), expected, atol=1e-3)
    path.unlink()
    assert publish.verify(version, repository=own_models).manifest == manifest


def test_how_images_are_resized_is_kept_and_proved_and_inherited(
    own_models: Repository, tmp_path: Path, digit_folder: Path
) -> None:
    path = tmp_path / "theirs.onnx"
    path.write_bytes((own_models.find("digits").folder / "model.onnx").read_bytes())
    chosen = Preprocessing(resize=40, interpolation="bicubic")
    plain, resized = (
        publish.publish_onnx(
            path, repository=own_models, name=name, mapping=Mapping(), form=form, terms=Terms(images=digit_folder)
        )
        for name, form in (("plain", Form()), ("resized", Form(preprocessing=chosen)))
    )
    assert resized.manifest.preprocessing == chosen
    assert "--resize 40 --interpolation bicubic" in resized.manifest.build.command
    assert plain.manifest.parity.images is not None
    assert resized.manifest.parity.images is not None
    assert plain.manifest.parity.images.sha256 != resized.manifest.parity.images.sha256
    verified = publish.verify(resized, repository=own_models, images=digit_folder).manifest
    assert verified.parity.images == resized.manifest.parity.images
    variant = publish_variant(
        resized, repository=own_models, name="half", variant=Variant("fp16"), terms=Terms(images=digit_folder)
    )
    assert variant.manifest.preprocessing == chosen


def test_a_file_that_is_no_classifier_publishes_nothing(own_models: Repository, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.onnx"):
        publish.publish_onnx(tmp_path / "empty.onnx", repository=own_models, name="x", mapping=Mapping())
    assert not (own_models.folder / "x").exists()


def test_a_file_that_is_rounded_already_is_imported_as_that(own_models: Repository, tmp_path: Path) -> None:
    source = own_models.find("digits").folder / "model.onnx"
    half, small = tmp_path / "half.onnx", tmp_path / "small.onnx"
    precision.fp16_from_onnx(source, half)
    precision.int8_from_onnx(source, small, inputs=_digits(64))
    for path, kind in ((half, "fp16"), (small, "int8")):
        version = publish.publish_onnx(path, repository=own_models, name=kind, mapping=Mapping())
        assert version.manifest.precision == kind
        assert version.manifest.parity.limits == {"disagreement": 0.005, "logit_difference": 0.001}
        assert publish.verify(version, repository=own_models).manifest == version.manifest
        other: manifests.Precision = "int8" if kind == "fp16" else "fp16"
        with pytest.raises(ValueError, match=f"this one is {kind}; import a file of fp32"):
            publish_variant(version, repository=own_models, name="x", variant=Variant(other))
