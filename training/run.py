"""All that changes during a training run: it begins, is preserved between two batches, and is taken up again.

Everything goes into one file (`checkpoint.save_state`): tensors by name, the rest as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training import checkpoint, models
from training.adversarial import FreePerturbation
from training.recipe import FreeAdversarial

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer

    from training.processes import Processes
    from training.recipe import Recipe, Training

Tensors = tuple[Tensor, ...] | list[Tensor]
STREAMS = ("augmentation", "centres", "attack")  # each with a generator of its own
SUMS = ("loss", "images", "correct", "tenet_loss", "tenet_steps")  # of an epoch so far, over all processes


@dataclass
class Progress:
    """What a run has come to, in plain JSON values; accuracies are shares in [0, 1].

    `batch` counts those of the epoch that is under way.
    """

    epoch: int = 0
    batch: int = 0
    iterations: int = 0
    tenet_steps: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0
    best_accuracy: float = 0.0


@dataclass
class Run:
    """A run's model, optimiser, averaged weights, streams of random numbers, best weights, sums and progress.

    Augmentation, the centres of TENET and attacks have a stream each, and the order of the images is made from
    the seed alone, so that runs with and without TENET see the same batches. `sums` are this process's part.
    """

    model: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    generators: dict[str, torch.Generator]
    perturbation: FreePerturbation | None
    sums: Tensor
    best: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @property
    def deployed(self) -> nn.Module:
        """Return the model that is validated, tested and saved: of averaged weights where there are any."""
        if self.average is None:
            return self.model
        module: nn.Module = self.average.module
        return module

    def end_epoch(self, *, accuracy: float, robust_accuracy: float | None) -> None:
        """Count an epoch, and keep its weights if no epoch validated better: on attacked images if there are any."""
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self.sums.zero_()
        score = accuracy if robust_accuracy is None else robust_accuracy
        if score >= progress.best_score:  # of equals the later: its learning rate was lower
            progress.best_epoch, progress.best_score, progress.best_accuracy = progress.epoch, score, accuracy
            self.best = {name: tensor.clone() for name, tensor in self.deployed.state_dict().items()}


def begin(recipe: Recipe, *, classes: int, processes: Processes) -> Run:
    """Begin a run from the recipe's seed; PyTorch's own random state stays as it was.

    Raises:
        ValueError: there is no such model, or it cannot be saved.
    """
    settings = recipe.training
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        model: nn.Module = models.build(recipe.model, classes=classes)
    _refuse_tied(model)
    model.to(processes.device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if settings.sync_batch_norm:
        model = processes.normalising(model)
    generators = {name: torch.Generator().manual_seed(4 * settings.seed + i) for i, name in enumerate(STREAMS)}
    return Run(
        model=model,
        optimizer=_optimizer(model, settings),
        average=_average(model, decay=settings.ema),
        generators=generators,
        perturbation=FreePerturbation(recipe.adversarial) if isinstance(recipe.adversarial, FreeAdversarial) else None,
        sums=torch.zeros(len(SUMS), dtype=torch.float64, device=processes.device),
    )


def _refuse_tied(model: nn.Module) -> None:
    """Raise ValueError where two parameters are one tensor, which weights by name cannot tell."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            msg = f"model: expected parameters of their own, got {names[parameter]} and {name} that are one tensor; "
            raise ValueError(msg + "give each layer its own")
        names[parameter] = name


def _optimizer(model: nn.Module, settings: Training) -> Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )


def _average(model: nn.Module, *, decay: float) -> AveragedModel | None:
    if decay == 0:
        return None

    def update(averages: Tensors, values: Tensors, averaged: Tensor | int) -> None:
        done = int(averaged)  # on the CPU
        get_ema_multi_avg_fn(min(decay, (1 + done) / (10 + done)))(averages, values, averaged)  # type: ignore[no-untyped-call]

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def preserve(run: Run, path: Path, *, recipe: Recipe, data: Mapping[str, str], processes: Processes) -> None:
    """Save a run between two batches; `data` are the fingerprints of its data, by part.

    All processes take part, and the main one writes.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    sums = processes.sum(run.sums)
    run.sums.copy_(sums if processes.main else torch.zeros_like(sums))
    tensors = {"sums": sums}
    if run.perturbation is not None and run.perturbation.state is not None:
        tensors["perturbation"] = processes.join_rows(run.perturbation.state)
    if not processes.main:
        return
    tensors |= {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    tensors |= {f"generator.{name}": generator.get_state() for name, generator in run.generators.items()}
    if run.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in run.average.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        for key, tensor in run.optimizer.state[parameter].items():
            if isinstance(tensor, Tensor):
                tensors[f"optimizer.{key}.{name}"] = tensor
    record = {"recipe": recipe.model_dump(mode="json"), "data": dict(data), "progress": asdict(run.progress)}
    checkpoint.save_state(path, tensors=tensors, record=record)


def take_up(run: Run, path: Path, *, recipe: Recipe, data: Mapping[str, str], processes: Processes) -> None:
    """Bring a run that has just begun to where a preserved one was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another recipe or other data.
    """
    tensors, record = checkpoint.load_state(path)
    try:
        _refuse_change("recipe", path, before=record["recipe"], now=recipe.model_dump(mode="json"))
        _refuse_change("data", path, before=record["data"], now=data)
        _restore(run, tensors, record, processes=processes)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # contents that this version did not write
        raise checkpoint.damaged_state(path) from error


def _refuse_change(what: str, path: Path, *, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [part for part in now if before.get(part) != now[part]]
    if changed:
        msg = f"{path}: expected the {what} that the run began with, got a change in {', '.join(changed)}; "
        raise ValueError(msg + f"restore the {what}, or remove {path.parent} and start again")


def _restore(run: Run, tensors: dict[str, Tensor], record: Mapping[str, Any], *, processes: Processes) -> None:
    device = run.sums.device
    run.model.load_state_dict(_part(tensors, "model"))
    run.best = {name: tensor.to(device) for name, tensor in _part(tensors, "best").items()}
    for name, generator in run.generators.items():
        generator.set_state(tensors[f"generator.{name}"])
    if run.average is not None:
        run.average.load_state_dict(_part(tensors, "average"))
    if run.perturbation is not None and "perturbation" in tensors:
        run.perturbation.state = processes.own_rows(tensors["perturbation"]).to(device)
    run.sums.copy_(tensors["sums"] if processes.main else torch.zeros_like(tensors["sums"]))
    _restore_optimizer(run, _part(tensors, "optimizer"))
    run.progress = Progress(**record["progress"])


def _restore_optimizer(run: Run, tensors: dict[str, Tensor]) -> None:
    parameters = dict(run.model.named_parameters())
    for path, tensor in tensors.items():
        key, _, name = path.partition(".")
        parameter = parameters[name]
        # AdamW counts its steps in a tensor that stays on the CPU
        place = tensor if key == "step" else tensor.to(parameter.device)
        run.optimizer.state[parameter][key] = place


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
