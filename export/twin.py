"""The PyTorch model with an engine's weights: what it was exported from, and where attacks get their gradients.

a run's folder:   weights.safetensors, run.json      --checkpoint.load----------> module
somebody's own:   weights.safetensors, network.json  --import the factory, load--> module
"""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import nn

from export.labels import check
from training import checkpoint, models

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from export.repository import Repository, Version

NETWORK = "network.json"
WEIGHTS = checkpoint.WEIGHTS

# Under which others' checkpoints keep their weights, and what they put before each name.
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")

# Names of weights that an error lists: enough to see what is wrong.
_NAMES = 3


class Network(BaseModel):
    """A PyTorch network of somebody's own.

    Attributes:
        factory: "package.module:function"; it is called with `num_classes=` where it takes that, else with nothing.
        input_shape: (C, H, W) of an image.
        class_names: of its classes, in the order of its logits.
        mean: subtracted from an image in [0, 1], per channel, before the network sees it; () where it does so itself.
        std: what is then divided by; () for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...] = Field(min_length=2)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @field_validator("class_names")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return check(names, count=len(names))

    @field_validator("std")
    @classmethod
    def _positive(cls, std: tuple[float, ...]) -> tuple[float, ...]:
        if any(value <= 0 for value in std):
            raise ValueError(f"expected numbers above 0, got {', '.join(map(str, std))}; they are divided by")
        return std


def load(version: Version, *, repository: Repository) -> nn.Module | None:
    """Return the PyTorch model with an engine's weights, in evaluation mode; None if it has none.

    Its forward takes float32 (N, C, H, W) in [0, 1] and returns logits (N, classes), whatever the engine takes.

    Raises:
        FileNotFoundError, ValueError: as `Repository.twin_of`, and where the files cannot be loaded.
    """
    files = repository.twin_of(version)
    return None if files is None else read(files.folder)


def read(folder: Path) -> nn.Module:
    """Return the model in a folder of either kind, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or does not fit.
    """
    if not (folder / NETWORK).is_file():
        return checkpoint.load(folder).model
    return _with_weights(record(folder), folder / WEIGHTS)


def record(folder: Path) -> Network:
    """Return the description of a network of somebody's own.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return Network.model_validate_json((folder / NETWORK).read_bytes())
    except ValidationError as error:
        raise ValueError(f"{folder / NETWORK}: {first_fault(error)}; export the network again") from None


def write(folder: Path, network: Network, weights: Path) -> nn.Module:
    """Put a network of somebody's own and its weights into a new folder, and return the model.

    Args:
        folder: made here.
        network: what it is.
        weights: its plain state_dict: a safetensors file, or one of `torch.save` that `weights_only` can read.

    Raises:
        FileNotFoundError: no such file of weights.
        ValueError: the weights cannot be read, are not those of the network, or the factory fails.
    """
    module = _with_weights(network, weights)
    inner = module.network
    assert isinstance(inner, nn.Module)
    folder.mkdir()
    state = {name: tensor.contiguous().clone() for name, tensor in inner.state_dict().items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(state))
    (folder / NETWORK).write_text(network.model_dump_json(indent=2) + "\n")
    return module


def first_fault(error: ValidationError) -> str:
    """Return the first of pydantic's complaints, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg'].removeprefix('Value error, ')}"


def _with_weights(network: Network, weights: Path) -> models.Normalised:
    channels = network.input_shape[0]
    mean, std = _each(network.mean, channels, 0.0), _each(network.std, channels, 1.0)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"mean and std: expected {channels} numbers each, one a channel, got {len(mean)} and {len(std)}; "
            "give as many as the input has channels"
        )
    with torch.random.fork_rng(devices=[]):  # the weights that it draws are replaced
        inner = _made(network.factory, classes=len(network.class_names))
    _load(inner, _state(weights), weights)
    return models.Normalised(models.Normalise(mean=mean, std=std), inner).eval()


def _each(values: tuple[float, ...], channels: int, default: float) -> tuple[float, ...]:
    """Return a number a channel: those given, or one for all."""
    return (values or (default,)) * channels if len(values) <= 1 else values


def _made(factory: str, *, classes: int) -> nn.Module:
    try:
        function = models.imported(factory)
    except ValueError as error:
        raise ValueError(str(error).replace("model.factory", "--factory", 1)) from error
    keywords = {"num_classes": classes} if _takes(function, num_classes=classes) else {}
    if not keywords and not _takes(function):
        raise ValueError(
            f"--factory: expected a function of num_classes alone, or of nothing, got {factory!r}; "
            "write one that returns the network"
        )
    try:
        network = function(**keywords)
    except Exception as error:
        raise ValueError(f"--factory: {factory!r} failed: {models.first_line(error)}") from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise ValueError(f"--factory: expected a function that returns a torch.nn.Module, got {kind} from {factory!r}")
    return network


def _takes(function: Any, **keywords: int) -> bool:
    try:
        inspect.signature(function).bind(**keywords)
    except (TypeError, ValueError):  # ValueError: a built-in function that does not tell
        return False
    return True


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a state_dict, as safetensors or by torch.save")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a plain state_dict, got another pickled object, which is not read for safety's sake; "
            "save model.state_dict()"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a plain state_dict, as safetensors or as torch.load(weights_only=True) reads it, got "
            f"{models.first_line(error)}; save model.state_dict()"
        ) from error
    return _plain(loaded, path)


def _plain(loaded: object, path: Path) -> dict[str, Tensor]:
    """Find the state_dict in what others keep around it."""
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise ValueError(f"{path}: expected a state_dict, names to tensors, got another thing; save model.state_dict()")
    return loaded


def _load(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    for prefix in _PREFIXES:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{path}: expected numbers, got NaN or infinity in {_some(bad)}; the training has diverged")
    expected = network.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{path}: expected the network's weights, {_some(missing)} missing; name the right factory")
    if extra := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{path}: expected the network's weights alone, got {_some(extra)}; name the right factory")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name}: expected shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}; are the "
                "labels as many as the network's classes?"
            )
    network.load_state_dict(dict(state))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
