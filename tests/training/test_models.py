from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from training import inhibition, models
from training.recipe import Model


def build(*, depth: int = 8, width: int = 4, classes: int = 5) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(Model(depth=depth, width=width), classes=classes)


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (14, 14), (20, 20)])
def test_depth_counts_the_layers_with_weights(depth: int, layers: int) -> None:
    model = build(depth=depth)
    weighted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(weighted) == layers


def test_width_is_that_of_the_first_stage() -> None:
    model = build(width=6)
    channels = [models.cut(model, stage=f"layer{n}")[0](images()).shape[1] for n in (1, 2, 3)]
    assert channels == [6, 12, 24]


def test_logits_have_one_column_per_class() -> None:
    assert build(classes=7)(images()).shape == (3, 7)


def test_normalisation_is_in_the_model() -> None:
    model = models.build(Model(depth=8, width=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0)), classes=2)
    first = next(iter(model.children()))
    assert dict(first.named_buffers()).keys() == {"mean", "std"}
    normalised = first(torch.full((1, 3, 2, 2), 0.6))
    assert torch.allclose(normalised[0, :, 0, 0], torch.tensor([1.0, 1.6, 0.3]))


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer2.0", "layer2.0.bn2", "bn1"])
def test_body_and_head_make_the_whole(stage: str) -> None:
    model = build().eval()
    try:
        body, head = models.cut(model, stage=stage)
    except ValueError as error:
        assert "bypasses" in str(error)  # noqa: PT017
        assert stage == "layer2.0.bn2"  # inside a block, with a shortcut around it
    else:
        assert torch.equal(head(body(images())), model(images()))


@pytest.mark.parametrize(
    ("name", "stage"),
    [("resnet18", "layer3"), ("squeezenet1_1", "features.6"), ("mobilenet_v3_small", "features.6")],
)
def test_any_traceable_network_is_cut(name: str, stage: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
    body, head = models.cut(model, stage=stage)
    with torch.inference_mode():
        assert torch.equal(head(body(images(size=64))), model(images(size=64)))


def test_parts_share_parameters_and_follow_modes() -> None:
    model = build()
    body, head = models.cut(model, stage="layer2")
    parts = {id(p) for part in (body, head) for p in part.parameters()}
    assert parts == {id(p) for p in model.parameters()}
    head.eval()
    assert not model.get_submodule("layer3.0.bn1").training
    assert model.get_submodule("layer2.0.bn1").training


def test_stochastic_depth_follows_modes_after_the_cut() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.efficientnet_b0(weights=None, num_classes=4).train()
        body, head = models.cut(model, stage="features.4")
        features = body(images(size=64))
        assert not torch.equal(head(features), head(features))
        with inhibition.evaluating(head), torch.no_grad():
            assert torch.equal(head(features), head(features))
        with inhibition.evaluating(model), torch.no_grad():
            assert torch.equal(head(body(images(size=64))), model(images(size=64)))


def test_an_unknown_stage_lists_the_stages() -> None:
    with pytest.raises(ValueError, match=r"layer1, layer2, layer3.*got 'layer4'"):
        models.cut(build(), stage="layer4")


def test_a_stage_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="'layer' runs 2 times"):
        models.cut(Twice(), stage="layer")


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"expected one that torch\.fx can trace, or .* got Branching"):
        models.cut(Branching(), stage="layer")


def test_building_elsewhere_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        models.build(Model(depth=8, width=4), classes=2)
    assert torch.equal(torch.random.get_rng_state(), before)
