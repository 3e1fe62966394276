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

from export import onnx_graph, parity, publish
from export.engines import open_engine
from training import augment, checkpoint, datasets

if TYPE_CHECKING:
    from export.engines.base import Images
    from export.repository import Repository


def _digits(count: int) -> Images:
    return augment.unit_range(torch.from_numpy(datasets.load("digits", split="test").images[:count])).numpy()


def test_the_engine_answers_as_the_checkpoint(digits_models: Repository, digits_run: Path) -> None:
    images = _digits(100)
    with open_engine(digits_models.find("digits").folder) as engine, torch.inference_mode():
        expected = checkpoint.load(digits_run).model(torch.from_numpy(images)).numpy()
        for batch in (1, 7, 64):
            np.testing.assert_allclose(parity.batched(engine, images, batch=batch), expected, atol=1e-4)


def test_the_manifest_carries_the_proof(digits_models: Repository) -> None:
    fp32, int8 = digits_models.find("digits").manifest, digits_models.find("digits-int8").manifest
    assert (fp32.parity.status, fp32.parity.n, fp32.parity.agreement) == ("passed", 504, 1.0)
    assert fp32.class_names == tuple("0123456789")
    assert int8.parity.reference == "digits@1"
    assert int8.parity.agreement is not None
    assert 0.97 <= int8.parity.agreement <= 1
    assert int8.source is not None
    assert int8.source.sha256 == fp32.sha256


def test_int8_weights_are_int8_per_channel_but_at_the_ends(digits_models: Repository) -> None:
    version = digits_models.find("digits-int8")
    graph = onnx.load(version.folder / "model.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4 and tensor.dims[0] > 1}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert not convolutions[0].input[1].endswith("DequantizeLinear_Output")
    assert all(node.input[1].endswith("DequantizeLinear_Output") for node in convolutions[1:])
    assert kinds == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith("weight_scale")}
    assert any(list(dims) > [1] for dims in scales.values())
    assert {node.op_type for node in graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_the_twin_of_a_variant_is_its_source_s_checkpoint(digits_models: Repository, digits_run: Path) -> None:
    folder = digits_models.twin_of(digits_models.find("digits-int8"))
    assert folder is not None
    assert checkpoint.load(folder).sha256 == checkpoint.load(digits_run).sha256


def test_the_onnx_file_holds_no_path_and_is_the_same_every_time(
    digits_models: Repository, digits_run: Path, tmp_path: Path
) -> None:
    published = (digits_models.find("digits").folder / "model.onnx").read_bytes()
    trained = checkpoint.load(digits_run)
    again = tmp_path / "again.onnx"
    onnx_graph.onnx_from_module(trained.model, again, image_shape=trained.input_shape, class_names=trained.class_names)
    assert again.read_bytes() == published
    assert not re.search(rb"site-packages|\.py\b|" + str(Path.cwd()).encode(), published)


def test_images_for_a_proof_are_those_that_the_run_was_tested_with(digits_run: Path, tmp_path: Path) -> None:
    for split in datasets.SPLITS:
        for name in ("cat", "dog"):
            for index in range(6):
                path = tmp_path / "images" / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                level = 100 * (split == "test") + 50 * (name == "dog") + index
                Image.new("L", (20 + index, 30), level).save(path)
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    record = json.loads((run / checkpoint.RUN).read_text())
    record["recipe"]["data"] = {"name": "folder", "root": str(tmp_path / "images"), "size": 16}
    record["input_shape"] = [3, 16, 16]
    (run / checkpoint.RUN).write_text(json.dumps(record))
    proof = publish.images_for(run, None, split="test", count=9)
    assert proof.images.shape == (9, 3, 16, 16)
    assert proof.description == "9 folder test images"
    levels = {round(float(image.mean() * 255)) for image in proof.images}
    assert len(levels) == 9
    assert levels <= {*range(100, 106), *range(150, 156)}
    own = publish.images_for(run, tmp_path / "images" / "train", split="test", count=99)
    assert own.images.shape == (12, 3, 16, 16)
    assert own.images.max() * 255 < 60


@pytest.mark.parametrize(("input_shape", "expected"), [((3, 32, 32), (32, 32)), ((3, 32, 40), (24, 30))])
def test_images_of_ones_own_are_brought_to_the_size_of_a_square_input(
    digits_run: Path, tmp_path: Path, input_shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    Image.new("RGB", (30, 24)).save(tmp_path / "images" / "cat" / "0.png")
    run = Path(shutil.copytree(digits_run, tmp_path / "run"))
    record = json.loads((run / checkpoint.RUN).read_text()) | {"input_shape": input_shape}
    (run / checkpoint.RUN).write_text(json.dumps(record))
    assert publish.images_for(run, tmp_path / "images", split="test", count=1).images.shape[2:] == expected


def test_a_variant_that_does_not_agree_is_refused_and_nothing_is_published(
    own_models: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LIMITS, "int8", parity.Limits(disagreement=0.0, logit_difference=1e-9))
    with pytest.raises(ValueError, match=r"strict: not published, parity with digits@1 failed: .*logits differ by"):
        publish.publish_variant(
            own_models.find("digits"), repository=own_models, name="strict", kind="int8", runtime="onnxruntime"
        )
    assert not (own_models.folder / "strict").exists()


def test_a_plan_is_built_without_a_gpu_and_says_that_its_parity_was_not_run(own_models: Repository) -> None:
    pytest.importorskip("tensorrt_rtx")
    version = publish.publish_variant(
        own_models.find("digits"), repository=own_models, name="rtx", kind="fp32", runtime="tensorrt_rtx"
    )
    assert version.manifest.file == "model.plan"
    assert version.manifest.build["runtime_version"]
    if version.manifest.parity.status == "not run":
        assert "GPU" in version.manifest.parity.explanation
        assert not version.manifest.servable
        with pytest.raises(RuntimeError, match="need an NVIDIA GPU"):
            open_engine(version.folder)


@pytest.mark.gpu
def test_a_plan_answers_as_its_source(own_models: Repository) -> None:
    version = publish.publish_variant(
        own_models.find("digits"), repository=own_models, name="rtx", kind="fp32", runtime="tensorrt_rtx"
    )
    assert version.manifest.parity.status == "passed"


def test_a_proof_can_be_completed_later_and_its_failure_is_recorded(
    own_models: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits", "digits-int8"):
        version = own_models.find(name)
        own_models.record_proof(version, version.manifest.parity.model_copy(update={"status": "not run"}))
        assert not own_models.find(name).manifest.servable
        assert publish.verify(own_models.find(name), repository=own_models).manifest == version.manifest
        assert own_models.find(name).manifest.servable
    monkeypatch.setitem(parity.LIMITS, "int8", parity.Limits(disagreement=0.0, logit_difference=1e-9))
    with pytest.raises(ValueError, match="digits-int8@1: parity with digits@1 failed"):
        publish.verify(own_models.find("digits-int8"), repository=own_models)
    assert own_models.find("digits-int8").manifest.parity.status == "failed"


def test_a_damaged_source_is_refused_before_it_is_parsed(own_models: Repository) -> None:
    version = own_models.find("digits")
    path = version.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.onnx: expected sha256"):
        publish.publish_variant(version, repository=own_models, name="x", kind="int8", runtime="onnxruntime")
    assert not (own_models.folder / "x").exists()


def test_variants_of_variants_and_unknown_combinations_are_refused(own_models: Repository) -> None:
    with pytest.raises(ValueError, match="made from an ONNX fp32 model, this one is int8"):
        publish.publish_variant(
            own_models.find("digits-int8"), repository=own_models, name="x", kind="int8", runtime="onnxruntime"
        )
    with pytest.raises(ValueError, match="no such variant; expected one of int8 on onnxruntime"):
        publish.publish_variant(
            own_models.find("digits"), repository=own_models, name="x", kind="int8", runtime="tensorrt"
        )
    with pytest.raises(ValueError, match="a variant is a model of its own"):
        publish.publish_variant(
            own_models.find("digits"), repository=own_models, name="digits", kind="int8", runtime="onnxruntime"
        )


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
