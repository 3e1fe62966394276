"""An ONNX file as a module: it answers as the file does, and its gradients lead where the file's answers change."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export import foreign, onnx_file
from export.mapping import Mapping
from export.onnx_graph import onnx_from_module
from service.audit.gradient.onnx_module import module_from_model, module_from_onnx
from service.audit.gradient.program import program_from_onnx
from service.audit.gradient.program_joining import joined
from tests.export import graphs, networks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

FLOAT, BYTE = TensorProto.FLOAT, TensorProto.UINT8


def answers_of(model: onnx.ModelProto, images: NDArray[Any]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(answers)


def stored(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(255 * images.transpose(0, 2, 3, 1)).astype(np.uint8)


def stepped(module: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Move images by 8/255 along the sign of the gradient of their loss."""
    inputs = torch.from_numpy(images).requires_grad_()
    loss = nn.functional.cross_entropy(module(inputs), torch.from_numpy(labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    return (inputs + 8 / 255 * gradient.sign()).detach().clamp(0, 1).numpy()


def loss_of(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float(nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))


@pytest.mark.parametrize("uint8", [False, True], ids=["float32", "uint8"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_network_answers_as_its_file_and_its_gradient_raises_the_file_s_loss(name: str, *, uint8: bool) -> None:
    model = networks.NETWORKS[name](uint8=uint8)
    images = networks.images(16, seed=2)
    sent = stored(images) if uint8 else images
    expected = answers_of(model, sent)
    module = module_from_model(model, where="a test")
    np.testing.assert_allclose(module(torch.from_numpy(images)).numpy(), expected, rtol=1e-4, atol=1e-4)
    labels = expected.argmax(axis=1)
    moved = stepped(module, images, labels)
    after = answers_of(model, stored(moved) if uint8 else moved)
    assert loss_of(after, labels) > loss_of(expected, labels) + 0.01


@pytest.mark.parametrize("form", ["fp32", "uint8", "fp16", "int8"])
def test_every_form_of_a_file_is_computed_in_float32(form: graphs.Form) -> None:
    model = graphs.classifier(form)
    images = np.random.default_rng(3).random((32, graphs.CHANNELS, graphs.SIDE, graphs.SIDE), dtype=np.float32)
    expected = answers_of(model, stored(images) if form == "uint8" else images)
    answers = module_from_model(model, where="a test")(torch.from_numpy(images))
    assert answers.dtype == torch.float32
    np.testing.assert_allclose(answers.numpy(), expected, atol=0.02 if form == "fp16" else 1e-4)


def test_it_is_frozen_and_copied_as_any_module() -> None:
    module = module_from_model(networks.residual(), where="a test")
    assert not any(parameter.requires_grad for parameter in module.parameters())
    images = torch.rand(2, 3, networks.SIDE, networks.SIDE)
    assert torch.equal(copy.deepcopy(module)(images), module(images))
    assert module(images[:0]).shape == (0, networks.CLASSES)


def test_a_batch_norm_behind_a_convolution_costs_nothing() -> None:
    program = program_from_onnx(networks.residual())
    assert "BatchNormalization" in {step.node.operator for step in program.steps}
    assert "BatchNormalization" not in {step.node.operator for step in joined(program).steps}


def quantised(*, per_channel: bool = False) -> onnx.ModelProto:
    """Return images -> uint8 of scale 0.5 / 255, so that 0.5 and more are clipped -> float, flat."""
    scale = np.full(3, 0.5 / 255, np.float32) if per_channel else np.float32(0.5 / 255)
    zero = np.zeros(3, np.uint8) if per_channel else np.uint8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["whole"], axis=1),
        helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["floats"], axis=1),
        helper.make_node("Flatten", ["floats"], ["logits"]),
    ]
    return flat_model(nodes, {"scale": scale, "zero": zero})


def flat_model(nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> onnx.ModelProto:
    images = helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", FLOAT, ["batch", 48])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "flat", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("per_channel", [False, True], ids=["a tensor", "a channel"])
def test_quantisation_passes_the_gradient_inside_its_range_and_none_outside(*, per_channel: bool) -> None:
    model = quantised(per_channel=per_channel)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    inputs = images.clone().requires_grad_()
    answers = module_from_model(model, where="a test")(inputs)
    np.testing.assert_allclose(answers.detach().numpy(), answers_of(model, images.numpy()), atol=1e-6)
    (gradient,) = torch.autograd.grad(answers.sum(), inputs)
    assert torch.equal(gradient[images < 0.499], torch.ones(int((images < 0.499).sum())))
    assert not gradient[images > 0.501].any()


def test_a_quantisation_and_its_inverse_are_one_step() -> None:
    operators = [step.node.operator for step in joined(program_from_onnx(quantised())).steps]
    assert operators == ["QuantizeDequantize", "Flatten"]


def test_rounding_in_front_hides_the_gradient_unless_it_makes_bytes() -> None:
    scale = {"white": np.float32(255)}
    scaled = helper.make_node("Mul", ["images", "white"], ["scaled"])
    rounded = helper.make_node("Round", ["scaled"], ["rounded"])
    flat = helper.make_node("Flatten", ["rounded"], ["logits"])
    bytes_ = helper.make_node("Cast", ["rounded"], ["bytes"], to=BYTE)
    floats = helper.make_node("Cast", ["bytes"], ["floats"], to=FLOAT)
    flat_bytes = helper.make_node("Flatten", ["floats"], ["logits"])
    gradients = []
    for nodes in ([scaled, rounded, flat], [scaled, rounded, bytes_, floats, flat_bytes]):
        module = module_from_model(flat_model(nodes, scale), where="a test")
        inputs = torch.rand(1, 3, 4, 4).requires_grad_()
        gradients.append(torch.autograd.grad(module(inputs).sum(), inputs)[0])
    assert not gradients[0].any()
    assert torch.equal(gradients[1], torch.full((1, 3, 4, 4), 255.0))


def test_a_foreign_network_of_bytes_and_probabilities_has_gradients() -> None:
    model = networks.residual(uint8=True)
    last = model.graph.node[-1]
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Softmax", ["before"], [model.graph.output[0].name], axis=-1))
    adapted = foreign.adapted(
        model, Mapping(layout="NHWC"), class_names=tuple(f"class {i}" for i in range(networks.CLASSES))
    )
    images = networks.images(8)
    module = module_from_model(adapted.model, where="a test")
    answers = module(torch.from_numpy(images))
    np.testing.assert_allclose(answers.exp().numpy(), answers_of(adapted.model, images), atol=1e-4)
    labels = answers.argmax(dim=1).numpy()
    moved = stepped(module, images, labels)
    assert loss_of(module(torch.from_numpy(moved)).numpy(), labels) > loss_of(answers.numpy(), labels) + 0.01


def test_a_graph_of_two_outputs_is_refused_in_one_line() -> None:
    model = networks.residual()
    model.graph.output.append(helper.make_tensor_value_info(model.graph.node[0].output[0], FLOAT, None))
    with pytest.raises(ValueError, match=r"^a test: .*\Z"):
        module_from_model(model, where="a test")


class Small(nn.Module):
    """A convolution, a batch norm and squeeze-and-excitation, as MobileNetV3 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        features = self.stem(images)
        logits: torch.Tensor = self.head((features * self.squeeze(features)).mean((2, 3)))
        return logits


@pytest.mark.slow
def test_an_export_of_ours_answers_and_leads_as_the_module(tmp_path: Path) -> None:
    module = Small().eval()
    onnx_from_module(module, tmp_path / "model.onnx", image_shape=(3, 8, 8), class_names=("a", "b", "c", "d", "e"))
    check_alike(module, tmp_path / "model.onnx", side=8)


def check_alike(module: nn.Module, path: Path, *, side: int) -> None:
    """Compare the logits of a module and of its file, relative to the largest, and where their gradients point."""
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(5))
    results = []
    for each in (module, module_from_onnx(path)):
        inputs = images.clone().requires_grad_()
        logits = each(inputs)
        (gradient,) = torch.autograd.grad(logits.square().sum(), inputs)
        results.append((logits.detach(), gradient.flatten(1)))
    (expected, direction), (got, led) = results
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    # No closer: rounding takes one activation of a million to the other side of a ReLU's kink.
    assert nn.functional.cosine_similarity(led, direction).min() > 0.999
    torch.testing.assert_close(led.norm(dim=1), direction.norm(dim=1), rtol=0.02, atol=0)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        from torchvision import models

        module: nn.Module = models.get_model(name, weights=None, num_classes=10, **options)
        return module

    return made


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    module: nn.Module = VisionTransformer(64, 16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    return module


def _vgg() -> nn.Module:
    """Return a VGG whose last pooling keeps what it is given, as it does of 224 pixels."""
    from torchvision import models

    module: nn.Module = models.vgg11_bn(weights=None, num_classes=10)
    module.set_submodule("avgpool", nn.AdaptiveAvgPool2d(2))
    module.set_submodule("classifier.0", nn.Linear(512 * 2 * 2, 4096))
    return module


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import timm

        module: nn.Module = timm.create_model(name, num_classes=10, **options)
        return module

    return made


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": _torchvision("resnet18"),
    "ResNeXt": _torchvision("resnext50_32x4d"),
    "VGG": _vgg,
    "DenseNet": _torchvision("densenet121"),
    "MobileNetV2": _torchvision("mobilenet_v2"),
    "MobileNetV3": _torchvision("mobilenet_v3_small"),
    "EfficientNet": _torchvision("efficientnet_b0"),
    "ConvNeXt": _torchvision("convnext_tiny"),
    "ViT": _vision_transformer,
    "timm's ViT": _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    "timm's ConvNeXt": _timm("convnext_atto"),
}


# torch's older exporter has scaled_dot_product_attention from opset 14 on, and torchvision's fused attention never.
CASES = [
    (family, dynamo, opset)
    for family in FAMILIES
    for dynamo, opset in ((True, 18), (True, 20), (False, 11), (False, 17))
    if dynamo or (family, opset) not in {("ViT", 11), ("ViT", 17), ("timm's ViT", 11)}
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dynamo", "opset"), CASES)
def test_exports_of_known_networks_answer_and_lead_as_the_module(
    family: str, *, dynamo: bool, opset: int, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = FAMILIES[family]()
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.05)  # torchvision's ViT begins with a head of zeros
        module.train()(torch.rand(8, 3, 64, 64))  # statistics that are not those of initialisation
    module.eval().requires_grad_(requires_grad=False)
    path = tmp_path / "model.onnx"
    exported(module, path, dynamo=dynamo, opset=opset)
    assert onnx_file.load(path).graph.node
    check_alike(module, path, side=64)


def exported(module: nn.Module, path: Path, *, dynamo: bool, opset: int) -> None:
    """Write a module as one of torch's exporters does."""
    dynamic: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False}
        if dynamo
        else {"dynamic_axes": {"images": {0: "batch"}}}
    )
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.rand(2, 3, 64, 64),),
            path,
            dynamo=dynamo,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            **dynamic,
        )
