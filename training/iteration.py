"""One batch: augmented, perhaps perturbed, then one ordinary step and, when it is due, a TENET step.

uint8 batch -> augment.views -> natural | PGD | free replays -> ordinary step [-> TENET step] -> sums

A free replay is an iteration of its own: the schedule and TENET's interval count it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from training import adversarial, augment, schedule
from training.recipe import PgdAdversarial
from training.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Int64, UInt8

    from training.objective import Chosen, Objective, Step
    from training.processes import Processes
    from training.recipe import Recipe
    from training.run import Run


@dataclass(frozen=True)
class Iteration:
    """How a recipe treats each batch of a run of `total` iterations."""

    recipe: Recipe
    run: Run
    objective: Objective
    averaged: nn.Module  # the objective, with gradients averaged over processes
    processes: Processes
    total: int

    def __call__(self, images: UInt8[Tensor, "part height width 3"], labels: Int64[Tensor, " part"]) -> None:
        """Train on this process's part of a batch; loss and hits are added to the run's sums."""
        with self._own_random_state():
            for views in self._views(images, labels):
                self._lower(views, labels)

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Seed PyTorch's own generators, which dropout draws from, for this batch and process, and put them back."""
        batch = (self.run.progress.iterations, self.processes.number)
        seed = np.random.SeedSequence(self.recipe.training.seed, spawn_key=batch).generate_state(1, np.uint64)
        device = self.processes.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed[0]))
            yield

    def _views(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield what each iteration on a batch is given; of free replays, the gradient is asked for and taken."""
        settings, run = self.recipe.adversarial, self.run
        views = augment.views(images, self.recipe.augmentation, stream=self._stream("augmentation"))
        if settings is None:
            yield self._laid_out(torch.cat(views))
        elif isinstance(settings, PgdAdversarial):
            with self._autocast():
                attacked = adversarial.pgd(
                    views[0], labels, model=run.model, settings=settings, stream=self._stream("attack")
                )
            yield self._laid_out(attacked)
        else:
            assert run.perturbation is not None
            for _ in range(settings.replays):
                perturbed = run.perturbation.perturbed(views[0])
                yield perturbed
                assert perturbed.grad is not None
                run.perturbation.update(perturbed.grad)

    def _lower(self, views: Tensor, labels: Tensor) -> None:
        run, progress = self.run, self.run.progress
        settings = self.recipe.training
        share = schedule.rate(progress.iterations / self.total, settings)
        for group in run.optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        progress.iterations += 1
        due = self._due(progress.iterations)
        fused = self.recipe.tenet is not None and self.recipe.tenet.fused
        loss, tenet_loss, logits = self._step(views, labels, step="fused" if due and fused else "ordinary")
        assert logits is not None
        if due and not fused:
            chosen = self.objective.choose(logits, labels)
            if chosen is not None:
                clean = views.detach()[: len(labels)]
                _, tenet_loss, _ = self._step(clean, labels, step="tenet", chosen=chosen)
        if run.average is not None:
            run.average.update_parameters(run.model)
        self._count(loss - tenet_loss if due and fused and tenet_loss is not None else loss, tenet_loss, logits, labels)

    def _step(
        self, images: Tensor, labels: Tensor, *, step: Step, chosen: Chosen | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        optimizer = self.run.optimizer
        with self._autocast():
            loss, tenet_loss, logits = self.averaged(images, labels, step=step, chosen=chosen)
        optimizer.zero_grad()
        loss.backward()
        if self.recipe.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.run.model.parameters(), self.recipe.training.clip_norm)
        optimizer.step()
        return loss.detach(), tenet_loss, logits

    def _count(self, loss: Tensor, tenet_loss: Tensor | None, logits: Tensor, labels: Tensor) -> None:
        count, taken = len(labels), int(tenet_loss is not None)
        tenet = torch.zeros_like(loss) if tenet_loss is None else tenet_loss
        right = (logits.argmax(1) == labels).sum()
        # added one by one: a tensor that is made of numbers on the CPU would wait for the device
        summands: tuple[Tensor | float, ...] = (loss * count, count, right, tenet, taken)
        for place, value in enumerate(summands):
            self.run.sums[place] += value
        self.run.progress.tenet_steps += taken

    def _due(self, iterations: int) -> bool:
        tenet = self.recipe.tenet
        return tenet is not None and iterations >= tenet.start and iterations % tenet.interval == 0

    def _stream(self, name: str) -> Stream:
        return Stream(self.run.generators[name], self.processes.number, self.processes.count)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.training.channels_last else images

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.recipe.training.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)
