"""Batch normalisation over the images of all processes, on CPUs, where PyTorch's SyncBatchNorm does not run.

maps of each process -> sum and count over processes -> mean -> squares over processes -> variance -> normalised
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn


class _Sum(torch.autograd.Function):
    """A sum over processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(_context: object, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: object, *gradients: Tensor) -> Tensor:
        """Sum the gradients over processes."""
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all processes together; in evaluation mode, BatchNorm2d itself.

    A process may have fewer images than another, or none.
    """

    def forward(self, input: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:  # noqa: A002  # PyTorch's
        """Normalise maps, and count their statistics if in training mode."""
        if not self.training:
            return super().forward(input)
        maps = input.to(torch.promote_types(input.dtype, torch.float32))
        counted = torch.cat([maps.sum((0, 2, 3)), maps.new_tensor([maps.numel() / maps.shape[1]])])
        counted = _summed(counted)
        total = counted[-1].detach()
        mean = counted[:-1] / total
        centred = maps - mean[:, None, None]
        variance = _summed(centred.square().sum((0, 2, 3))) / total
        self._count(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalised = centred * scale[:, None, None]
        return (normalised + self.bias[:, None, None] if self.affine else normalised).to(input.dtype)

    def _count(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronised(model: nn.Module) -> nn.Module:
    """Make each BatchNorm2d of a model one over all processes, in place, and return the model."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronisedBatchNorm2d  # the same parameters, buffers, hooks and mode
    return model


def _summed(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)
    return total
