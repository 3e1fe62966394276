"""Where gradients come from: what agrees with the target is taken, what does not is refused with the number."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from export import onnx_file
from export.manifest import Build, sha256_of
from export.mapping import Mapping
from export.store.version import Version
from service.audit.gradient.source import found, onnx_of, sources
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain
from tests.export import networks
from training import datasets

if TYPE_CHECKING:
    from pathlib import Path

    from export.repository import Repository

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """256 images that the networks have not seen."""
    stored = datasets.find("digits", split="test").subset(np.arange(256)).read().images
    return torch.from_numpy(np.ascontiguousarray(stored.transpose(0, 3, 1, 2)) / np.float32(255))


def target_of(path: Path, *, shape: tuple[int, int, int], classes: int, shift: int = 0) -> FakeTarget:
    """Return what answers as an ONNX file does, its classes moved on by `shift`."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return FakeTarget(
        lambda batch: np.roll(session.run(None, {name: batch})[0], shift, axis=1),
        image_shape=shape,
        classes=classes,
        domain=Domain("float32"),
    )


def engine(version: Version, *, shift: int = 0) -> FakeTarget:
    """Return what answers as a version's ONNX file does."""
    described = version.manifest
    path, classes = version.folder / described.file, len(described.class_names)
    return target_of(path, shape=described.image_shape, classes=classes, shift=shift)


def test_a_checkpoint_is_taken_first_and_both_on_request(digits_models: Repository, digits: torch.Tensor) -> None:
    version = digits_models.find("digits")
    target = engine(version)
    (first,) = sources(version, repository=digits_models, wanted="auto", target=target, images=digits, device=CPU)
    assert (first.name, first.agreement, target.queries) == ("checkpoint", 1.0, len(digits))
    both = sources(version, repository=digits_models, wanted="all", target=target, images=digits, device=CPU)
    assert [source.name for source in both] == ["checkpoint", "onnx"]
    torch.testing.assert_close(both[0](digits), both[1](digits), rtol=1e-3, atol=1e-3)


def test_the_file_of_an_int8_engine_gives_gradients_that_its_checkpoint_agrees_with(
    digits_models: Repository, digits: torch.Tensor
) -> None:
    version = digits_models.find("digits-int8")
    (source,) = sources(
        version, repository=digits_models, wanted="onnx", target=engine(version), images=digits, device=CPU
    )
    assert source.agreement >= 0.99
    (own,) = sources(
        digits_models.find("digits"),
        repository=digits_models,
        wanted="checkpoint",
        target=engine(digits_models.find("digits")),
        images=digits,
        device=CPU,
    )
    labels = torch.from_numpy(engine(version).predict(digits.numpy()))
    gradients = []
    for each in (source, own):
        inputs = digits.clone().requires_grad_()
        loss = nn.functional.cross_entropy(each(inputs), labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, inputs)[0].flatten(1))
    assert nn.functional.cosine_similarity(gradients[0], gradients[1]).median() > 0.8


def test_a_source_that_answers_otherwise_is_refused_with_the_number(
    digits_models: Repository, digits: torch.Tensor
) -> None:
    version = digits_models.find("digits")
    with pytest.raises(ValueError, match=r"'auto'.*checkpoint: .* 99% .* got \d\.\d% of 256; .*onnx: expected"):
        sources(
            version,
            repository=digits_models,
            wanted="auto",
            target=engine(version, shift=1),
            images=digits,
            device=CPU,
        )


def test_sources_are_frozen_and_do_not_collect_gradients(digits_models: Repository, digits: torch.Tensor) -> None:
    version = digits_models.find("digits")
    for source in sources(
        version, repository=digits_models, wanted="all", target=engine(version), images=digits, device=CPU
    ):
        inputs = digits[:4].clone().requires_grad_()
        torch.autograd.backward(source(inputs).sum())
        assert inputs.grad is not None
        assert inputs.grad.any()
        assert not source.module.training
        assert all(not p.requires_grad and p.grad is None for p in source.module.parameters())


def test_of_a_plan_it_is_the_file_that_it_was_built_from(digits_models: Repository, tmp_path: Path) -> None:
    version = digits_models.find("digits")
    shutil.copy(version.folder / "model.onnx", tmp_path / "source.onnx")
    files = {"source.onnx": sha256_of(tmp_path / "source.onnx")}
    described = version.manifest.model_copy(
        update={"file": "model.plan", "build": Build(onnx="source.onnx"), "files": files}
    )
    plan = Version(described, lambda _: tmp_path)
    assert onnx_of(plan) == tmp_path / "source.onnx"
    (tmp_path / "source.onnx").write_bytes(b"another")
    with pytest.raises(ValueError, match="expected the file that was published, got another"):
        onnx_of(plan)
    without = Version(described.model_copy(update={"build": Build()}), lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="found none; publish the plan again"):
        onnx_of(without)


def test_anybody_s_file_needs_no_python_source(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    onnx_file.write(networks.residual(), path)
    images = torch.from_numpy(networks.images(64))
    target = target_of(path, shape=(3, networks.SIDE, networks.SIDE), classes=networks.CLASSES)
    found_there = found(path, repository=None, wanted="auto", target=target, images=images, device=CPU)
    assert [source.name for source in found_there.sources] == ["onnx"]
    assert "no checkpoint" in found_there.refused[0]
    bgr = Mapping(channels="BGR")
    with pytest.raises(ValueError, match=r"onnx: expected a model that names the target's class .* of 64"):
        found(path, repository=None, wanted="onnx", target=target, images=images, mapping=bgr, device=CPU)


def test_a_model_of_other_images_is_refused_in_one_line(
    digits_models: Repository, digits: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.onnx"
    onnx_file.write(networks.residual(), path)
    target = engine(digits_models.find("digits"))
    with pytest.raises(ValueError, match=r"^gradients = 'onnx': [^\n]*\Z"):
        sources(path, repository=None, wanted="onnx", target=target, images=digits, device=CPU)


def test_no_clean_images_are_an_error(digits_models: Repository, digits: torch.Tensor) -> None:
    version = digits_models.find("digits")
    with pytest.raises(ValueError, match="images: expected some"):
        sources(version, repository=digits_models, wanted="auto", target=engine(version), images=digits[:0])
