"""Inputs within epsilon on which two engines differ, as an engine and its int8 version do.

images --changes--> target, reference --different classes?--> found
            ^                 |
            '-- smaller product of the margins: by gradients of both, or by random squares

The margins are of the class that both see in the clean image: m of the target, r of the reference. They differ in it
exactly if m r < 0, and m r = ((m + r) / 2)^2 - ((m - r) / 2)^2: less of it is nearer to the decision boundary and
further apart. To keep random changes that bring two models apart is the idea of Tian et al., "Finding deviated
behaviors of the compressed DNN models for image classifications" (DFLARE), TOSEM 2023; the gradients are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import eagerpy as ep
import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs, verify_input_bounds
from foolbox.distances import l2, linf

from service.audit.attack.labels import labels_of
from service.audit.attack.model import SearchModel
from service.audit.attack.random_search import random_search
from service.audit.attack.square import L2Squares, LinfSquares, margin

if TYPE_CHECKING:
    import foolbox
    from foolbox.distances import Distance
    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    from service.audit.attack.model import Source
    from service.audit.target.base import Target

# The first and the last step of a gradient, as shares of epsilon: across the ball at first, and fine enough at last to
# land between two decision boundaries that lie close together.
_FIRST_STEP = 0.5
_LAST_STEP = 0.01

_TINY = 1e-12


class Differs:
    """The goal of a search (`Search(..., goal=)`): the reference sees another class in a candidate than the target.

    Attributes:
        classes: (n,) the class that the reference sees in the clean image; -1 before it was asked.
        logits: (n, classes) the reference's last answer for each image.
    """

    def __init__(self, target: Target, reference: Target, *, n: int) -> None:
        """Prepare a goal.

        Args:
            target: of the search.
            reference: is asked about the same candidates, rounded once more if it takes 8-bit images only.
            n: images of the search.

        Raises:
            ValueError: the two do not classify the same images into as many classes.
        """
        ours, others = (
            (len(target.class_names), target.image_shape),
            (len(reference.class_names), reference.image_shape),
        )
        if ours != others:
            raise ValueError(
                f"reference {reference.name}: expected {ours[0]} classes of images {ours[1]}, as {target.name} has, "
                f"got {others[0]} of {others[1]}; compare models of the same task"
            )
        self._reference = reference
        self.classes = torch.full((n,), -1)
        self.logits = torch.zeros(n, ours[0])

    def __call__(
        self,
        rows: Int64[Tensor, " k"],
        candidates: Float32[Tensor, "k c h w"],
        logits: Float32[Tensor, "k classes"],
    ) -> Bool[Tensor, " k"]:
        """Return for which candidates the two differ."""
        sent = self._reference.domain.sent(candidates).contiguous()
        answers = torch.from_numpy(self._reference(sent.numpy()))
        seen = answers.argmax(dim=1)
        new = self.classes[rows] < 0
        self.classes[rows[new]] = seen[new]
        self.logits[rows] = answers
        return torch.ne(seen, logits.argmax(dim=1))


class Disagreement(FixedEpsilonAttack):
    """The search for inputs on which target and reference differ; for a `SearchModel` of a search whose goal it is."""

    def __init__(
        self,
        differs: Differs,
        *,
        norm: Literal["linf", "l2"] = "linf",
        reference_source: Source | None = None,
        steps: int = 100,
        queries: int = 1000,
        share: float = 0.8,
        generator: torch.Generator | None = None,
    ) -> None:
        """Prepare an attack.

        Args:
            differs: the search's goal.
            norm: of perturbations, "linf" or "l2".
            reference_source: gives the reference's gradients, as the model's source gives the target's; where either
                is missing, random squares are tried.
            steps: along gradients, a query each.
            queries: an image may have without gradients.
            share: of the image that the first squares cover, in (0, 1].
            generator: of all random choices; one seeded with 0 if there is none.

        Raises:
            ValueError: one of them is outside its range.
        """
        if norm not in ("linf", "l2"):
            raise ValueError(f'norm: expected "linf" or "l2", got "{norm}"')
        if steps < 1 or queries < 1 or not 0 < share <= 1:
            raise ValueError(
                f"steps, queries, share: expected at least 1, and a share in (0, 1], got {steps}, {queries} and {share}"
            )
        self.differs = differs
        self.norm = norm
        self.reference_source = reference_source
        self.steps = steps
        self.queries = queries
        self.share = share
        self.generator = generator or torch.Generator().manual_seed(0)

    @property
    def distance(self) -> Distance:
        """Foolbox's measure of the norm."""
        return linf if self.norm == "linf" else l2

    def run(self, model: foolbox.Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Return for each image the candidate that came closest to a difference, within epsilon.

        Args:
            model: of a search that has begun.
            inputs: (n, C, H, W) images in [0, 1].
            criterion: labels or Foolbox's `Misclassification`; what counts is the goal of the search.
            epsilon: of the norm.
            **kwargs: none.

        Raises:
            ValueError: a model without a search, or another criterion.
        """
        raise_if_kwargs(kwargs)
        if not isinstance(model, SearchModel):
            raise ValueError(
                f"model: expected a SearchModel, whose search has the goal to differ, got {type(model).__name__}"
            )
        labels_of(criterion)
        wrapped, restore = ep.astensor_(inputs)
        verify_input_bounds(wrapped, model)
        images: Tensor = wrapped.raw
        if model.source is not None and self.reference_source is not None:
            found = self._descend(model, images, self.reference_source, epsilon=epsilon)
        else:
            found = self._mutate(model, images, epsilon=epsilon)
        return restore(ep.astensor(found))

    def _mutate(self, model: SearchModel, images: Float32[Tensor, "n c h w"], *, epsilon: float) -> Tensor:
        squares = LinfSquares if self.norm == "linf" else L2Squares
        found, _ = random_search(
            SearchModel(model.search, model.rows),
            images,
            self._classes(model, images),
            moves=squares(share=self.share, generator=self.generator),
            loss=self._product,
            epsilon=epsilon,
            queries=self.queries,
        )
        return found

    def _product(self, model: foolbox.Model, logits: Tensor, classes: Tensor) -> Tensor:
        assert isinstance(model, SearchModel)
        others = self.differs.logits[model.rows].to(logits)
        return _product(model, logits, others, classes)

    def _descend(
        self, model: SearchModel, images: Float32[Tensor, "n c h w"], reference: Source, *, epsilon: float
    ) -> Tensor:
        noise = torch.rand(images.shape, generator=self.generator, device=self.generator.device).to(images) * 2 - 1
        candidates = self._within(images, images + epsilon * noise, epsilon)
        found = candidates.clone()
        classes, places = self._classes(model, images), torch.arange(len(images))
        for step in range(self.steps):
            candidates.requires_grad_()
            product = _product(model, model(candidates), reference(candidates), classes)
            (gradients,) = torch.autograd.grad(product.sum(), candidates)
            candidates = candidates.detach()
            found[places] = candidates
            keep = ~model.settled(epsilon)
            if not keep.all():
                model, images, classes, places = model.select(keep), images[keep], classes[keep], places[keep]
                candidates, gradients = candidates[keep], gradients[keep]
            if len(places) == 0:
                break
            length = epsilon * _FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** (step / self.steps)
            candidates = self._within(images, candidates - length * self._direction(gradients), epsilon)
        return found

    def _classes(self, model: SearchModel, images: Tensor) -> Int64[Tensor, " n"]:
        return self.differs.classes[model.rows].to(images.device)

    def _direction(self, gradients: Tensor) -> Tensor:
        return gradients.sign() if self.norm == "linf" else gradients / _norms(gradients)

    def _within(self, images: Tensor, candidates: Tensor, epsilon: float) -> Tensor:
        perturbations = candidates - images
        if self.norm == "linf":
            return (images + perturbations.clamp(-epsilon, epsilon)).clamp(0, 1)
        return (images + perturbations * (epsilon / _norms(perturbations)).clamp(max=1)).clamp(0, 1)


def _product(model: foolbox.Model, logits: Tensor, others: Tensor, classes: Tensor) -> Float32[Tensor, " n"]:
    return margin(model, logits, classes) * margin(model, others, classes)


def _norms(perturbations: Tensor) -> Tensor:
    norms: Tensor = perturbations.flatten(1).norm(dim=1)
    return norms[:, None, None, None].clamp(min=_TINY)
