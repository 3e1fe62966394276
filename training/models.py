"""Classifiers of images in [0, 1]: our own for small images, those of libraries, and a user's.

recipe -> build -> Normalised: images in [0, 1] -> normalise -> network -> logits
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training import recipe

if TYPE_CHECKING:
    from collections.abc import Callable

# torchvision's classifiers that have others beside them to train with: without those, logits are all that comes out
# in either mode. They warn that the way in which they draw their weights may change, unless it is given.
_ALONE = {"aux_logits": False, "init_weights": True}
AUXILIARY = {"googlenet": _ALONE, "inception_v3": _ALONE}


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


class Normalised(nn.Module):
    """A classifier of images in [0, 1]: what `build` returns, whatever network is inside."""

    def __init__(self, normalise: Normalise, network: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.network = network

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images in [0, 1]."""
        logits: Tensor = self.network(self.normalise(images))
        return logits


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride=stride)

    def forward(self, maps: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Return the block's maps, a `stride`-th of the size."""
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(maps)))))
        return functional.relu(residual + self.shortcut(maps))


class GroupedBlock(nn.Module):
    """A bottleneck around a grouped 3 x 3 convolution, and a shortcut (Xie et al. 2017, figure 3c)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, cardinality: int, width: int) -> None:
        super().__init__()
        inner = cardinality * width * (outputs // 256)  # `width` is that of a path in the first stage
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride=stride)

    def forward(self, maps: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Return the block's maps, a `stride`-th of the size."""
        residual = functional.relu(self.bn1(self.conv1(maps)))
        residual = self.bn3(self.conv3(functional.relu(self.bn2(self.conv2(residual)))))
        return functional.relu(residual + self.shortcut(maps))


class PreActivatedBlock(nn.Module):
    """Normalisation and activation before each of two 3 x 3 convolutions (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, maps: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Return the block's maps, a `stride`-th of the size, not activated."""
        active = functional.relu(self.bn1(maps))
        residual: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(active))))
        return residual + (maps if self.shortcut is None else self.shortcut(active))


class ResNet(nn.Module):
    """The residual network for small images (He et al. 2016, section 4.2), with projecting shortcuts."""

    def __init__(self, settings: recipe.ResNet, *, classes: int) -> None:
        super().__init__()
        width, blocks = settings.width, (settings.depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(Block, width, width, blocks=blocks, stride=1)
        self.layer2 = _stage(Block, width, 2 * width, blocks=blocks, stride=2)
        self.layer3 = _stage(Block, 2 * width, 4 * width, blocks=blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of normalised images."""
        maps = functional.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.fc(self.pool(maps).flatten(1))
        return logits


class ResNeXt(nn.Module):
    """ResNeXt for small images (Xie et al. 2017, section 5.2): 256, 512 and 1024 maps in its three stages."""

    def __init__(self, settings: recipe.ResNeXt, *, classes: int) -> None:
        super().__init__()
        block = partial(GroupedBlock, cardinality=settings.cardinality, width=settings.width)
        blocks = (settings.depth - 2) // 9
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stage_1 = _stage(block, 64, 256, blocks=blocks, stride=1)
        self.stage_2 = _stage(block, 256, 512, blocks=blocks, stride=2)
        self.stage_3 = _stage(block, 512, 1024, blocks=blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of normalised images."""
        maps = functional.relu(self.bn1(self.conv1(images)))
        maps = self.stage_3(self.stage_2(self.stage_1(maps)))
        logits: Tensor = self.fc(self.pool(maps).flatten(1))
        return logits


class WideResNet(nn.Module):
    """The wide residual network for small images (Zagoruyko and Komodakis 2016, table 1), without dropout."""

    def __init__(self, settings: recipe.WideResNet, *, classes: int) -> None:
        super().__init__()
        width, blocks = 16 * settings.width, (settings.depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(PreActivatedBlock, 16, width, blocks=blocks, stride=1)
        self.layer2 = _stage(PreActivatedBlock, width, 2 * width, blocks=blocks, stride=2)
        self.layer3 = _stage(PreActivatedBlock, 2 * width, 4 * width, blocks=blocks, stride=2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        _initialise(self)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of normalised images."""
        maps = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(self.pool(functional.relu(self.bn(maps))).flatten(1))
        return logits


def _projection(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(block: Callable[..., nn.Module], inputs: int, outputs: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = block(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(block(outputs, outputs, stride=1) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build(settings: recipe.Model, *, classes: int) -> Normalised:
    """Build the classifier that a recipe names, with fresh weights from PyTorch's current random state.

    Its forward takes float32 NCHW images in [0, 1] and returns logits (N, classes). Its state has the names
    normalise.* and network.*, whatever kind of network it is.

    Raises:
        ValueError: a library that is not installed or does not know the name, or a factory that cannot be
            imported, does not take `num_classes` alone or does not return a module; one line.
    """
    return Normalised(Normalise(mean=settings.mean, std=settings.std), _network(settings, classes=classes))


def _network(settings: recipe.Model, *, classes: int) -> nn.Module:
    match settings:
        case recipe.ResNet():
            return ResNet(settings, classes=classes)
        case recipe.ResNeXt():
            return ResNeXt(settings, classes=classes)
        case recipe.WideResNet():
            return WideResNet(settings, classes=classes)
        case recipe.LibraryModel():
            library, _, name = settings.name.partition("/")
            return LIBRARIES[library](name, classes=classes)
        case recipe.OwnModel():
            return _own(settings.factory, classes=classes)


def _torchvision(name: str, *, classes: int) -> nn.Module:
    try:
        from torchvision import models as library  # noqa: PLC0415  # takes seconds, and few recipes need it
    except ImportError as error:
        raise _not_installed("torchvision", error) from error
    names = library.list_models(module=library)  # the classifiers: not those of detection, video, ...
    if name not in names:
        raise _unknown("torchvision", name, names)
    network: nn.Module = library.get_model(name, weights=None, num_classes=classes, **AUXILIARY.get(name, {}))
    return network


def _timm(name: str, *, classes: int) -> nn.Module:
    try:
        import timm  # noqa: PLC0415  # takes seconds, and few recipes need it
    except ImportError as error:
        raise _not_installed("timm", error) from error
    names = timm.list_models()
    if name not in names:
        raise _unknown("timm", name, names)
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return network


LIBRARIES: dict[str, Callable[..., nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def _not_installed(library: str, error: ImportError) -> ValueError:
    msg = f"model.name: expected {library} to be installed, got: {first_line(error)}; run: pip install {library}"
    return ValueError(msg)


def _unknown(library: str, name: str, names: list[str]) -> ValueError:
    architecture = name.partition(".")[0]  # of a name in timm's style whose second half stands for weights
    msg = f"model.name: expected a classifier of {library}, got {name!r}{close_matches(architecture, names)}"
    return ValueError(msg + f"; {library}.{'models.' if library == 'torchvision' else ''}list_models() has them all")


def imported(factory: str) -> Callable[..., object]:
    """Return the function that "package.module:function" names.

    Raises:
        ValueError: it cannot be imported; one line.
    """
    module_name, _, name = factory.partition(":")
    try:
        function: Callable[..., object] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:  # ValueError: no name before the colon
        msg = f"model.factory: expected a function that can be imported, got {factory!r}: {first_line(error)}; "
        raise ValueError(msg + "a module outside the installed packages is found through PYTHONPATH") from error
    return function


def _own(factory: str, *, classes: int) -> nn.Module:
    function = imported(factory)
    try:
        inspect.signature(function).bind(num_classes=classes)
    except (TypeError, ValueError) as error:  # ValueError: a built-in function that does not tell
        msg = f"model.factory: expected a function of num_classes alone, got {factory!r}: {first_line(error)}"
        raise ValueError(msg) from error
    network = function(num_classes=classes)
    if not isinstance(network, nn.Module):
        msg = f"model.factory: expected a function that returns a torch.nn.Module, got {factory!r}, which returns "
        raise ValueError(msg + f"{type(network).__name__}")
    return network


def close_matches(name: str, names: list[str]) -> str:
    """Return a question that names close matches of a name, or nothing, to end an error with."""
    close = difflib.get_close_matches(name, names)
    return f"; did you mean {', '.join(close)}?" if close else ""


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
