"""Grad-CAM: which places of an image speak for a class (Selvaraju et al. 2017).

images -> model up to a layer -> maps A -> rest of the model -> the class's logit
          sum of A's channels, weighed by the logit's mean gradient -> positive part -> enlarged to the image
"""

from __future__ import annotations

import contextlib
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

HALF = 0.5  # of a map's maximum: what has at least this counts in `spread`
LISTED = 40  # layers that an error names
DEPTH = 2  # names in the path of a layer that is listed: a network's parts, and theirs
REPEATING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # may put out one pixel many times


def grad_cam(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    classes: Int64[Tensor, " batch"],
    *,
    layer: str,
) -> Float[Tensor, "batch height width"]:
    """Return which places of each image speak for its class.

    The spatial mean of the gradient of the class's logit weighs each of the layer's channels (eq. 1); what is
    positive of their weighted sum is the map (eq. 2). The model is evaluated, and left as it was: its modes, its
    parameters and their gradients.

    Args:
        model: a classifier.
        images: what it takes, on its device.
        classes: what is explained of each image, in 0..classes-1.
        layer: path of a submodule that runs once and puts out maps of more than one pixel; "network." at its
            beginning may be left out, as in a recipe.

    Returns:
        Maps in [0, 1] of the images' size: enlarged bilinearly, divided by their maximum, and 0 where nothing
        speaks for the class.

    Raises:
        ValueError: there is no such layer, or the logits do not depend on it.
    """
    with _evaluating(model), torch.inference_mode(mode=False), torch.enable_grad():
        images, classes = images.detach().clone(), classes.clone()  # a graph takes nothing of inference mode
        features, logits = _features_and_logits(model, images, layer=layer)
        total = logits.gather(1, classes[:, None]).sum()
        gradient = torch.autograd.grad(total, features, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        msg = f"layer: expected one that the logits depend on, got {layer!r}; name another"
        raise ValueError(msg)
    weights = gradient.mean((2, 3), keepdim=True)
    maps = functional.relu((weights * features.detach()).sum(1, keepdim=True))
    maps = functional.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    peaks = maps.amax((1, 2), keepdim=True)
    return maps / peaks.masked_fill(peaks == 0, 1)


def spread(maps: Float[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    """Return the share of each image, in [0, 1], whose map is at least half of its maximum; 0 for an empty map."""
    peaks = maps.amax((1, 2), keepdim=True)
    return ((maps >= HALF * peaks) & (peaks > 0)).float().mean((1, 2))


def map_layers(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> tuple[str, ...]:
    """Return the submodules that run once and put out maps of more than one pixel, in the order in which they end.

    Grad-CAM is usually taken of the last. Adaptive pooling, which may put out one pixel many times, is left out.
    """
    ended: list[tuple[str, bool]] = []

    def note(name: str, module: nn.Module, _: object, output: object) -> None:
        ended.append((name, _are_maps(output) and not isinstance(module, REPEATING)))

    with contextlib.ExitStack() as hooks, _evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        model(images)
    times = Counter(name for name, _ in ended)
    return tuple(name for name, maps in ended if maps and times[name] == 1)


def _features_and_logits(model: nn.Module, images: Tensor, *, layer: str) -> tuple[Tensor, Tensor]:
    """Return the layer's maps, as a leaf of the graph, and the logits that they lead to."""
    found: list[Tensor] = []

    def start_graph(_: nn.Module, __: object, output: object) -> object:
        if not _are_maps(output):
            return output
        found.append(output.detach().requires_grad_())
        return found[-1].clone()  # the next module may work in place, which a leaf does not allow

    modules = dict(model.named_modules())
    path = layer if layer in modules else f"network.{layer}"
    if layer and path in modules:
        with modules[path].register_forward_hook(start_graph):
            logits = model(images)
    if len(found) != 1:
        names = [name.removeprefix("network.") for name in map_layers(model, images[:1])]
        listed = ", ".join([name for name in names if name.count(".") < DEPTH][-LISTED:])
        msg = f"layer: expected one that runs once and puts out maps of more than a pixel ({listed}), got {layer!r}"
        raise ValueError(msg)
    return found[0], logits


def _are_maps(output: object) -> TypeGuard[Tensor]:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
