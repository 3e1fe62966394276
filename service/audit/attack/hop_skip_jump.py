"""HopSkipJump: the smallest perturbation by decisions alone, walking along the boundary.

start --bisect--> boundary --probes--> gradient --step, halved until it fools--> outside --bisect--> boundary --> ...

Source: Chen, Jordan, Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack", IEEE S&P 2020,
algorithm 2. Foolbox's own differs in what it gets wrong: it normalises the gradient over the whole batch, so that the
result depends on the batch; it loops until every image succeeds, and asserts that a target decides alike twice; it
clips to [0, 1] whatever the model's bounds; and it asks about one probe of each image at a time. Where the target
takes 8-bit images, probes closer than a grey level would all be the same image: they are set further apart here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import eagerpy as ep
import torch
from foolbox.attacks.base import MinimizationAttack, raise_if_kwargs, verify_input_bounds
from foolbox.distances import l2, linf

from service.audit.attack.labels import labels_of
from service.audit.attack.model import SearchModel, select

if TYPE_CHECKING:
    import foolbox
    from foolbox.distances import Distance
    from jaxtyping import Bool, Float32
    from torch import Tensor

# Images of uniform noise that are tried for one that fools the target: as many as the first gradient takes, since each
# is a query, and an image that nothing fools costs all of them.
_STARTS = 100

# Halvings of the way to the boundary; float32 tells no more apart.
_BISECTIONS = 24

# Halvings of a step that does not fool the target: a thousandth of it is no step.
_STEP_HALVINGS = 10

# Distance of the first probes from the boundary, as a share of the bounds' range (the paper's code).
_FIRST_PROBE = 0.1

# Bytes of probes at once: large enough to fill the target's batches, small enough for any image size.
_PROBE_BYTES = 16 << 20

# Against division by the norm of a gradient that is zero: all probes decided alike, and cancelled.
_TINY = 1e-12


@dataclass(frozen=True)
class _Walk:
    """The images that go on.

    Attributes:
        model: of these images.
        images: clean.
        labels: true classes.
        points: near the boundary, on the side that fooled the target when it was asked.
        best: the nearest of all points so far.
        places: in the batch that the attack was given.
    """

    model: foolbox.Model
    images: Tensor
    labels: Tensor
    points: Tensor
    best: Tensor
    places: Tensor

    def keep(self, rows: Bool[Tensor, " n"]) -> _Walk:
        """Return the walk of some of them."""
        return replace(
            self,
            model=select(self.model, rows),
            images=self.images[rows],
            labels=self.labels[rows],
            points=self.points[rows],
            best=self.best[rows],
            places=self.places[rows.cpu()],
        )

    def fools(self, candidates: Float32[Tensor, "kn c h w"]) -> Bool[Tensor, " kn"]:
        """Return which candidates fool the target: k for each image, all images once, then all again."""
        decided = self.model(candidates).argmax(dim=1)
        return torch.ne(decided, self.labels.repeat(len(candidates) // max(1, len(self.labels))))


class HopSkipJumpAttack(MinimizationAttack):
    """HopSkipJump with Euclidean or maximum distance."""

    def __init__(
        self,
        *,
        norm: Literal["l2", "linf"] = "l2",
        steps: int = 64,
        initial_gradient_eval_steps: int = 100,
        max_gradient_eval_steps: int = 10_000,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Prepare an attack.

        Args:
            norm: of the perturbations, "l2" or "linf".
            steps: along the boundary.
            initial_gradient_eval_steps: probes of the first step; of the t-th, sqrt(t) times as many.
            max_gradient_eval_steps: the most probes of a step.
            gamma: bisection ends at this / d^1.5 of the distance (l2) or / d^2 (linf), of d values in an image.
            generator: of all random choices; one seeded with 0 if there is none.

        Raises:
            ValueError: one of them is outside its range.
        """
        if norm not in ("l2", "linf"):
            raise ValueError(f'norm: expected "l2" or "linf", got "{norm}"')
        if min(steps, initial_gradient_eval_steps, max_gradient_eval_steps) < 1 or gamma <= 0:
            raise ValueError(
                f"steps, initial_gradient_eval_steps, max_gradient_eval_steps, gamma: expected at least 1 and gamma "
                f"above 0, got {steps}, {initial_gradient_eval_steps}, {max_gradient_eval_steps} and {gamma}"
            )
        self.norm = norm
        self.steps = steps
        self.initial_gradient_eval_steps = initial_gradient_eval_steps
        self.max_gradient_eval_steps = max_gradient_eval_steps
        self.gamma = gamma
        self.generator = generator or torch.Generator().manual_seed(0)

    @property
    def distance(self) -> Distance:
        """Foolbox's measure of the norm."""
        return l2 if self.norm == "l2" else linf

    @torch.no_grad()
    def run(
        self,
        model: foolbox.Model,
        inputs: Any,
        criterion: Any,
        *,
        early_stop: float | None = None,
        starting_points: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return for each image the nearest that fooled the target; the image itself where there is no start.

        Args:
            model: decides.
            inputs: (n, C, H, W) images within the model's bounds.
            criterion: the labels, or Foolbox's `Misclassification` of them.
            early_stop: images with a perturbation of at most this go on no further.
            starting_points: (n, C, H, W) images that fool the target; uniform noise is tried for the rows that do not,
                and for all if there are none.
            **kwargs: none.

        Raises:
            ValueError: any other criterion.
        """
        raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        verify_input_bounds(wrapped, model)
        images, labels = wrapped.raw, labels_of(criterion)
        starts = images if starting_points is None else ep.astensor(starting_points).raw
        result = images.clone()
        walk = _Walk(model, images, labels, starts, images, torch.arange(len(images)))
        walk = self._started(walk, given=starting_points is not None)
        walk = replace(walk, points=self._bisect(walk, walk.points))
        walk = replace(walk, best=walk.points)
        for step in range(self.steps):
            result[walk.places] = walk.best
            walk = walk.keep(self._unfinished(walk, early_stop))
            if len(walk.places) == 0:
                break
            walk = self._step(walk, step)
        result[walk.places] = walk.best
        return restore(ep.astensor(result))

    def _started(self, walk: _Walk, *, given: bool) -> _Walk:
        """Return the walk of the images that have a start which fools the target."""
        points = walk.points.clone()
        found = walk.fools(points) if given and len(points) else torch.zeros(len(points), dtype=torch.bool)
        found = found.to(points.device)
        missing, rest = torch.nonzero(~found).flatten(), walk.keep(~found)
        for _ in range(_STARTS if len(missing) else 0):
            noise = self._uniform(tuple(rest.points.shape), *walk.model.bounds).to(points)
            hit = rest.fools(noise).to(points.device)
            if not hit.any():
                continue
            points[missing[hit]] = noise[hit]
            found[missing[hit]] = True
            missing, rest = missing[~hit], rest.keep(~hit)
            if len(missing) == 0:
                break
        return replace(walk, points=points).keep(found)

    def _unfinished(self, walk: _Walk, early_stop: float | None) -> Bool[Tensor, " n"]:
        """Return which images are worth more queries, and have any."""
        if isinstance(walk.model, SearchModel):
            return torch.isin(walk.model.rows, walk.model.search.open(early_stop))
        return self._size(walk.best - walk.images) > (0.0 if early_stop is None else early_stop)

    def _step(self, walk: _Walk, step: int) -> _Walk:
        """Estimate the gradient, step along it, return to the boundary."""
        sizes = self._size(walk.points - walk.images)
        count = min(int(self.initial_gradient_eval_steps * math.sqrt(step + 1)), self.max_gradient_eval_steps)
        gradients = self._gradients(walk, self._probe_sizes(walk, sizes, first=step == 0), count)
        update = gradients.sign() if self.norm == "linf" else gradients
        outside, moved = self._leap(walk, update, sizes / math.sqrt(step + 1))
        points = walk.points.clone()
        if moved.any():
            points[moved] = self._bisect(walk.keep(moved), outside[moved])
        nearer = self._size(points - walk.images) < self._size(walk.best - walk.images)
        return replace(walk, points=points, best=torch.where(_rows(nearer), points, walk.best))

    def _probe_sizes(self, walk: _Walk, sizes: Float32[Tensor, " n"], *, first: bool) -> Float32[Tensor, " n"]:
        """Return how far the probes are from the points, Euclidean (the paper's section 4.3)."""
        low, high = walk.model.bounds
        values = walk.images[0].numel()
        wanted = torch.full_like(sizes, _FIRST_PROBE * (high - low)) if first else self.gamma * sizes / values
        # A grey level in every value, root mean square: rounding then leaves the probe's direction.
        return wanted.clamp(min=_grey_level(walk.model) * math.sqrt(values))

    def _gradients(self, walk: _Walk, deltas: Float32[Tensor, " n"], count: int) -> Float32[Tensor, "n c h w"]:
        """Estimate the boundary's normals from count probes each (the paper's equation 16), of norm 1 each."""
        at_once = max(1, _PROBE_BYTES // (walk.points.nbytes or 1))
        total, weighted = torch.zeros_like(walk.points), torch.zeros_like(walk.points)
        votes = torch.zeros(len(walk.points), device=walk.points.device)
        for done in range(0, count, at_once):
            probes = self._probes(walk, deltas, min(at_once, count - done))
            decisions = walk.fools(probes.flatten(0, 1)).view(probes.shape[:2]).to(probes) * 2 - 1
            directions = probes.sub_(walk.points).flatten(2)
            total += directions.sum(dim=0).view_as(total)
            weighted += torch.einsum("kn,knd->nd", decisions, directions).view_as(weighted)
            votes += decisions.sum(dim=0)
        mean = votes / count
        # The mean as a baseline lowers the variance; where all decided alike it would leave nothing.
        baseline = torch.where(mean.abs() == 1, 0.0, mean)
        gradients = weighted - _rows(baseline) * total
        return gradients / _rows(gradients.flatten(1).norm(dim=1) + _TINY)

    def _probes(self, walk: _Walk, deltas: Float32[Tensor, " n"], count: int) -> Float32[Tensor, "k n c h w"]:
        """Return points at a distance in random directions, within the bounds, as they are sent."""
        shape = (count, *walk.points.shape)
        if self.norm == "l2":
            noise = torch.randn(shape, generator=self.generator, device=self.generator.device).to(walk.points)
        else:
            noise = self._uniform(shape, -1, 1).to(walk.points)
        lengths = torch.linalg.vector_norm(noise.flatten(2), dim=2)
        noise *= (deltas / (lengths + _TINY))[:, :, None, None, None]
        return _sent(walk.model, noise.add_(walk.points))

    def _leap(
        self, walk: _Walk, update: Float32[Tensor, "n c h w"], lengths: Float32[Tensor, " n"]
    ) -> tuple[Float32[Tensor, "n c h w"], Bool[Tensor, " n"]]:
        """Return points further outside, and for which a step was short enough to find one."""
        outside = walk.points.clone()
        moved = torch.zeros(len(outside), dtype=torch.bool, device=outside.device)
        for halvings in range(_STEP_HALVINGS):
            rest = torch.nonzero(~moved).flatten()
            if len(rest) == 0:
                break
            steps = _rows(lengths[rest] / 2**halvings) * update[rest]
            candidates = (walk.points[rest] + steps).clamp(*walk.model.bounds)
            hit = walk.keep(~moved).fools(candidates).to(moved.device)
            outside[rest[hit]] = candidates[hit]
            moved[rest[hit]] = True
        return outside, moved

    def _bisect(self, walk: _Walk, outside: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n c h w"]:
        """Return points close to the boundary, on the way from outside to the images; each has fooled the target."""
        perturbations = outside - walk.images
        whole = far = self._size(perturbations)
        near = torch.zeros_like(far)
        for _ in range(self._bisections(walk) if len(outside) else 0):
            middle = (near + far) / 2
            hit = walk.fools(walk.images + self._shortened(perturbations, whole, middle)).to(far.device)
            near, far = torch.where(hit, near, middle), torch.where(hit, middle, far)
        return walk.images + self._shortened(perturbations, whole, far)

    def _bisections(self, walk: _Walk) -> int:
        """Return how many halvings reach the threshold of theta, or half a grey level."""
        power = 1.5 if self.norm == "l2" else 2.0
        wanted = math.ceil(math.log2(max(2.0, walk.images[0].numel() ** power / self.gamma)))
        level = _grey_level(walk.model)
        return min(wanted, _BISECTIONS, math.ceil(math.log2(2 / level)) if level else _BISECTIONS)

    def _shortened(
        self, perturbations: Float32[Tensor, "n c h w"], sizes: Float32[Tensor, " n"], wanted: Float32[Tensor, " n"]
    ) -> Float32[Tensor, "n c h w"]:
        """Return perturbations of some sizes, projected to those wanted: scaled (l2) or clipped (linf)."""
        if self.norm == "linf":
            limits = _rows(wanted)
            return perturbations.clamp(-limits, limits)
        return perturbations * _rows(wanted / sizes.clamp(min=_TINY))

    def _size(self, perturbations: Float32[Tensor, "n c h w"]) -> Float32[Tensor, " n"]:
        flat = perturbations.flatten(1)
        return flat.norm(dim=1) if self.norm == "l2" else flat.abs().amax(dim=1)

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        unit = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return unit.mul_(high - low).add_(low)


def _rows(values: Tensor) -> Tensor:
    """Return (n,) values as (n, 1, 1, 1)."""
    return values[:, None, None, None]


def _grey_level(model: foolbox.Model) -> float:
    return model.search.target.domain.step if isinstance(model, SearchModel) else 0.0


def _sent(model: foolbox.Model, images: Tensor) -> Tensor:
    """Return images within the bounds, and rounded where the target takes grey levels."""
    images = images.clamp_(*model.bounds)
    return model.search.target.domain.sent(images) if isinstance(model, SearchModel) else images
