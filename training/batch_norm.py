"""Batch normalisation over the images of all processes: PyTorch's on accelerators, ours on CPUs.

maps of each process -> sum and count over processes -> mean -> squares over processes -> variance -> normalised
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
        if not self.track_running_stats:  # perhaps only for now: see `inhibition.uncounted`
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronised(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Return a model whose batch normalisation is one over all processes; on CPUs, it is made so in place.

    Raises:
        ValueError: a layer is of a class that cannot be replaced.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if device.type == "cpu":
        _refuse_others(layers, known=(nn.BatchNorm2d,))
        for layer in layers:
            layer.__class__ = SynchronisedBatchNorm2d  # the same parameters, buffers, hooks and mode
        return model
    if any(type(layer).__module__.startswith("timm.") for layer in layers):  # some of them activate, too
        from timm.layers.norm_act import convert_sync_batchnorm  # noqa: PLC0415  # few models need it

        converted: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    _refuse_others(layers, known=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]


def _refuse_others(layers: list[_BatchNorm], *, known: tuple[type, ...]) -> None:
    other = next((type(layer).__name__ for layer in layers if type(layer) not in known), None)
    if other is not None:
        msg = (
            f"training.sync_batch_norm: expected layers of {', '.join(kind.__name__ for kind in known)}, got {other}; "
        )
        raise ValueError(msg + "set it to false, and each process has batch statistics of its own")


def _summed(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)
    return total
