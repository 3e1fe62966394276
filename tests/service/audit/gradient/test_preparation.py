from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.audit.gradient.preparation import prepared
from training import models, recipe

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(5)


class _Branching(nn.Module):
    """A convolution whose output also goes past its batch norm: folding would change the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        if maps.sum() > 1e9:  # no tracer follows a branch on the data
            return self.fc(maps.mean((2, 3)))  # type: ignore[no-any-return]
        return self.fc((self.bn(maps) * torch.tanh(maps)).mean((2, 3)))  # type: ignore[no-any-return]


class _Shared(nn.Module):
    """One batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 6)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn(self.second(self.bn(self.first(images)).relu()))
        return self.fc(maps.mean((2, 3)))  # type: ignore[no-any-return]


def _resnet() -> nn.Module:
    return models.build(recipe.ResNet(depth=8, width=8), classes=6)


def _seen(network: nn.Module) -> nn.Module:
    """Give the batch norms statistics and scales of their own."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return network.double()


@pytest.fixture(params=[_resnet, _Branching, _Shared])
def network(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _seen(request.param())


def _gradient(network: nn.Module) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(network(images), LABELS), images)
    return gradient


def _norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_a_prepared_network_has_the_logits_and_gradients_of_the_original_in_evaluation_mode(network: nn.Module) -> None:
    ready = prepared(network, example=IMAGES)
    reference = copy.deepcopy(network).eval()
    torch.testing.assert_close(ready(IMAGES), reference(IMAGES))
    torch.testing.assert_close(_gradient(ready), _gradient(reference))


def test_it_has_nothing_to_train_and_leaves_the_original_as_it_was(network: nn.Module) -> None:
    state, training, names = copy.deepcopy(network.state_dict()), network.training, dict(network.named_modules()).keys()
    ready = prepared(network, example=IMAGES)
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    assert not any(module.training for module in ready.modules())
    assert network.training is training
    assert dict(network.named_modules()).keys() == names
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_all_batch_norms_of_a_residual_network_are_folded_and_none_where_that_would_change_the_answer() -> None:
    networks = [_seen(make()) for make in (_resnet, _Branching, _Shared)]
    assert _norms(networks[0]) > 5
    assert [_norms(prepared(network, example=IMAGES)) for network in networks] == [0, 1, 1]


def test_its_convolutions_work_with_the_channels_last() -> None:
    ready = prepared(_resnet(), example=IMAGES.float())
    seen = []
    for module in ready.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _given, maps: seen.append(maps))
    ready(IMAGES.float())
    assert seen
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
