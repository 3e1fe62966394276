from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from training import inhibition, models
from training.batch_norm import SynchronisedBatchNorm2d, synchronised
from training.recipe import LibraryModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pair(**settings: Any) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    ours, theirs = (nn.BatchNorm2d(5, **settings) for _ in range(2))
    for module in (ours, theirs):
        if module.affine:
            nn.init.uniform_(module.weight, generator=torch.Generator().manual_seed(0))
            nn.init.uniform_(module.bias, generator=torch.Generator().manual_seed(1))
    synchronised(ours, device=CPU)
    assert isinstance(ours, SynchronisedBatchNorm2d)
    return ours, theirs


def maps(*, seed: int = 0) -> Tensor:
    return 3 + torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_one_process_is_pytorch_s_batch_norm(settings: dict[str, Any]) -> None:
    ours, theirs = pair(**settings)
    for seed in range(3):
        mine, other = (maps(seed=seed).requires_grad_() for _ in range(2))
        weights = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(9))
        assert torch.allclose(ours(mine), theirs(other), atol=1e-5)
        for module, images in ((ours, mine), (theirs, other)):
            (module(images) * weights).sum().backward()
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.allclose(mine.grad, other.grad, atol=1e-5)
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, atol=1e-4)
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(ours.get_buffer(name).double(), buffer.double(), atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_gradients_are_right_in_double_precision() -> None:
    ours, _ = pair()
    ours.double()
    images = maps()[:2, :, :2, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(ours, (images,))


def test_in_evaluation_it_is_pytorch_s_batch_norm() -> None:
    ours, theirs = pair()
    assert torch.equal(ours.eval()(maps()), theirs.eval()(maps()))


def test_state_keeps_its_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    names = list(model.state_dict())
    assert list(synchronised(model, device=CPU).state_dict()) == names


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050"])
def test_layers_of_timm_that_activate_are_replaced_by_its_own_or_refused(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = models.build(LibraryModel(name=f"timm/{name}"), classes=3).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        with pytest.raises(
            ValueError, match=r"training\.sync_batch_norm: expected .* got BatchNormAct2d; set it to false"
        ):
            synchronised(model, device=CPU)
        assert torch.equal(model(images), expected)
        converted = synchronised(model, device=CUDA)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        assert torch.allclose(converted(images), expected)


@pytest.mark.usefixtures("alone")
def test_statistics_that_are_left_uncounted_stay() -> None:
    for module in pair():
        before = {key: buffer.clone() for key, buffer in module.named_buffers()}
        with inhibition.uncounted(module):
            normalised = module(maps())
        assert all(torch.equal(buffer, before[key]) for key, buffer in module.named_buffers())
        assert torch.allclose(module(maps()), normalised)
        assert not any(torch.equal(buffer, before[key]) for key, buffer in module.named_buffers())
