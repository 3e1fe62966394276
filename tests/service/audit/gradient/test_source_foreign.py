"""Sources of networks that nobody has the Python source of: imported files, their int8 variants and their plans."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from export import foreign, onnx_file
from export.mapping import Mapping
from export.precision import int8_from_onnx
from export.publish import Terms, publish_onnx
from export.repository import Repository
from export.variant import Variant, publish_variant
from service.audit.gradient.source import found, onnx_of, sources
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain
from service.audit.target.engine import EngineTarget
from tests.export.networks import CLASSES, SIDE, Network, images
from tests.service.audit.gradient.test_onnx_module import FAMILIES, exported

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from export.manifest import Precision
    from service.audit.gradient.source import Source

CPU = torch.device("cpu")
LABELS = ",".join("abcdefghij")

# Pixels of a side of what the known networks are exported for.
LARGE = 64


def of_tensorflow() -> onnx.ModelProto:
    """Return a network as tf2onnx writes one: NHWC in [-1, 1], padding of its own, ReLU6, MatMul, Softmax."""
    net = Network(seed=3)
    tensor = net.node("Transpose", "images", perm=[0, 3, 1, 2])
    for inputs, outputs, groups in ((3, 8, 1), (8, 8, 8), (8, 16, 1)):
        around = net.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        padded = net.node("Pad", tensor, around, net.constant(0.0), mode="constant")
        kernels = net.constant(net.weights(outputs, inputs // groups, 3, 3))
        bias = net.constant(0.1 * net.random.standard_normal(outputs).astype(np.float32))
        made = net.node("Conv", padded, kernels, bias, strides=[2, 2], group=groups, auto_pad="VALID")
        tensor = net.node("Clip", made, net.constant(0.0), net.constant(6.0))
    back = net.node("Transpose", tensor, perm=[0, 2, 3, 1])
    pooled = net.node("ReduceMean", back, net.constant(np.array([1, 2])), keepdims=0)
    logits = net.node("MatMul", pooled, net.constant(3 * net.weights(16, CLASSES)))
    answer = net.node("Softmax", net.node("Add", logits, net.constant(np.zeros(CLASSES, np.float32))), axis=-1)
    model = net.model(answer, centred=False)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims[1:], (SIDE, SIDE, 3), strict=True):
        dim.dim_value = size
    return model


def gradient_of(source: Source, pictures: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the loss of the classes that the source names, a row an image."""
    inputs = pictures.clone().requires_grad_()
    logits = source(inputs)
    loss = nn.functional.cross_entropy(logits, logits.argmax(dim=1), reduction="sum")
    return torch.autograd.grad(loss, inputs)[0].flatten(1)


def as_it_stands(path: Path, *, shape: tuple[int, int, int]) -> FakeTarget:
    """Return what answers as a file of ten classes does, without ONNX Runtime's optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return FakeTarget(
        lambda batch: session.run(None, {"images": batch})[0],
        image_shape=shape,
        classes=CLASSES,
        domain=Domain("float32"),
    )


def test_an_imported_network_of_tensorflow_is_attacked_with_its_own_gradients(tmp_path: Path) -> None:
    path = tmp_path / "theirs.onnx"
    onnx_file.write(of_tensorflow(), path)
    mapping = Mapping(layout="NHWC", mean=(0.5,), std=(0.5,))
    version = publish_onnx(
        path, repository=Repository(tmp_path / "models"), name="theirs", mapping=mapping, labels=LABELS
    )
    pictures = torch.from_numpy(images(64))
    with EngineTarget.opened(version) as target:
        ours = found(version, repository=None, wanted="auto", target=target, images=pictures, device=CPU)
        theirs = found(
            path, repository=None, wanted="onnx", target=target, images=pictures, mapping=mapping, device=CPU
        )
        clean = torch.from_numpy(target.predict(pictures.numpy()))
        assert len(np.unique(clean.numpy())) > 1
        (source,) = ours.sources
        assert (source.name, source.agreement) == ("onnx", 1.0)
        torch.testing.assert_close(source(pictures), theirs.sources[0](pictures))
        moved = (pictures + 16 / 255 * gradient_of(source, pictures).sign().view_as(pictures)).clamp(0, 1)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1)).sign()
        by_noise = (pictures + 16 / 255 * noise).clamp(0, 1)
        fooled, by_chance = (
            (torch.from_numpy(target.predict(each.numpy())) != clean).sum() for each in (moved, by_noise)
        )
    assert fooled > by_chance + 6


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_plan_takes_gradients_from_the_file_it_was_built_from(own_models: Repository, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = publish_variant(
        own_models.find("digits"),
        repository=own_models,
        name="plan",
        variant=Variant(precision, runtime="tensorrt_rtx"),
    )
    assert plan.manifest.file == "model.plan"
    shape = plan.manifest.image_shape
    # A plan needs a GPU to run; the graph it was built from answers in its place.
    target = as_it_stands(onnx_of(plan), shape=shape)
    pictures = torch.rand(64, *shape, generator=torch.Generator().manual_seed(2))
    (source,) = sources(plan, repository=own_models, wanted="onnx", target=target, images=pictures, device=CPU)
    assert source.agreement >= 0.99
    assert gradient_of(source, pictures).abs().amax(dim=1).gt(0).all()


def classes_of(count: int, *, seed: int) -> NDArray[np.float32]:
    """Return images of ten classes in turn: ten patterns, with others' shadows on them."""
    patterns, others = images(10, side=LARGE, seed=4), images(count, side=LARGE, seed=seed)
    return (0.8 * patterns[np.arange(count) % 10] + 0.2 * others).astype(np.float32)


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders with images to calibrate and to compare on."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(classes_of(400, seed=6)):
        (folder / "abcdefghij"[index % 10]).mkdir(exist_ok=True)
        stored = np.rint(255 * picture.transpose(1, 2, 0)).astype(np.uint8)
        Image.fromarray(stored).save(folder / "abcdefghij"[index % 10] / f"{index}.png")
    return folder


def learned(module: nn.Module) -> nn.Module:
    """Let an untrained network tell the classes apart: statistics of batches, and a head of each class's mean."""
    batches = torch.split(torch.from_numpy(classes_of(160, seed=7)), 40)
    seen: list[torch.Tensor] = []
    head = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all batches, without what it began with
    for batch in batches:
        module.train()(batch)
    hook = head.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    for batch in batches:
        module.eval()(batch)
    hook.remove()
    features = torch.cat(seen)
    means = torch.stack([features[label::10].mean(0) for label in range(10)])
    middle, spread = means.mean(0), (means - means.mean(0)).square().sum(1).mean()
    head.weight.copy_(4 * (means - middle) / spread)
    head.bias.copy_(-(head.weight * (means + middle)).sum(1) / 2)
    return module


def written(family: str, path: Path) -> None:
    """Write the file of a known network that tells the classes apart."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = learned(FAMILIES[family]())
    exported(module, path, dynamo=True, opset=18)


@pytest.mark.slow
def test_an_int8_variant_of_a_resnet_is_accepted_by_its_engine(tmp_path: Path, pictures_folder: Path) -> None:
    pictures = torch.from_numpy(classes_of(256, seed=8))
    path = tmp_path / "theirs.onnx"
    written("ResNet", path)
    repository, terms = Repository(tmp_path / "models"), Terms(images=pictures_folder, count=100)
    theirs = publish_onnx(path, repository=repository, name="theirs", mapping=Mapping(), labels=LABELS, terms=terms)
    int8 = publish_variant(theirs, repository=repository, name="int8", variant=Variant("int8"), terms=terms)
    with EngineTarget.opened(int8) as target:
        named = target.predict(pictures.numpy())
        (source,) = sources(int8, repository=repository, wanted="auto", target=target, images=pictures, device=CPU)
    assert len(np.unique(named)) == 10
    assert source.name == "onnx"
    assert source.agreement >= 0.99
    assert gradient_of(source, pictures[:16]).ne(0).float().mean(dim=1).min() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["MobileNetV2", "ViT"])
def test_int8_files_of_known_networks_answer_as_they_stand(family: str, tmp_path: Path) -> None:
    """ONNX Runtime's optimisations round otherwise: untrained, these two then name other classes for 2 to 3 %."""
    pictures = torch.from_numpy(classes_of(256, seed=8))
    path, rounded = tmp_path / "theirs.onnx", tmp_path / "int8.onnx"
    written(family, path)
    adapted = foreign.adapted(onnx_file.load(path), Mapping(), class_names=tuple("abcdefghij"))
    onnx_file.write(adapted.model, path)
    int8_from_onnx(path, rounded, inputs=classes_of(200, seed=6))
    target = as_it_stands(rounded, shape=(3, LARGE, LARGE))
    (source,) = sources(rounded, repository=None, wanted="onnx", target=target, images=pictures, device=CPU)
    assert source.agreement >= 0.99
    assert gradient_of(source, pictures[:16]).ne(0).float().mean(dim=1).min() > 0.5
