"""Where the windows of convolutions and poolings lie: ONNX's paddings as torch has them.

node, size of the images --pads | auto_pad--> Window: strides, dilations, (begin, end) an axis --> even | padded before
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.gradient.node import Node


@dataclass(frozen=True)
class Window:
    """The window of a convolution or a pooling, an entry for each axis of the image.

    Attributes:
        kernel: its size.
        strides: from one to the next.
        dilations: from one of its values to the next.
        pads: before and behind the image.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def even(self) -> tuple[int, ...] | None:
        """As much padding before as behind, which torch's own padding takes; None if it is not."""
        return tuple(begin for begin, _ in self.pads) if all(begin == end for begin, end in self.pads) else None

    def padded(self, images: Tensor, value: float = 0.0) -> Tensor:
        """Return images with the padding around them."""
        flat = [width for pair in reversed(self.pads) for width in pair]
        return functional.pad(images, flat, value=value)


def window_of(node: Node, images: Tensor, kernel: Sequence[int]) -> Window:
    """Return a node's window for images of this size.

    Raises:
        ValueError: it pads in a way that ONNX does not have.
    """
    axes = len(kernel)
    strides = tuple(node.get("strides") or (1,) * axes)
    dilations = tuple(node.get("dilations") or (1,) * axes)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = ((0, 0),) * axes
    elif mode in {"SAME_UPPER", "SAME_LOWER"}:
        each = zip(images.shape[2:], kernel, strides, dilations, strict=True)
        pads = tuple(_same(*sizes, upper=mode == "SAME_UPPER") for sizes in each)
    elif mode == "NOTSET":
        flat = node.get("pads") or (0,) * (2 * axes)
        pads = tuple(zip(flat[:axes], flat[axes:], strict=True))
    else:
        raise node.unsupported(f"expected auto_pad NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {mode}")
    return Window(tuple(kernel), strides, dilations, pads)


def _same(size: int, kernel: int, stride: int, dilation: int, *, upper: bool) -> tuple[int, int]:
    """Return the padding that makes ceil(size / stride) windows, the odd pixel behind if `upper`."""
    windows = -(-size // stride)
    total = max(0, (windows - 1) * stride + dilation * (kernel - 1) + 1 - size)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)
