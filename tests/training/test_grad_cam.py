from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from training import grad_cam, models, recipe

if TYPE_CHECKING:
    from collections.abc import Callable


Built = TypeVar("Built", bound=nn.Module)


def images(count: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], Built]) -> Built:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


class Pooled(nn.Module):
    """A network whose Grad-CAM is its CAM: maps, their means, and a linear layer over these (Zhou et al. 2016)."""

    def __init__(self, *, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, kernel, stride=stride, padding=kernel // 2)
        self.relu: nn.Module = nn.ReLU()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.relu(self.convolution(x)).mean((2, 3)))
        return logits

    def cam(self, x: Tensor, classes: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.einsum("bc,bchw->bhw", self.fc.weight[classes], self.relu(self.convolution(x))).relu()


def resnet() -> nn.Module:
    return seeded(lambda: models.build(recipe.ResNet(depth=8, width=4), classes=4))


def test_of_a_pooled_linear_classifier_it_is_cam() -> None:
    model, classes = seeded(Pooled), torch.tensor([2, 0, 3])
    cam = model.cam(images(), classes)
    assert (cam.amax((1, 2)) > 0).all()
    maps = grad_cam.grad_cam(model, images(), classes, layer="relu")
    torch.testing.assert_close(maps, cam / cam.amax((1, 2), keepdim=True))


def test_a_case_by_hand() -> None:
    """Red speaks for class 0 and green against it: ReLU(2 red - green), divided by its maximum of 1.6."""
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
    model = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    red, green = torch.tensor([[0.8, 0.4], [0.1, 0.5]]), torch.tensor([[0.0, 0.4], [0.9, 0.2]])
    image = torch.stack([red, green, torch.zeros(2, 2)])[None]
    maps = grad_cam.grad_cam(model, image, torch.tensor([0]), layer="0")
    torch.testing.assert_close(maps, torch.tensor([[[1.0, 0.25], [0.0, 0.5]]]))
    nothing = grad_cam.grad_cam(model, image, torch.tensor([1]), layer="0")  # there is no blue
    assert torch.equal(nothing, torch.zeros(1, 2, 2))
    assert grad_cam.spread(nothing).tolist() == [0.0]


def test_small_maps_are_enlarged_bilinearly() -> None:
    model = seeded(lambda: Pooled(stride=4))
    peaks = torch.stack([model.cam(images(), torch.full((3,), c)).amax((1, 2)) for c in range(4)])
    classes = peaks.argmax(0)
    large = functional.interpolate(model.cam(images(), classes)[:, None], size=(8, 8), mode="bilinear")[:, 0]
    assert (large.amax((1, 2)) > 0).all()
    maps = grad_cam.grad_cam(model, images(), classes, layer="relu")
    torch.testing.assert_close(maps, large / large.amax((1, 2), keepdim=True))


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=st.integers(0, 20))
def test_the_scale_and_the_shift_of_the_logits_do_not_matter(scale: float, shift: float, seed: int) -> None:
    model, x, classes = seeded(Pooled), images(seed=seed), torch.tensor([0, 1, 2])
    before = grad_cam.grad_cam(model, x, classes, layer="relu")
    with torch.no_grad():
        model.fc.weight.mul_(scale)
        model.fc.bias.add_(shift)
    torch.testing.assert_close(grad_cam.grad_cam(model, x, classes, layer="relu"), before)


@settings(max_examples=40)
@given(seed=st.integers(0, 1000))
def test_maps_reach_from_0_to_1_and_belong_to_their_images(seed: int) -> None:
    model, x = resnet(), images(count=4, size=16, seed=seed)
    classes = torch.arange(4)
    maps = grad_cam.grad_cam(model, x, classes, layer="layer2")
    assert ((maps >= 0) & (maps <= 1)).all()
    assert {*maps.amax((1, 2)).tolist()} <= {0.0, 1.0}
    order = torch.tensor([2, 0, 3, 1])
    moved = grad_cam.grad_cam(model, x[order], classes[order], layer="layer2")
    torch.testing.assert_close(moved, maps[order], atol=1e-4, rtol=1e-3)
    alone = grad_cam.grad_cam(model, x[1:2], classes[1:2], layer="layer2")
    torch.testing.assert_close(alone, maps[1:2], atol=1e-4, rtol=1e-3)


def test_a_mirrored_image_has_the_mirrored_map() -> None:
    model, classes = seeded(lambda: Pooled(kernel=1)), torch.tensor([2, 0, 3])
    maps = grad_cam.grad_cam(model, images(), classes, layer="convolution")
    mirrored = grad_cam.grad_cam(model, images().flip(3), classes, layer="convolution")
    torch.testing.assert_close(mirrored, maps.flip(2))


def test_classes_have_maps_of_their_own() -> None:
    x = images(count=1, size=16)
    first, second = (grad_cam.grad_cam(resnet(), x, torch.tensor([c]), layer="layer3") for c in (0, 1))
    assert not torch.allclose(first, second, atol=0.1)


def test_the_model_is_left_as_it_was() -> None:
    model = resnet().train()
    model.get_submodule("network.bn1").eval()
    model.get_submodule("network.fc").requires_grad_(requires_grad=False)
    model(images(size=16)).sum().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    grad_cam.grad_cam(model, images(size=16), torch.arange(3), layer="layer2")
    grad_cam.map_layers(model, images(size=16))
    with pytest.raises(ValueError, match="layer"):
        grad_cam.grad_cam(model, images(size=16), torch.arange(3), layer="nowhere")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert parameter.grad is None if expected is None else torch.equal(parameter.grad, expected)  # type: ignore[arg-type]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_it_works_where_gradients_are_off(mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    model, classes = resnet().requires_grad_(requires_grad=False), torch.arange(3)
    expected = grad_cam.grad_cam(model, images(size=16), classes, layer="layer2")
    with mode():
        maps = grad_cam.grad_cam(model, images(size=16), torch.arange(3), layer="layer2")
    torch.testing.assert_close(maps, expected)
    assert not maps.requires_grad


def test_a_layer_whose_maps_are_changed_in_place_is_explained() -> None:
    model, classes = seeded(Pooled), torch.tensor([2, 0, 3])
    expected = grad_cam.grad_cam(model, images(), classes, layer="convolution")
    model.relu = nn.ReLU(inplace=True)
    torch.testing.assert_close(grad_cam.grad_cam(model, images(), classes, layer="convolution"), expected)


def test_a_layer_is_named_as_in_a_recipe_or_in_full() -> None:
    short, full = (
        grad_cam.grad_cam(resnet(), images(size=16), torch.arange(3), layer=layer)
        for layer in ("layer2", "network.layer2")
    )
    assert torch.equal(short, full)


class Odd(nn.Module):
    """A layer that runs twice, and one beside the way to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.beside, self.once = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.twice(self.twice(x))
        self.beside(maps)
        logits: Tensor = self.once(maps).mean((2, 3))
        return logits


@pytest.mark.parametrize("layer", ["nowhere", "", "twice"])
def test_a_layer_that_cannot_be_explained_is_told_with_those_that_can(layer: str) -> None:
    with pytest.raises(ValueError, match=rf"^layer: expected one .* \(beside, once\), got '{layer}'$"):
        grad_cam.grad_cam(Odd(), images(), torch.arange(3), layer=layer)


@pytest.mark.parametrize("layer", ["network.pool", "fc"])
def test_a_layer_without_maps_is_told_with_those_that_have_some(layer: str) -> None:
    with pytest.raises(ValueError, match=rf"layer2\.0, layer2, layer3\.0, layer3\), got '{layer}'$"):
        grad_cam.grad_cam(resnet(), images(size=16), torch.arange(3), layer=layer)


def test_a_layer_that_the_logits_do_not_depend_on_is_told() -> None:
    for model in (Odd(), Odd().requires_grad_(requires_grad=False)):
        with pytest.raises(ValueError, match="expected one that the logits depend on, got 'beside'"):
            grad_cam.grad_cam(model, images(), torch.arange(3), layer="beside")


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        (recipe.ResNet(depth=8, width=4), "network.layer3"),
        (recipe.ResNeXt(name="resnext", depth=11, cardinality=2, width=4), "network.stage_3"),
        (recipe.WideResNet(name="wide-resnet", depth=10, width=1), "network.bn"),
    ],
    ids=["resnet", "resnext", "wide-resnet"],
)
def test_the_last_maps_of_our_networks(settings: recipe.Model, last: str) -> None:
    model = seeded(lambda: models.build(settings, classes=3))
    assert grad_cam.map_layers(model, images(count=1, size=16))[-1] == last


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("resnet18", 64, "layer4"),
        ("resnet18", 32, "layer3"),  # the fourth puts out one pixel
        ("mobilenet_v3_small", 64, "features"),
        ("squeezenet1_1", 64, "classifier.2"),
        ("vgg11_bn", 64, "features"),
        ("vgg11_bn", 32, "features.27"),  # its pooling repeats the one pixel of the features
    ],
)
def test_the_last_maps_of_a_library_network(name: str, size: int, last: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, num_classes=3)
        assert grad_cam.map_layers(model, torch.rand(2, 3, size, size))[-1] == last


def test_spread_is_the_area_of_half_the_maximum() -> None:
    maps = torch.tensor([[[1.0, 0.5], [0.49, 0.0]], [[0.2, 0.2], [0.2, 0.2]], [[0.0, 0.0], [0.0, 0.0]]])
    assert grad_cam.spread(maps).tolist() == [0.5, 1.0, 0.0]


@given(scale=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_spread_is_a_share_that_scale_does_not_change(scale: float, seed: int) -> None:
    maps = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spreads = grad_cam.spread(maps)
    assert ((spreads > 0) & (spreads <= 1)).all()
    torch.testing.assert_close(grad_cam.spread(maps * scale), spreads, atol=1 / 25, rtol=0)  # one pixel's rounding
