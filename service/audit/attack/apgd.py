"""Auto-PGD: projected gradient ascent that halves its own step, with cross-entropy or the difference of logits ratio.

clean --random start--> [ evaluate --> settled? out of the batch --> checkpoint: halve, back to the best? --> move ]
Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
2020, algorithm 1; with the published code's constants. An image leaves the batch at the first iterate that is
adversarial, as each image's path is its own; restarts and further target classes meet only those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import eagerpy as ep
import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs, verify_input_bounds

from service.audit.attack.ball import L2, LINF
from service.audit.attack.labels import labels_of, rivals
from service.audit.attack.loss import cross_entropy, dlr, targeted_dlr
from service.audit.attack.model import select, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import foolbox
    from foolbox.distances import Distance
    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    from service.audit.attack.ball import Ball

    # (logits, labels, rivals) -> a number for each image, higher when nearer to being adversarial.
    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of the whole steps: the first checkpoint, how much each interval is shorter than the last, and the shortest one.
_FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06
# The share of a step that is new; the rest goes on in the direction of the last one (alpha in the paper).
_NEW = 0.75
# The first step crosses the ball.
_FIRST_STEP = 2.0


@dataclass
class _Climb:
    """Images that are not adversarial yet, on their way up the loss; every field has an entry for each."""

    places: Int64[Tensor, " k"]  # in the batch
    clean: Float32[Tensor, "k c h w"]
    labels: Int64[Tensor, " k"]
    rivals: Int64[Tensor, " k"]
    current: Float32[Tensor, "k c h w"]
    previous: Float32[Tensor, "k c h w"]
    gradient: Float32[Tensor, "k c h w"]
    best: Float32[Tensor, "k c h w"]
    best_gradient: Float32[Tensor, "k c h w"]
    loss: Float32[Tensor, " k"]
    best_loss: Float32[Tensor, " k"]
    checked_loss: Float32[Tensor, " k"]  # the best one at the last checkpoint
    rises: Int64[Tensor, " k"]  # steps since then that raised the loss
    halved: Bool[Tensor, " k"]  # whether the last checkpoint halved the step
    step: Float32[Tensor, "k 1 1 1"]

    def kept(self, keep: Bool[Tensor, " k"]) -> _Climb:
        """Return the climb of some of the images."""
        return _Climb(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def record(self, losses: Float32[Tensor, " k"], gradient: Float32[Tensor, "k c h w"]) -> None:
        """Note what the current images gave."""
        self.rises += losses > self.loss
        self.loss, self.gradient = losses, gradient
        better = losses > self.best_loss
        self.best_loss = losses.where(better, self.best_loss)
        wide = better.view(-1, 1, 1, 1)
        self.best = self.current.where(wide, self.best)
        self.best_gradient = gradient.where(wide, self.best_gradient)

    def check(self, *, interval: int, rho: float) -> None:
        """Halve the step, and go back to the best image, where the loss has not risen often or far enough."""
        seldom = self.rises <= rho * interval
        halve = seldom | (~self.halved & (self.best_loss <= self.checked_loss))
        wide = halve.view(-1, 1, 1, 1)
        self.step = (self.step / 2).where(wide, self.step)
        self.current = self.best.where(wide, self.current)
        self.gradient = self.best_gradient.where(wide, self.gradient)
        self.halved, self.checked_loss = halve, self.best_loss
        self.rises = torch.zeros_like(self.rises)

    def move(self, ball: Ball, *, epsilon: float, new: float) -> None:
        """Take a step along the gradient and the last step."""
        ahead = self.current + self.step * ball.steepest(self.gradient)
        ahead = ball.inside(ahead, clean=self.clean, epsilon=epsilon)
        moved = self.current + new * (ahead - self.current) + (1 - new) * (self.current - self.previous)
        self.previous = self.current
        self.current = ball.inside(moved, clean=self.clean, epsilon=epsilon)


class _APGD(FixedEpsilonAttack):
    ball: Ball

    def __init__(self, *, steps: int, restarts: int, rho: float, generator: torch.Generator) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        if restarts < 1:
            raise ValueError(f"restarts: expected at least 1, got {restarts}")
        if not 0 < rho < 1:
            raise ValueError(f"rho: expected a share between 0 and 1, got {rho}")
        self.steps = steps
        self.restarts = restarts
        self.rho = rho
        self.generator = generator
        self._loss: Loss = cross_entropy
        self._checkpoints = checkpoints(steps)

    @property
    def distance(self) -> Distance:
        """The norm of the perturbations."""
        return self.ball.distance

    def run(self, model: foolbox.Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Return perturbed images: adversarial ones, and where there are none the highest losses of the last climb.

        Args:
            model: a `SearchModel`, or any Foolbox model over torch.
            inputs: (n, C, H, W) float32 in [0, 1].
            criterion: true classes, (n,) int64, or `Misclassification` of them.
            epsilon: the size that a perturbation may have.
            kwargs: none.
        """
        raise_if_kwargs(kwargs)
        inputs_, restore = ep.astensor_(inputs)
        verify_input_bounds(inputs_, model)
        clean, labels = inputs_.raw, labels_of(criterion)
        found = clean.clone()
        left = torch.arange(len(clean), device=clean.device)
        for aims in self._aims(model, clean, labels):
            if len(left) == 0:
                break
            climbed, done = self._climb(
                select(model, left), self._start(clean[left], labels[left], aims[left], epsilon), epsilon=epsilon
            )
            found[left] = climbed
            left = left[~done]
        return restore(ep.astensor(found))

    def _aims(self, _model: foolbox.Model, _clean: Tensor, labels: Tensor) -> Iterable[Tensor]:
        """Return the rival classes of each climb, (n,); losses that have none do not look at them."""
        return [labels] * self.restarts

    def _start(self, clean: Tensor, labels: Tensor, aims: Tensor, epsilon: float) -> _Climb:
        current = (clean + epsilon * self.ball.surface(clean, generator=self.generator)).clamp(0, 1)
        unknown = torch.full((len(clean),), -torch.inf, device=clean.device)
        return _Climb(
            places=torch.arange(len(clean), device=clean.device),
            clean=clean,
            labels=labels,
            rivals=aims,
            current=current,
            previous=current,
            gradient=torch.zeros_like(clean),
            best=current,
            best_gradient=torch.zeros_like(clean),
            loss=-unknown,  # so that the start itself is no rise
            best_loss=unknown,
            checked_loss=unknown,
            rises=torch.zeros_like(labels),
            halved=torch.ones_like(labels, dtype=torch.bool),
            step=torch.full((len(clean), 1, 1, 1), _FIRST_STEP * epsilon, device=clean.device),
        )

    def _climb(self, model: foolbox.Model, climb: _Climb, *, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return the images climbed to, and which of them are adversarial."""
        found = climb.current.clone()
        done = torch.zeros(len(found), dtype=torch.bool, device=found.device)
        for taken in range(self.steps + 1):
            logits = self._evaluate(model, climb, last=taken == self.steps)
            hit = settled(model, logits, climb.labels, epsilon=epsilon)
            if hit.any():
                found[climb.places[hit]], done[climb.places[hit]] = climb.current[hit], True
                model, climb = select(model, ~hit), climb.kept(~hit)
            if len(climb.places) == 0 or taken == self.steps:
                break
            if taken in self._checkpoints:
                climb.check(interval=self._checkpoints[taken], rho=self.rho)
            climb.move(self.ball, epsilon=epsilon, new=_NEW if taken else 1.0)
        found[climb.places] = climb.best
        return found, done

    def _evaluate(self, model: foolbox.Model, climb: _Climb, *, last: bool) -> Tensor:
        """Return logits; after the last step nothing moves any more, and so no gradient is taken."""
        if last:
            answers: Tensor = model(climb.current)
            climb.record(self._loss(answers, climb.labels, climb.rivals), climb.gradient)
            return answers
        images = climb.current.detach().requires_grad_()
        logits: Tensor = model(images)
        losses = self._loss(logits, climb.labels, climb.rivals)
        (gradient,) = torch.autograd.grad(losses.sum(), images)
        climb.record(losses.detach(), gradient)
        return logits.detach()


class _APGDCE(_APGD):
    def __init__(
        self,
        *,
        generator: torch.Generator,
        steps: int = 100,
        restarts: int = 1,
        loss: Literal["ce", "dlr"] = "ce",
        rho: float = 0.75,
    ) -> None:
        """Prepare the attack.

        Args:
            generator: of random starts.
            steps: of each climb.
            restarts: climbs, each from another random start, for the images that are left.
            loss: "ce" for cross-entropy, "dlr" for the difference of logits ratio (at least 3 classes).
            rho: share of steps that must raise the loss, or the step is halved.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__(steps=steps, restarts=restarts, rho=rho, generator=generator)
        losses: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr}
        if loss not in losses:
            raise ValueError(f'loss: expected "ce" or "dlr", got "{loss}"')
        self._loss = losses[loss]


class _APGDT(_APGD):
    def __init__(
        self,
        *,
        generator: torch.Generator,
        steps: int = 100,
        restarts: int = 1,
        targets: int = 9,
        rho: float = 0.75,
    ) -> None:
        """Prepare the attack.

        Args:
            generator: of random starts.
            steps: of each climb.
            restarts: climbs to each target class, for the images that are left.
            targets: classes aimed at in turn, the likeliest first; all others if there are fewer.
            rho: share of steps that must raise the loss, or the step is halved.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__(steps=steps, restarts=restarts, rho=rho, generator=generator)
        if targets < 1:
            raise ValueError(f"targets: expected at least 1, got {targets}")
        self.targets = targets
        self._loss = targeted_dlr

    def _aims(self, model: foolbox.Model, clean: Tensor, labels: Tensor) -> Iterable[Tensor]:
        ranked = rivals(model(clean), labels, most=self.targets)
        return [aims for aims in ranked.unbind(dim=1) for _ in range(self.restarts)]


class LinfAPGD(_APGDCE):
    """Auto-PGD within a maximum norm."""

    ball = LINF


class L2APGD(_APGDCE):
    """Auto-PGD within a Euclidean norm."""

    ball = L2


class LinfAPGDT(_APGDT):
    """Auto-PGD within a maximum norm, aimed at the likeliest wrong classes in turn (at least 4 classes)."""

    ball = LINF


class L2APGDT(_APGDT):
    """Auto-PGD within a Euclidean norm, aimed at the likeliest wrong classes in turn (at least 4 classes)."""

    ball = L2


def checkpoints(steps: int) -> dict[int, int]:
    """Return after how many steps Auto-PGD looks back, and over how many: section 3.1, equation for p."""
    interval, shorter, shortest = (max(int(share * steps), 1) for share in (_FIRST, _SHORTER, _SHORTEST))
    looks, taken = {}, interval
    while taken <= steps:
        looks[taken] = interval
        interval = max(interval - shorter, shortest)
        taken += interval
    return looks
