from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from training import cutting, models, recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RESNET = recipe.ResNet(depth=8, width=4)
RESNEXT = recipe.ResNeXt(name="resnext")
WIDE_RESNET = recipe.WideResNet(name="wide-resnet", depth=10, width=1)


def build(settings: recipe.Model = RESNET, *, classes: int = 5) -> models.Normalised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(settings, classes=classes)


def parameters(settings: recipe.Model) -> int:
    return sum(parameter.numel() for parameter in build(settings, classes=10).parameters())


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        (recipe.ResNet(depth=20), 0.27),  # He et al. 2016, table 6
        (recipe.ResNet(depth=56), 0.85),
        (recipe.ResNet(depth=110), 1.7),
        (recipe.ResNeXt(name="resnext", depth=29, cardinality=8, width=64), 34.4),  # Xie et al. 2017, table 7
        (recipe.ResNeXt(name="resnext", depth=29, cardinality=16, width=64), 68.1),
        (RESNEXT, 6.81),  # 4 x 32d, as in AugMix's published code
        (recipe.WideResNet(name="wide-resnet"), 2.2),  # Zagoruyko and Komodakis 2016, tables 4 and 5
        (recipe.WideResNet(name="wide-resnet", depth=16, width=8), 11.0),
        (recipe.WideResNet(name="wide-resnet", depth=28, width=10), 36.5),
    ],
    ids=str,
)
def test_networks_have_the_parameters_of_the_literature(settings: recipe.Model, millions: float) -> None:
    decimals = len(str(millions).partition(".")[2])
    assert parameters(settings) / 1e6 == pytest.approx(millions, abs=10**-decimals)


@pytest.mark.parametrize(
    "settings",
    [
        *(recipe.ResNet(depth=depth, width=2) for depth in (8, 14, 20)),
        *(recipe.ResNeXt(name="resnext", depth=depth, cardinality=1, width=1) for depth in (11, 20)),
    ],
    ids=lambda settings: f"{settings.name}-{settings.depth}",
)
def test_depth_counts_the_layers_with_weights(settings: recipe.ResNet | recipe.ResNeXt) -> None:
    layers = [
        name
        for name, module in build(settings).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == settings.depth


@pytest.mark.parametrize("depth", [10, 16])
def test_depth_of_a_wide_network_counts_its_convolutions(depth: int) -> None:
    model = build(recipe.WideResNet(name="wide-resnet", depth=depth, width=2))
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth


@pytest.mark.parametrize(
    ("settings", "stages", "channels"),
    [
        (recipe.ResNet(depth=8, width=6), ("layer1", "layer2", "layer3"), [6, 12, 24]),
        (RESNEXT, ("stage_1", "stage_2", "stage_3"), [256, 512, 1024]),
        (WIDE_RESNET, ("layer1", "layer2", "layer3"), [16, 32, 64]),
    ],
)
def test_stages_have_the_channels_of_the_literature(
    settings: recipe.Model, stages: tuple[str, ...], channels: list[int]
) -> None:
    model = build(settings)
    assert [cutting.cut(model, stage=stage)[0](images()).shape[1] for stage in stages] == channels


@pytest.mark.parametrize("settings", [RESNET, RESNEXT, WIDE_RESNET], ids=lambda settings: settings.name)
def test_logits_have_one_column_per_class(settings: recipe.Model) -> None:
    assert build(settings, classes=7)(images()).shape == (3, 7)


def test_logits_alone_come_out_in_training() -> None:
    assert build(recipe.LibraryModel(name="torchvision/googlenet")).train()(images(size=64)).shape == (3, 5)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], recipe.OwnModel]:
    """Writes a module with a `factory`, and returns the settings that name it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> recipe.OwnModel:
        name = f"own_{abs(hash(text))}"
        (tmp_path / f"{name}.py").write_text("from torch import nn\n" + text)
        return recipe.OwnModel(factory=f"{name}:factory")

    return write


def test_a_factory_of_ones_own_makes_the_network(own: Callable[[str], recipe.OwnModel]) -> None:
    settings = own("def factory(*, num_classes, width=6):\n    return nn.Conv2d(3, num_classes, width)\n")
    model = build(settings, classes=4)
    assert model(images(size=8)).shape == (3, 4, 3, 3)
    assert model.state_dict().keys() == {"normalise.mean", "normalise.std", "network.weight", "network.bias"}


def test_normalisation_is_in_the_model(own: Callable[[str], recipe.OwnModel]) -> None:
    plain = own("def factory(num_classes):\n    return nn.Flatten()\n")
    settings = recipe.OwnModel(factory=plain.factory, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    assert torch.allclose(build(settings)(torch.full((1, 3, 1, 1), 0.6)), torch.tensor([1.0, 1.6, 0.3]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a function that can be imported, .* has no attribute 'factory'"),
        ("import nowhere_at_all\n", "expected a function that can be imported, .* No module named 'nowhere_at_all'"),
        ("def factory(:\n", "expected a function that can be imported, .*SyntaxError"),
        ("factory = 3\n", "expected a function of num_classes alone, .* 3 is not a callable"),
        ("def factory(classes):\n    return nn.Flatten()\n", "expected a function of num_classes alone"),
        ("def factory(width, num_classes):\n    return nn.Flatten()\n", "expected a function of num_classes alone"),
        (
            "def factory(num_classes):\n    return None\n",
            "expected a function that returns a torch.nn.Module, .* returns NoneType",
        ),
    ],
    ids=["no such name", "no such import", "syntax", "no function", "other argument", "more arguments", "no module"],
)
def test_a_factory_that_cannot_serve_is_refused_in_one_line(
    own: Callable[[str], recipe.OwnModel], text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^model.factory: {message}") as caught:
        build(own(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet81", "of torchvision, got 'resnet81'; did you mean resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "of torchvision, got"),  # a detector
        ("timm/resnet-50", "of timm, got 'resnet-50'; did you mean .*resnet50"),
        ("timm/resnet50.a1_in1k", "of timm, got .*; did you mean resnet50"),  # a name for weights, which are fresh here
    ],
)
def test_an_unknown_name_lists_close_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.name: expected a classifier {message}"):
        build(recipe.LibraryModel(name=name))


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_library_that_is_missing_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python itself sets for a module that must not be imported
    with pytest.raises(ValueError, match=f"^model.name: expected {name} to be installed, .*pip install {name}$"):
        build(recipe.LibraryModel(name=f"{name}/resnet18"))
