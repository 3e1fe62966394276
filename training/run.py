"""All that changes during a training run: it begins, is preserved after each epoch, and is taken up again.

Everything goes into one file (`checkpoint.save_partial`): tensors by name, the rest as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from training import checkpoint, models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from training.recipe import Recipe


@dataclass
class Progress:
    """What a run has come to, in plain JSON values; accuracies are shares in [0, 1]."""

    epoch: int = 0
    iterations: int = 0
    tenet_steps: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = 0.0


@dataclass
class Run:
    """A run's model, optimiser, streams of random numbers, best weights and progress.

    The order of the images and the centres of TENET have a stream each, so that runs with and without TENET
    see the same batches.
    """

    model: nn.Module
    optimizer: torch.optim.SGD
    shuffling: torch.Generator
    centres: torch.Generator
    best: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def end_epoch(self, *, accuracy: float, seconds: float) -> None:
        """Count an epoch, and keep its weights if no epoch validated better."""
        self.progress.epoch += 1
        self.progress.seconds += seconds
        if accuracy >= self.progress.best_accuracy:  # of equals the later: its learning rate was lower
            self.progress.best_epoch, self.progress.best_accuracy = self.progress.epoch, accuracy
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def begin(recipe: Recipe, *, classes: int, device: torch.device) -> Run:
    """Begin a run from the recipe's seed; PyTorch's own random state stays as it was."""
    settings = recipe.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = models.build(recipe.model, classes=classes)
    model.to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    shuffling, centres = (torch.Generator().manual_seed(2 * settings.seed + stream) for stream in (0, 1))
    return Run(model=model, optimizer=optimizer, shuffling=shuffling, centres=centres)


def preserve(run: Run, path: Path, *, recipe: Recipe, data: Mapping[str, str]) -> None:
    """Save a run between two epochs; `data` are the fingerprints of its data, by part."""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    for name, parameter in run.model.named_parameters():
        momentum = run.optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors["generator.shuffling"] = run.shuffling.get_state()
    tensors["generator.centres"] = run.centres.get_state()
    record = {"recipe": recipe.model_dump(mode="json"), "data": dict(data), "progress": asdict(run.progress)}
    checkpoint.save_partial(path, tensors=tensors, record=record)


def take_up(run: Run, path: Path, *, recipe: Recipe, data: Mapping[str, str]) -> None:
    """Bring a run that has just begun to where a preserved one was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another recipe or other data.
    """
    tensors, record = checkpoint.load_partial(path)
    try:
        _refuse_change("recipe", path, before=record["recipe"], now=recipe.model_dump(mode="json"))
        _refuse_change("data", path, before=record["data"], now=data)
        _restore(run, tensors, record)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # contents that this version did not write
        raise checkpoint.damaged_partial(path) from error


def _refuse_change(what: str, path: Path, *, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [part for part in now if before.get(part) != now[part]]
    if changed:
        msg = f"{path}: expected the {what} that the run began with, got a change in {', '.join(changed)}; "
        raise ValueError(msg + f"restore the {what}, or remove {path} and start again")


def _restore(run: Run, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    run.model.load_state_dict(_part(tensors, "model"))
    run.best = _part(tensors, "best")
    momentum = _part(tensors, "momentum")
    for name, parameter in run.model.named_parameters():
        if name in momentum:
            run.optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter.device)
    run.shuffling.set_state(tensors["generator.shuffling"])
    run.centres.set_state(tensors["generator.centres"])
    run.progress = Progress(**record["progress"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
