"""ONNX's layers of networks - convolutions, poolings, normalisations, Softmax - by torch's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from service.audit.gradient.windows import window_of

if TYPE_CHECKING:
    from service.audit.gradient.node import Node, Operator

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}

# GroupNormalization's scale and bias are one a group before this opset, and one a channel since.
_PER_CHANNEL_OPSET = 21


def _convolution(node: Node, images: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    window = window_of(node, images, kernels.shape[2:])
    even = window.even
    source = images if even is not None else window.padded(images)
    convolve = _CONVOLUTIONS[kernels.dim() - 2]
    return convolve(source, kernels, bias, window.strides, even or 0, window.dilations, node.get("group", 1))


def _transposed(node: Node, images: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    window = window_of(node, images, kernels.shape[2:])
    if window.even is None or node.get("auto_pad", "NOTSET") != "NOTSET" or node.get("output_shape"):
        raise node.unsupported("expected as much padding before as behind, and no output_shape, got another")
    more = node.get("output_padding") or (0,) * len(window.kernel)
    convolve = _TRANSPOSED[kernels.dim() - 2]
    group = node.get("group", 1)
    return convolve(images, kernels, bias, window.strides, window.even, tuple(more), group, window.dilations)


def _max_pool(node: Node, images: Tensor) -> Tensor:
    window = window_of(node, images, node.get("kernel_shape"))
    padding = window.even
    if padding is None or any(2 * pad > size for pad, size in zip(padding, window.kernel, strict=True)):
        images, padding = window.padded(images, -math.inf), (0,) * len(window.kernel)
    pool = _MAX_POOLS[len(window.kernel)]
    ceil = bool(node.get("ceil_mode", 0))
    return pool(images, window.kernel, window.strides, padding, window.dilations, ceil)


def _average_pool(node: Node, images: Tensor) -> Tensor:
    window = window_of(node, images, node.get("kernel_shape"))
    if any(dilation != 1 for dilation in window.dilations):
        raise node.unsupported(f"expected no dilations, got {window.dilations}")
    pool = _AVERAGE_POOLS[len(window.kernel)]
    ceil, counted = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if window.even is not None and all(2 * p <= k for p, k in zip(window.even, window.kernel, strict=True)):
        return pool(images, window.kernel, window.strides, window.even, ceil, counted)
    averages = pool(window.padded(images), window.kernel, window.strides, 0, ceil)
    if counted:
        return averages
    # The share of each window that lies inside the image.
    return averages / pool(window.padded(torch.ones_like(images[:1, :1])), window.kernel, window.strides, 0, ceil)


def _global_average(_node: Node, images: Tensor) -> Tensor:
    return images.mean([*range(2, images.dim())], keepdim=True)


def _global_max(_node: Node, images: Tensor) -> Tensor:
    return images.amax([*range(2, images.dim())], keepdim=True)


def _batch_norm(node: Node, images: Tensor, *learned: Tensor) -> Tensor:
    scale, bias, mean, variance = learned
    if node.get("training_mode", 0):
        raise node.unsupported("expected the statistics of training, got those of each batch")
    return functional.batch_norm(images, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


def _instance_norm(node: Node, images: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(images, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def _layer_norm(node: Node, images: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = images.shape[node.get("axis", -1) % images.dim() :]
    epsilon = node.get("epsilon", 1e-5)
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(images, shape, scale, bias, epsilon)
    scaled = functional.layer_norm(images, shape, eps=epsilon) * scale
    return scaled if bias is None else scaled + bias


def _rms_norm(node: Node, images: Tensor, scale: Tensor) -> Tensor:
    shape = images.shape[node.get("axis", -1) % images.dim() :]
    return functional.rms_norm(images, shape, eps=node.get("epsilon", 1e-5)) * scale


def _group_norm(node: Node, images: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if node.opset < _PER_CHANNEL_OPSET:
        each = images.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(images, groups, scale, bias, node.get("epsilon", 1e-5))


def _local_response_norm(node: Node, images: Tensor) -> Tensor:
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return functional.local_response_norm(images, node.get("size"), alpha, beta, bias)


def _lp_norm(node: Node, images: Tensor) -> Tensor:
    return functional.normalize(images, p=node.get("p", 2), dim=node.get("axis", -1))


OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": lambda node, images: images.log_softmax(node.get("axis", -1)),
    "LpNormalization": _lp_norm,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
    "Softmax": lambda node, images: images.softmax(node.get("axis", -1)),
}
