"""Adversarial training images, Linf, in pixel space.

images, labels -> `pgd`: ascend the loss for some steps, from a random start -> images to train on
images -> `FreePerturbation.perturbed` -> the training step itself -> gradient -> `update` -> the next replay

Epsilon is a distance in [0, 1] whatever the model does with its input: models normalise inside.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from training.inhibition import evaluating
from training.recipe import FreeAdversarial, PgdAdversarial
from training.stream import Stream


def pgd(
    images: Float[Tensor, "batch 3 height width"],
    labels: Int64[Tensor, " batch"],
    *,
    model: nn.Module,
    settings: PgdAdversarial,
    stream: Stream,
) -> Float[Tensor, "batch 3 height width"]:
    """Return images within epsilon that projected gradient ascent on the cross-entropy finds (Madry et al. 2018).

    x <- clip(x + step_size * sign(d loss / d x)), to the ball around the image and to [0, 1] (section 2.1). The
    model is attacked in evaluation mode: its batch statistics, its gradients and its modes stay what they were.

    Args:
        images: NCHW in [0, 1].
        labels: their classes.
        model: the classifier itself. A DistributedDataParallel wrapper would wait for parameters' gradients, which
            are not computed here.
        settings: epsilon, steps, and whether each image starts at a uniform point of its ball.
        stream: what random starts are drawn from.

    Returns:
        Images in [0, 1] without a graph.
    """
    images = images.detach()
    low, high = (images - settings.epsilon).clamp(min=0), (images + settings.epsilon).clamp(max=1)
    attacked = images
    if settings.random_start:
        noise = 2 * stream.uniform(len(images), *images.shape[1:]) - 1
        attacked = images + settings.epsilon * noise.to(images)
    attacked = attacked.clamp(low, high)
    with evaluating(model):
        for _ in range(settings.steps):
            ascent = settings.step_size * _gradient(attacked, labels, model=model).sign()
            attacked = (attacked + ascent).clamp(low, high)
    return attacked


class FreePerturbation:
    """The perturbation of free adversarial training (Shafahi et al. 2019, algorithm 1).

    It starts from zero and persists: each replay of a batch goes on from the one before, and each batch from the
    last. It belongs to places in the batch and not to images, as published.

    Example:
        perturbation = FreePerturbation(settings)
        for images, labels in batches:
            for _ in range(settings.replays):
                perturbed = perturbation.perturbed(images)
                optimizer.zero_grad()
                functional.cross_entropy(model(perturbed), labels).backward()
                optimizer.step()
                perturbation.update(perturbed.grad)

    Attributes:
        state: the perturbation of this process's images, to be saved and set for a run that goes on; None before
            the first batch.
    """

    def __init__(self, settings: FreeAdversarial) -> None:
        self.epsilon = settings.epsilon
        self.state: Float[Tensor, "batch 3 height width"] | None = None
        self._within: Bool[Tensor, "batch 3 height width"] | None = None

    def perturbed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Return clip(images + perturbation, 0, 1), a leaf whose gradient `update` takes.

        A batch smaller than the one before takes the leading part of the perturbation, as published; a larger one,
        or images of another size, start again from zero.
        """
        if self.state is None or self.state.shape[1:] != images.shape[1:] or len(self.state) < len(images):
            self.state = torch.zeros_like(images)
        self.state = self.state.to(images)
        moved = images.detach() + self.state[: len(images)]
        clipped = moved.clamp(0, 1)
        self._within = moved == clipped
        return clipped.requires_grad_()

    def update(self, gradient: Float[Tensor, "batch 3 height width"] | None) -> None:
        """Ascend: perturbation <- clip(perturbation + epsilon * sign(gradient), -epsilon, epsilon).

        `gradient` is that of the loss with respect to the images that `perturbed` returned last; a scale of the
        loss does not matter. Beyond [0, 1], where those were clipped, the perturbation stays, as the published
        code differentiates through the clipping.

        Raises:
            ValueError: no gradient, or of another shape than the last images.
        """
        expected = None if self._within is None else tuple(self._within.shape)
        if self.state is None or self._within is None or gradient is None or tuple(gradient.shape) != expected:
            got = None if gradient is None else tuple(gradient.shape)
            msg = f"gradient: expected that of the images from perturbed(), of shape {expected}, got shape {got}; "
            raise ValueError(msg + "call perturbed() and backward() before update()")
        ascent = self.epsilon * gradient.detach().sign() * self._within
        state = self.state.clone()  # a state that was read for saving stays what it was
        state[: len(gradient)] += ascent
        self.state = state.clamp(-self.epsilon, self.epsilon)


def _gradient(images: Tensor, labels: Tensor, *, model: nn.Module) -> Tensor:
    """Return the gradient of the cross-entropy with respect to the images, and no other."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = functional.cross_entropy(model(leaf), labels, reduction="sum")  # a mean's gradients may underflow
    return torch.autograd.grad(loss, leaf)[0]
