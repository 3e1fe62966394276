from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

import pytest

from export.manifest import Manifest, Parity, TensorSpec, sha256_of
from export.repository import Draft, Repository, triton_config

if TYPE_CHECKING:
    from pathlib import Path


def _fill(draft: Draft, content: bytes = b"engine") -> None:
    path = draft.folder / "model.onnx"
    path.write_bytes(content)
    draft.describe(
        Manifest(
            model=draft.model,
            version=draft.version,
            file="model.onnx",
            sha256=sha256_of(path),
            runtime="onnxruntime",
            precision="fp32",
            inputs=(TensorSpec(name="images", datatype="FP32", shape=(-1, 3, 8, 8)),),
            outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
            class_names=("cat", "dog"),
            max_batch=4,
            parity=Parity(status="passed", reference="none", images="none"),
        )
    )


def _publish(folder: Path, times: int) -> None:
    repository = Repository(folder)
    for _ in range(times):
        with repository.draft("pets") as draft:
            _fill(draft)


def test_versions_count_up_and_the_latest_is_found(tmp_path: Path) -> None:
    _publish(tmp_path, 2)
    repository = Repository(tmp_path)
    assert repository.models() == ["pets"]
    assert repository.versions("pets") == [1, 2]
    assert repository.find("pets").manifest.version == 2
    assert str(repository.parse("pets@1")) == "pets@1"


def test_a_failed_draft_leaves_nothing_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    repository = Repository(tmp_path)

    def fail() -> None:
        with repository.draft("pets") as draft:
            (draft.folder / "model.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    _publish(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in (tmp_path / "pets").iterdir()) == ["1", "config.pbtxt", "model.json"]
    _publish(tmp_path, 1)
    assert repository.versions("pets") == [1, 3]


def test_writers_in_several_processes_never_share_a_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_publish, args=(tmp_path, 5)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert Repository(tmp_path).versions("pets") == list(range(1, 16))


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    _publish(tmp_path, 1)
    repository = Repository(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'dogs': not in .*; its models are: pets"):
        repository.find("dogs")
    with pytest.raises(FileNotFoundError, match="no version 7; its versions are: 1"):
        repository.find("pets", 7)
    with pytest.raises(ValueError, match="expected NAME or NAME@VERSION"):
        repository.parse("pets@latest")
    with pytest.raises(ValueError, match="expected letters"):
        repository.find("../pets")
    with pytest.raises(FileNotFoundError, match="expected a model repository here"):
        Repository(tmp_path / "elsewhere").models()


def test_triton_can_serve_the_same_folder(tmp_path: Path) -> None:
    _publish(tmp_path, 1)
    config = (tmp_path / "pets" / "config.pbtxt").read_text()
    assert config == triton_config(Repository(tmp_path).find("pets").manifest)
    assert 'platform: "onnxruntime_onnx"' in config
    assert "max_batch_size: 4" in config
    assert 'name: "images", data_type: TYPE_FP32, dims: [3, 8, 8]' in config


def test_a_checkpoint_that_was_exchanged_is_not_taken_for_the_twin(own_models: Repository) -> None:
    version = own_models.find("digits-int8")
    folder = own_models.twin_of(version)
    assert folder is not None
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"expected sha256 .* as in digits@1's manifest, got .*another checkpoint"):
        own_models.twin_of(version)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected digits@1's checkpoint here, found none"):
        own_models.twin_of(version)
