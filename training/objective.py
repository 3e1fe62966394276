"""What an iteration lowers: the ordinary loss, the TENET loss, or both from one pass.

views of a batch -> model -> cross-entropy (+ Jensen-Shannon term)     step "ordinary"
clean images that are classified correctly -> TenetStep -> its loss    step "tenet"
views -> body -> A -> head -> cross-entropy; A -> TenetStep -> + loss  step "fused"

All losses are of one module, as gradients are averaged over processes by a wrapper around its forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from training import augmix, grouping
from training.inhibition import FEWEST, TenetStep, evaluating

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.processes import Processes
    from training.recipe import Recipe

Step = Literal["ordinary", "tenet", "fused"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """The images of a TENET step: this process's correctly classified ones.

    `indices` (n,) are into its part of the batch, `initial` (n, groups) are the channels that their centres
    start from, `weight` is what makes the mean of the processes' means a mean over all images.
    """

    indices: Int64[Tensor, " n"]
    initial: Int64[Tensor, "n groups"]
    weight: float


class Objective(nn.Module):
    """The losses of a run's iterations.

    Args:
        model: the classifier.
        recipe: what the losses are.
        processes: those that share a batch.
        centres: a generator, of the same state in each process, for the first centres.
        example: a few images of the run, float NCHW in [0, 1] on the model's device.

    Raises:
        ValueError: the model cannot be cut at the recipe's stage, or not be inhibited there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        recipe: Recipe,
        processes: Processes,
        centres: torch.Generator,
        example: Float[Tensor, "n channels height width"],
    ) -> None:
        super().__init__()
        self.model = model
        self.smoothing = recipe.training.label_smoothing
        self.jsd = 0.0 if recipe.augmentation.augmix is None else recipe.augmentation.augmix.jsd
        self.processes, self.centres = processes, centres
        self.tenet = None if recipe.tenet is None else _tenet_step(model, recipe)
        self.channels = 0 if self.tenet is None else self.tenet.channels(example)
        if self.tenet is not None:
            self._refuse_other_parts(example)
        self.whole: Callable[[Tensor], Tensor] = model.forward if self.tenet is None else self._body_and_head
        if recipe.training.compile:
            self._compile()

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " part"],
        *,
        step: Step = "ordinary",
        chosen: Chosen | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None, Float[Tensor, "part classes"] | None]:
        """Return the loss to lower, the TENET loss where there is one, and the logits of the first view.

        Args:
            images: the views of the batch one after another; in step "tenet" the clean images alone.
            labels: those of one view.
            step: which loss.
            chosen: the images of step "tenet".
        """
        if step == "tenet":
            assert self.tenet is not None
            assert chosen is not None
            loss = self.tenet.loss(images[chosen.indices], labels[chosen.indices], initial=chosen.initial)
            loss = loss * chosen.weight
            return loss, loss.detach(), None
        if step == "fused":
            return self._fused(images, labels)
        loss, logits = self._ordinary(self.whole(images), labels)
        return loss, None, logits.detach()

    def choose(self, logits: Float[Tensor, "part classes"], labels: Int64[Tensor, " part"]) -> Chosen | None:
        """Choose the images of a TENET step, together with the other processes.

        None where any of them has fewer than two: then no process takes the step.
        """
        assert self.tenet is not None
        indices = self.tenet.correct(logits, labels)
        counts = self.processes.each(len(indices))
        if min(counts) < FEWEST:
            return None
        before = sum(counts[: self.processes.number])
        initial = grouping.random_subset(sum(counts), self.channels, self.tenet.groups, generator=self.centres)
        own = initial[before : before + len(indices)]
        return Chosen(indices, own, weight=len(indices) * len(counts) / sum(counts))

    def _ordinary(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.jsd == 0:
            return functional.cross_entropy(logits, labels, label_smoothing=self.smoothing), logits
        views = logits.chunk(3)
        loss = functional.cross_entropy(views[0], labels, label_smoothing=self.smoothing)
        return loss + self.jsd * augmix.jensen_shannon(views), views[0]

    def _fused(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        assert self.tenet is not None
        features = self.tenet.body(images)
        loss, logits = self._ordinary(self.tenet.head(features), labels)
        chosen = self.choose(logits.detach(), labels)
        if chosen is None:
            return loss, None, logits.detach()
        first = features[: len(labels)]  # the clean view
        tenet = self.tenet.fused_loss(first[chosen.indices], labels[chosen.indices], initial=chosen.initial)
        tenet = tenet * chosen.weight
        return loss + tenet, tenet.detach(), logits.detach()

    def _refuse_other_parts(self, example: Tensor) -> None:
        """Raise ValueError where parts of a model's own do not make it up."""
        with evaluating(self.model), torch.no_grad():
            parts, whole = self._body_and_head(example), self.model(example)
        if not torch.allclose(parts, whole, rtol=1e-3, atol=1e-4):
            msg = "model: expected head(body(x)) to be model(x), got logits that differ by up to "
            raise ValueError(f"{msg}{float((parts - whole).abs().max()):.2g}; mend the model's body and head")

    def _body_and_head(self, images: Tensor) -> Tensor:
        assert self.tenet is not None
        logits: Tensor = self.tenet.head(self.tenet.body(images))
        return logits

    def _compile(self) -> None:
        """Compile the body alone, of any batch: the head is differentiated within a pass, which must stay eager."""
        if self.tenet is None:
            self.whole = torch.compile(self.model, dynamic=True)
        else:
            self.tenet.body = cast("nn.Module", torch.compile(self.tenet.body, dynamic=True))


def _tenet_step(model: nn.Module, recipe: Recipe) -> TenetStep:
    settings = recipe.tenet
    assert settings is not None
    return TenetStep(
        model,
        stage=settings.stage,
        groups=settings.groups,
        variant=settings.variant,
        lambda_tenet=settings.lambda_tenet,
        lambda_orth=settings.lambda_orth,
        exact=settings.exact,
    )
