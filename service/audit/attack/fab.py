"""FAB-T: the fast adaptive boundary attack, aimed at the likeliest wrong classes in turn; it minimises perturbations.

at x: the plane on which the rival's logit equals the label's, to first order
  --> from x and from the clean image to that plane --> between the two, a little beyond --> adversarial?
      yes: keep the nearest, go back towards the clean image; near enough? out of the batch
Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", 2020, algorithm 1,
aimed as in "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import eagerpy as ep
import torch
from foolbox.attacks.base import MinimizationAttack, raise_if_kwargs, verify_input_bounds

from service.audit.attack.ball import L2, LINF
from service.audit.attack.hyperplane import to_hyperplane_l2, to_hyperplane_linf
from service.audit.attack.labels import labels_of, rivals
from service.audit.attack.model import SearchModel, select

if TYPE_CHECKING:
    from collections.abc import Callable

    import foolbox
    from foolbox.distances import Distance
    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    from service.audit.attack.ball import Ball

# A plane nearer than this counts as this far, so that the weights of the two projections stay finite.
_NEAREST = 1e-8


@dataclass
class _Walk:
    """Images on their way along the boundary; every field has an entry for each."""

    places: Int64[Tensor, " k"]  # in the batch
    clean: Float32[Tensor, "k c h w"]
    labels: Int64[Tensor, " k"]
    rivals: Int64[Tensor, " k"]
    current: Float32[Tensor, "k c h w"]

    def kept(self, keep: Bool[Tensor, " k"]) -> _Walk:
        """Return the walk of some of the images."""
        return _Walk(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


@dataclass
class _Nearest:
    """The nearest adversarial images so far, of the whole batch."""

    images: Float32[Tensor, "n c h w"]
    sizes: Float32[Tensor, " n"]

    def keep(self, places: Int64[Tensor, " k"], images: Float32[Tensor, "k c h w"], sizes: Tensor) -> None:
        """Keep adversarial images that are nearer than those before."""
        nearer = sizes < self.sizes[places]
        self.images[places[nearer]] = images[nearer]
        self.sizes[places[nearer]] = sizes[nearer]


class _FABT(MinimizationAttack):
    ball: Ball
    radius: float

    def __init__(
        self,
        *,
        generator: torch.Generator,
        steps: int = 100,
        restarts: int = 1,
        targets: int = 9,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
    ) -> None:
        """Prepare the attack.

        Args:
            generator: of random starts; the first walk to each class starts at the clean image.
            steps: of each walk.
            restarts: walks to each target class.
            targets: classes aimed at in turn, the likeliest first; all others if there are fewer.
            alpha_max: the most that the clean image's projection weighs, in [0, 1].
            eta: how far beyond the plane a step goes, at least 1 (1: to the plane).
            beta: how much of its perturbation an adversarial image keeps, in (0, 1).

        Raises:
            ValueError: a number is out of its range.
        """
        for name, count in (("steps", steps), ("restarts", restarts), ("targets", targets)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not 0 <= alpha_max <= 1:
            raise ValueError(f"alpha_max: expected a number in [0, 1], got {alpha_max}")
        if eta < 1:
            raise ValueError(f"eta: expected at least 1, got {eta}")
        if not 0 < beta < 1:
            raise ValueError(f"beta: expected a number between 0 and 1, got {beta}")
        self.generator = generator
        self.steps = steps
        self.restarts = restarts
        self.targets = targets
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta

    @property
    def distance(self) -> Distance:
        """The norm of the perturbations."""
        return self.ball.distance

    def run(
        self, model: foolbox.Model, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any
    ) -> Any:
        """Return the nearest adversarial images found; clean ones where none was.

        Args:
            model: a `SearchModel`, or any Foolbox model over torch.
            inputs: (n, C, H, W) float32 in [0, 1].
            criterion: true classes, (n,) int64, or `Misclassification` of them.
            early_stop: a perturbation as small as this is small enough; None to go on as long as there are steps.
            kwargs: none.
        """
        raise_if_kwargs(kwargs)
        inputs_, restore = ep.astensor_(inputs)
        verify_input_bounds(inputs_, model)
        clean, labels = inputs_.raw, labels_of(criterion)
        logits = model(clean)
        nearest = _Nearest(clean.clone(), torch.full((len(clean),), torch.inf, device=clean.device))
        wrong = torch.ne(logits.argmax(dim=1), labels)
        nearest.sizes[wrong] = 0.0
        aims = rivals(logits, labels, most=self.targets)
        for walk_number in range(aims.shape[1] * self.restarts):
            left = ~self._near(model, nearest.sizes, early_stop)
            if not left.any():
                break
            walk = _Walk(
                places=torch.nonzero(left).flatten(),
                clean=clean[left],
                labels=labels[left],
                rivals=aims[left, walk_number // self.restarts],
                current=clean[left],
            )
            if walk_number % self.restarts:
                walk.current = self._elsewhere(walk.clean, early_stop)
            self._walk(select(model, left), walk, nearest, early_stop=early_stop)
        return restore(ep.astensor(nearest.images))

    def _elsewhere(self, clean: Tensor, early_stop: float | None) -> Tensor:
        """Return random starts, half as far away as is of interest."""
        radius = early_stop or self.radius
        return (clean + radius / 2 * self.ball.surface(clean, generator=self.generator)).clamp(0, 1)

    def _walk(self, model: foolbox.Model, walk: _Walk, nearest: _Nearest, *, early_stop: float | None) -> None:
        for _ in range(self.steps):
            walk.current = self._step(walk, *_boundary(model, walk))
            hit = torch.ne(model(walk.current).argmax(dim=1), walk.labels)
            if not hit.any():
                continue
            sizes = self.ball.size(walk.current - walk.clean)
            nearest.keep(walk.places[hit], walk.current[hit], sizes[hit])
            near = self._near(model, nearest.sizes[walk.places], early_stop)
            back = walk.clean + self.beta * (walk.current - walk.clean)
            walk.current = back.where(hit.view(-1, 1, 1, 1), walk.current)
            if near.any():
                model, walk = select(model, ~near), walk.kept(~near)
            if len(walk.places) == 0:
                return

    def _step(self, walk: _Walk, gaps: Tensor, normals: Tensor) -> Tensor:
        """Return where algorithm 1 goes, given <normal, current> - offset and the normals of the planes."""
        flat = normals.flatten(1)
        gaps_of_clean = gaps + ((walk.clean - walk.current).flatten(1) * flat).sum(dim=1)
        points = torch.cat((walk.current, walk.clean)).flatten(1)
        changes = self._to_hyperplane(points, torch.cat((flat, flat)), torch.cat((gaps, gaps_of_clean)))
        here, there = changes.view(-1, *normals.shape[1:]).chunk(2)
        near, far = (self.ball.size(change).clamp_min(_NEAREST) for change in (here, there))
        alpha = (near / (near + far)).clamp_max(self.alpha_max).view(-1, 1, 1, 1)
        biased = (1 - alpha) * (walk.current + self.eta * here) + alpha * (walk.clean + self.eta * there)
        return biased.clamp(0, 1)

    @staticmethod
    def _near(model: foolbox.Model, sizes: Float32[Tensor, " k"], early_stop: float | None) -> Bool[Tensor, " k"]:
        """Return which images need no more work: the target's word counts where there is one."""
        limit = 0.0 if early_stop is None else early_stop
        if isinstance(model, SearchModel) and model.every:
            return model.settled(limit).to(sizes.device)
        return sizes <= limit

    _to_hyperplane: Callable[[Tensor, Tensor, Tensor], Tensor]


class LinfFABT(_FABT):
    """FAB-T with the maximum norm."""

    ball = LINF
    radius = 0.3
    _to_hyperplane = staticmethod(to_hyperplane_linf)


class L2FABT(_FABT):
    """FAB-T with the Euclidean norm."""

    ball = L2
    radius = 1.0
    _to_hyperplane = staticmethod(to_hyperplane_l2)


def _boundary(model: foolbox.Model, walk: _Walk) -> tuple[Float32[Tensor, " k"], Float32[Tensor, "k c h w"]]:
    """Return the label's lead over its rival, negated, and its gradient: gaps and normals of the planes.

    The target is not asked: it has been, or will be, about the same image.
    """
    if isinstance(model, SearchModel):
        model = SearchModel(model.search, model.rows, source=model.source, every=False)
    images = walk.current.detach().requires_grad_()
    logits: Tensor = model(images)
    leads = (logits.gather(1, walk.rivals[:, None]) - logits.gather(1, walk.labels[:, None])).squeeze(1)
    (normals,) = torch.autograd.grad(leads.sum(), images)
    return leads.detach(), normals
