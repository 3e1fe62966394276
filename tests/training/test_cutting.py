from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training import cutting, inhibition, models, recipe

if TYPE_CHECKING:
    from collections.abc import Callable


RESNET = recipe.ResNet(depth=8, width=4)
RESNEXT = recipe.ResNeXt(name="resnext")
WIDE_RESNET = recipe.WideResNet(name="wide-resnet", depth=10, width=1)


@dataclass(frozen=True)
class Exhibit:
    settings: recipe.Model
    stage: str
    size: int = 64  # pixels


def library(name: str, stage: str, *, size: int = 64) -> Exhibit:
    return Exhibit(recipe.LibraryModel(name=name), stage, size)


ZOO = [
    Exhibit(recipe.ResNet(), "layer2", size=32),
    Exhibit(RESNEXT, "stage_2", size=32),
    Exhibit(recipe.WideResNet(name="wide-resnet"), "layer2", size=32),
    library("torchvision/resnet18", "layer3"),
    library("torchvision/resnet50", "layer3"),
    library("torchvision/vgg16_bn", "features.23"),
    library("torchvision/densenet121", "features.denseblock2"),
    library("torchvision/mobilenet_v3_small", "features.6"),
    library("torchvision/efficientnet_b0", "features.4"),
    library("timm/resnet18", "layer3"),
    library("timm/densenet121", "features.denseblock2"),
    library("timm/mobilenetv3_small_100", "blocks.3"),
    library("timm/efficientnet_b0", "blocks.3"),
]
LARGE_ZOO = [
    library("torchvision/resnext50_32x4d", "layer3"),
    library("torchvision/wide_resnet50_2", "layer3"),
    library("torchvision/mobilenet_v3_large", "features.9"),
    library("torchvision/convnext_tiny", "features.5"),
    library("torchvision/regnet_y_400mf", "trunk_output.block2"),
    library("torchvision/googlenet", "inception4a"),
    library("torchvision/inception_v3", "Mixed_5d", size=96),
    library("torchvision/squeezenet1_1", "features.6"),
    library("timm/resnet50", "layer3"),
    library("timm/resnext50_32x4d", "layer3"),
    library("timm/wide_resnet50_2", "layer3"),
    library("timm/mobilenetv3_large_100", "blocks.3"),
    library("timm/vgg16_bn", "features.23"),
    library("timm/convnext_tiny", "stages.2"),
    library("timm/regnety_004", "s2"),
]


def build(settings: recipe.Model = RESNET, *, classes: int = 5) -> models.Normalised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(settings, classes=classes)


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(
    scope="module",
    params=[*ZOO, *(pytest.param(exhibit, marks=pytest.mark.slow) for exhibit in LARGE_ZOO)],
    ids=lambda exhibit: exhibit.settings.name,
)
def exhibit(request: pytest.FixtureRequest) -> tuple[models.Normalised, str, Tensor]:
    """A classifier, built once for all tests, a stage of it, and images for it."""
    return build(request.param.settings), request.param.stage, images(2, request.param.size)


def test_body_and_head_of_the_zoo_make_the_whole(exhibit: tuple[models.Normalised, str, Tensor]) -> None:
    model, stage, inputs = exhibit
    body, head = cutting.cut(model.eval(), stage=stage)
    with torch.inference_mode():
        assert torch.equal(head(body(inputs)), model(inputs))


def test_a_tenet_step_teaches_the_zoo(exhibit: tuple[models.Normalised, str, Tensor]) -> None:
    model, stage, inputs = exhibit
    model.train()
    tenet = inhibition.TenetStep(model, stage=stage, groups=6, generator=torch.Generator().manual_seed(0))
    modes = {name: module.training for name, module in model.named_modules()}
    labels = torch.tensor([0, 1])
    counts = {name: int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    with torch.random.fork_rng(devices=[]):
        loss = tenet(inputs, labels, logits=functional.one_hot(labels, 5).float())
    assert loss is not None
    assert loss.isfinite()
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for part in (tenet.body, tenet.head):
        assert all(parameter.grad is not None for parameter in part.parameters())
        assert any(parameter.grad.abs().max() > 0 for parameter in part.parameters() if parameter.grad is not None)
    assert {name: int(model.get_buffer(name)) for name in counts} == counts
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("prefix", ["", "network."])
@pytest.mark.parametrize("stage", ["conv1", "bn1", "layer1", "layer2", "layer2.0", "layer3", "pool", "fc"])
def test_body_and_head_make_the_whole(stage: str, prefix: str) -> None:
    model = build().eval()
    body, head = cutting.cut(model, stage=prefix + stage)
    assert torch.equal(head(body(images())), model(images()))


def test_a_model_that_was_not_built_here_is_cut_at_its_own_paths() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            features: Tensor = self.network(x)
            return features if scale is None else features * scale

    model = Two()
    body, head = cutting.cut(model, stage="network.0")
    assert body(images()).shape == (3, 4, 14, 14)
    assert torch.equal(head(body(images())), model(images()))
    with pytest.raises(ValueError, match=r"got '0'; stages: network, network\.0, network\.1$"):
        cutting.cut(model, stage="0")


@pytest.mark.parametrize(
    "settings",
    [RESNET, WIDE_RESNET, recipe.LibraryModel(name="torchvision/shufflenet_v2_x0_5")],
    ids=lambda settings: settings.name,
)
def test_every_listed_stage_can_be_named(settings: recipe.Model) -> None:
    model = build(settings).eval()
    stages = cutting.stages(model)
    assert set(stages) >= {name for name, _ in model.network.named_children()}
    with torch.inference_mode():
        whole = model(images(2, 32))
        for stage in stages:
            body, head = cutting.cut(model, stage=stage)
            assert torch.equal(head(body(images(2, 32))), whole), stage


def test_stages_are_listed_as_they_run() -> None:
    names = ["conv1", "bn1", "layer1", "layer1.0", "layer2", "layer2.0", "layer3", "layer3.0", "pool", "fc"]
    assert cutting.stages(build()) == names
    assert cutting.stages(build().network) == names


def test_parts_share_parameters_and_follow_modes() -> None:
    model = build()
    body, head = cutting.cut(model, stage="layer2")
    parts = {id(p) for part in (body, head) for p in part.parameters()}
    assert parts == {id(p) for p in model.parameters()}
    head.eval()
    assert not model.get_submodule("network.layer3.0.bn1").training
    assert model.get_submodule("network.layer2.0.bn1").training


def test_stochastic_depth_follows_modes_after_the_cut() -> None:
    with torch.random.fork_rng(devices=[]):
        model = build(recipe.LibraryModel(name="torchvision/efficientnet_b0")).train()
        body, head = cutting.cut(model, stage="features.4")
        features = body(images(size=64))
        assert not torch.equal(head(features), head(features))
        with inhibition.evaluating(head), torch.no_grad():
            assert torch.equal(head(features), head(features))
        with inhibition.evaluating(model), torch.no_grad():
            assert torch.equal(head(body(images(size=64))), model(images(size=64)))


class Dropping(nn.Module):
    """Drops by a function on both sides of its stage, and scales by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 2.0))
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3"]:
        scale = self.scale
        maps = functional.dropout(self.first(x), training=self.training) * scale
        maps = functional.dropout(self.second(maps), 0.5, self.training) * scale
        return self.fc(maps.mean((2, 3)))  # type: ignore[no-any-return]


def varies(part: nn.Module, inputs: Tensor) -> bool:
    return not torch.equal(part(inputs), part(inputs))


@pytest.mark.parametrize("mode", [True, False], ids=["cut in training", "cut in evaluation"])
def test_functional_dropout_follows_modes_after_the_cut(mode: bool) -> None:  # noqa: FBT001
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = Dropping().train(mode)
        body, head = cutting.cut(model, stage="second")
        assert model.training == mode
        features = torch.ones(2, 8, 6, 6)
        model.train()
        assert varies(body, images())
        assert varies(head, features)
        with inhibition.evaluating(head):
            assert not varies(head, features)
            assert varies(body, images())
        assert varies(head, features)
        model.eval()
        assert not varies(body, images())
        assert not varies(head, features)
        assert torch.equal(head(body(images())), model(images()))


def test_a_head_leaves_the_features_as_they_are() -> None:
    model = build(recipe.LibraryModel(name="torchvision/vgg11_bn")).train()  # a ReLU in place follows
    tenet = inhibition.TenetStep(model, stage="features.1")
    features = tenet.body(images(2, 32))
    before = features.detach().clone()
    with torch.random.fork_rng(devices=[]):
        tenet.head(features)
        assert torch.equal(features, before)
        labels = torch.tensor([0, 1])
        assert tenet(images(2, 32), labels, logits=functional.one_hot(labels, 5).float()) is not None


def test_a_stage_of_checkpointed_blocks_can_be_named() -> None:
    model = build(recipe.LibraryModel(name="timm/resnet18")).eval()
    model.network.set_grad_checkpointing(True)  # type: ignore[operator]
    body, head = cutting.cut(model, stage="layer3.1")
    with torch.inference_mode():
        assert torch.equal(head(body(images(2, 32))), model(images(2, 32)))


def test_an_unknown_stage_lists_close_ones_and_all() -> None:
    with pytest.raises(
        ValueError, match=r"got 'layer4'; did you mean .*layer3.*\?; stages: conv1, bn1, layer1, .*, fc$"
    ):
        cutting.cut(build(), stage="layer4")


def test_a_long_list_of_stages_ends() -> None:
    model = nn.Sequential(*(nn.Identity() for _ in range(cutting.LISTED + 2)))
    with pytest.raises(ValueError, match=rf" {cutting.LISTED - 1}, \.\.\. \({cutting.LISTED + 2} in all\)$"):
        cutting.cut(model, stage="missing")


@pytest.mark.parametrize("stage", ["layer2.0.bn2", "layer2.0.shortcut"])
def test_a_stage_with_a_way_around_it_is_refused(stage: str) -> None:
    with pytest.raises(ValueError, match=f"bypasses '{stage}'; name another; stages: conv1, .* layer2.0, "):
        cutting.cut(build(), stage=stage)


def test_a_stage_that_does_not_run_once_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.layer, self.fc = nn.Identity(), nn.Conv2d(3, 3, 1), nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer(self.layer(x)))  # type: ignore[no-any-return]

    for stage, times in (("layer", 2), ("unused", 0)):
        with pytest.raises(ValueError, match=f"'{stage}' runs {times} times; name another; stages: fc$"):
            cutting.cut(Twice(), stage=stage)


class Branching(nn.Module):
    """Looks at its images, which torch.fx has none of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x if x.sum() > 0 else x.abs()))  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: expected one that torch\.fx can trace, .* got Branching: .*none$"):
        cutting.cut(Branching(), stage="head")
    assert cutting.stages(Branching()) == []


def test_a_part_that_cannot_be_traced_leaves_the_other_stages() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Branching())
    with pytest.raises(ValueError, match=r"got Sequential: .*; stages: 0, 1$"):
        cutting.cut(model, stage="1.body")
    body, head = cutting.cut(model, stage="0")
    assert torch.equal(head(body(images())), model(images()))


def built(network: nn.Module) -> models.Normalised:
    return models.Normalised(models.Normalise(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)), network)


def test_parts_of_ones_own_are_the_whole_with_normalisation() -> None:
    network = Branching()
    for model in (network, built(network)):
        for body, head in (cutting.own_parts(model), cutting.cut(model, stage="body")):
            assert torch.equal(head(body(images())), model(images()))


def test_a_model_without_parts_of_its_own_lists_its_stages() -> None:
    with pytest.raises(ValueError, match=r"named body and head, got ResNet; .* stages: conv1, "):
        cutting.own_parts(build())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_to_be_cut_first(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"expected the network itself, got it wrapped in \w+; cut it first"):
        cutting.cut(wrap(build()), stage="layer2")
