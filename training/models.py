"""Classifiers, and how to cut one into body and head at a named stage.

images in [0, 1] -> normalise -> stem -> layer1 -> layer2 -> layer3 -> pooled -> logits
                   |______________ body ____________|______________ head ____________|   cut at "layer2"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional

if TYPE_CHECKING:
    from training.recipe import Model


class Normalise(nn.Module):
    """Subtract the mean and divide by the standard deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Normalise images in [0, 1]."""
        return (images - self.mean) / self.std


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, maps: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Return the block's maps, a `stride`-th of the size."""
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(maps)))))
        return functional.relu(residual + self.shortcut(maps))


class ResNet(nn.Module):
    """The residual network for small images (He et al. 2016, section 4.2), with projecting shortcuts."""

    def __init__(self, settings: Model, *, classes: int) -> None:
        super().__init__()
        width, blocks = settings.width, (settings.depth - 2) // 6
        self.normalise = Normalise(mean=settings.mean, std=settings.std)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks=blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks=blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks=blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images in [0, 1]."""
        maps = functional.relu(self.bn1(self.conv1(self.normalise(images))))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.fc(self.pool(maps).flatten(1))
        return logits


def _stage(inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(Block(outputs, outputs, stride=1) for _ in range(blocks - 1)))


def build(settings: Model, *, classes: int) -> nn.Module:
    """Build the classifier that a recipe names, with fresh weights from PyTorch's current random state.

    Its forward takes float32 NCHW images in [0, 1] and returns logits (N, classes).
    """
    return MODELS[settings.name](settings, classes=classes)


MODELS = {"resnet": ResNet}


class _StageTracer(fx.Tracer):
    """Goes into the modules that contain one named stage, and keeps that stage and all others whole."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # torch.fx's signature
        """Say whether a module is one node."""
        return not self.stage.startswith(module_qualified_name + ".")


def cut(model: nn.Module, *, stage: str) -> tuple[nn.Module, nn.Module]:
    """Cut a classifier into its body, up to and including `stage`, and its head, the rest.

    Both share the model's parameters and buffers, and head(body(x)) is what model(x) is. `stage` is the path
    of a submodule, "layer3" or "features.7". torch.fx must be able to trace the model's own forward, and those
    of the modules that contain the stage: what these do by themselves, as a functional dropout, keeps the mode
    that they are in now. All other modules stay whole, and go on following train() and eval().

    Raises:
        ValueError: there is no such stage, or the model cannot be traced or cut there.
    """
    if stage not in {name for name, _ in model.named_modules() if name}:
        stages = ", ".join(name for name, _ in model.named_children())
        msg = f"stage: expected a submodule of the model ({stages}, or one inside these), got {stage!r}"
        raise ValueError(msg)
    try:
        nodes = list(_StageTracer(stage).trace(model).nodes)
    except (fx.proxy.TraceError, TypeError) as error:
        msg = "model: expected one that torch.fx can trace, or that has a body and a head of its own, "
        msg += f"got {type(model).__name__}: {error}"
        raise ValueError(msg) from error
    places = [index for index, node in enumerate(nodes) if node.op == "call_module" and node.target == stage]
    if len(places) != 1:
        msg = f"stage: expected one that runs once, but {stage!r} runs {len(places)} times; name another"
        raise ValueError(msg)
    place = places[0]
    body = _body_graph(nodes[: place + 1])
    head = _head_graph(nodes[: place + 1], nodes[place + 1 :], stage=stage)
    return fx.GraphModule(model, body), fx.GraphModule(model, head)


def own_parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the `body` and `head` that a model brings itself, as one that torch.fx cannot trace may.

    Raises:
        ValueError: it does not have both.
    """
    body, head = (getattr(model, name, None) for name in ("body", "head"))
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
        msg = f"model: expected submodules named body and head, got {type(model).__name__}; name a stage instead"
        raise ValueError(msg)
    return body, head


def _body_graph(nodes: list[fx.Node]) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda original: copies[original])
    graph.output(copies[nodes[-1]])
    return graph


def _head_graph(before: list[fx.Node], after: list[fx.Node], *, stage: str) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copies[before[-1]] = graph.placeholder("features")
    for node in before:
        if node.op == "get_attr":  # a parameter may be fetched before the cut and used after it
            copies[node] = graph.node_copy(node)
    for node in after:
        bypass = next((source for source in node.all_input_nodes if source not in copies), None)
        if bypass is not None:
            msg = f"stage: expected one that all passes through, but {bypass.name!r} bypasses {stage!r}"
            raise ValueError(msg)
        copies[node] = graph.node_copy(node, lambda original: copies[original])
    return graph
