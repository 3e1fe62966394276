"""A network made ready for gradients in its input alone: nothing is computed that an attack does not need.

module --copy, evaluation mode, frozen--> batch norms folded into their convolutions --same logits?--> channels last
                                                                                         '-- no: not folded
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

if TYPE_CHECKING:
    from jaxtyping import Float32
    from torch import Tensor

# Images of the example that the folded network is compared on: what is folded does not depend on their number.
_COMPARED = 4

# Of the largest logit: float32's rounding through a hundred layers stays below it, a batch norm too few does not.
_TOLERANCE = 1e-3


class _Pair(NamedTuple):
    """A convolution, and the batch norm that takes what it gives, with its name in the network."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    name: str


class ChannelsLast(nn.Module):
    """A network that is given its images with the channels last in memory, as its convolutions are fastest."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n classes"]:
        """Return the network's logits."""
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits


def prepared(module: nn.Module, *, example: Float32[Tensor, "n c h w"]) -> nn.Module:
    """Return a copy of a network for gradients in its images: evaluation mode, frozen, folded, channels last.

    Args:
        module: images, float32 NCHW -> logits; left as it is.
        example: images on the module's device; a batch norm is folded if it alone takes what a convolution gives for
            them, and all are kept if the logits then differ by more than rounding.
    """
    network = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
    folded = copy.deepcopy(network)
    images = example[:_COMPARED]
    with torch.no_grad():
        expected = network(images)
        for pair in _pairs(folded, images):
            _fold(folded, pair)
        same = (folded(images) - expected).abs().amax() <= _TOLERANCE * expected.abs().amax()
    return ChannelsLast(folded if same else network).eval()


def _pairs(network: nn.Module, images: Tensor) -> list[_Pair]:
    """Run the network, and return the convolutions whose output goes into a batch norm, both called once."""
    convolutions: list[tuple[nn.Conv2d, Tensor]] = []  # with their outputs, kept: no two have the same identity
    norms: list[tuple[nn.BatchNorm2d, Tensor]] = []  # with their inputs

    def called(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            norms.append((module, arguments[0]))
        elif isinstance(module, nn.Conv2d):
            convolutions.append((module, output))

    foldable = {module: name for name, module in network.named_modules() if _foldable(module)}
    hooks = [module.register_forward_hook(called) for module in foldable]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter([module for module, _ in convolutions] + [module for module, _ in norms])
    return [
        _Pair(convolution, norm, foldable[norm])
        for norm, taken in norms
        for convolution, output in convolutions
        if output is taken and calls[norm] == calls[convolution] == 1
    ]


def _foldable(module: nn.Module) -> bool:
    """Say whether it is a plain convolution, or a batch norm with statistics: subclasses may do other things beside."""
    return type(module) is nn.Conv2d or (type(module) is nn.BatchNorm2d and module.running_mean is not None)


def _fold(network: nn.Module, pair: _Pair) -> None:
    """Let the convolution do both, in place."""
    convolution, norm = pair.convolution, pair.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    network.set_submodule(pair.name, nn.Identity())
