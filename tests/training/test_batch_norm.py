from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from training.batch_norm import SynchronisedBatchNorm2d, synchronised

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
    synchronised(ours)
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
    assert list(synchronised(model).state_dict()) == names
