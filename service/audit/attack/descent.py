"""Foolbox's gradient descent within a fixed epsilon, for the images that are not fooled yet.

start --gradient--> fooled? then it is done and leaves
          '-- not --> Foolbox's normalisation, optimiser, projection --> next iterate, `steps` times
what is not fooled in the end --> from another start, `restarts` times

Each class has the name and the parameters of Foolbox's, and takes every step by its code: an image goes through the
same iterates, up to the first that fools the model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import get_criterion, raise_if_kwargs, verify_input_bounds
from foolbox.attacks.gradient_descent_base import BaseGradientDescent
from foolbox.criteria import Misclassification
from torch import Tensor
from torch.nn import functional

from service.audit.attack.model import select, settled

if TYPE_CHECKING:
    from typing import Self

    from foolbox.attacks.gradient_descent_base import Optimizer
    from jaxtyping import Bool, Float32, Int64


class _Iterate:
    """The images that an attack still works on: where each has come to, and what its next step needs.

    Attributes:
        model: of these images.
        places: (k,) where they are in the batch.
        labels: (k,) true classes.
        clean: (k, C, H, W).
        images: (k, C, H, W) the current iterates.
        optimizer: Foolbox's, with the state of these images.
    """

    def __init__(
        self, model: foolbox.Model, clean: ep.Tensor, labels: Tensor, *, start: ep.Tensor, optimizer: Optimizer
    ) -> None:
        self.model = model
        self.places = torch.arange(len(labels), device=labels.device)
        self.labels = labels
        self.clean = clean
        self.images = start
        self.optimizer = optimizer

    def keep(self, kept: Bool[Tensor, " k"]) -> None:
        """Go on with some of the images."""
        self.model = select(self.model, kept)
        self.places, self.labels = self.places[kept], self.labels[kept]
        self.clean, self.images = (ep.astensor(batch.raw[kept]) for batch in (self.clean, self.images))
        for name, value in vars(self.optimizer).items():
            if isinstance(value, ep.Tensor):  # momentum, and Adam's moments
                setattr(self.optimizer, name, ep.astensor(value.raw[kept]))


class Descent(BaseGradientDescent):
    """What all of them do; `repeat` makes one that starts again where it has not succeeded.

    Attributes:
        restarts: how many starts an image has at most.
    """

    restarts = 1

    def repeat(self, times: int) -> Self:
        """Return this attack with so many times as many starts, for those images that need them."""
        repeated = copy.copy(self)
        repeated.restarts = self.restarts * times
        return repeated

    def run(self, model: foolbox.Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Return an iterate that fools the model for each image, and its last one where none does.

        Args:
            model: any of Foolbox's; the target of a `SearchModel` decides.
            inputs: (n, C, H, W) within the model's bounds.
            criterion: misclassification, or true classes (n,); targeted attacks go the way of Foolbox's own loop.
            epsilon: the largest perturbation, in the attack's norm.
            kwargs: none.

        Raises:
            ValueError: the criterion is of another kind.
        """
        criterion = get_criterion(criterion)
        if not isinstance(criterion, Misclassification):
            return super().run(model, inputs, criterion, epsilon=epsilon, **kwargs)
        raise_if_kwargs(kwargs)
        clean, restore = ep.astensor_(inputs)
        verify_input_bounds(clean, model)
        return restore(ep.astensor(self._best(model, clean.raw, criterion.labels.raw, epsilon=epsilon)))

    def _best(
        self, model: foolbox.Model, clean: Float32[Tensor, "n c h w"], labels: Int64[Tensor, " n"], *, epsilon: float
    ) -> Float32[Tensor, "n c h w"]:
        found = clean.clone()
        left = torch.arange(len(clean), device=clean.device)
        for restart in range(self.restarts):
            if restart:
                left = self._unsettled(model, found, labels, left=left, epsilon=epsilon)
            if len(left) == 0:
                break
            begun = self._begun(select(model, left), ep.astensor(clean[left]), labels[left], epsilon=epsilon)
            found[left], unfinished = self._descended(begun, epsilon=epsilon)
            left = left[unfinished]
        return found

    @staticmethod
    def _unsettled(
        model: foolbox.Model, found: Tensor, labels: Tensor, *, left: Int64[Tensor, " k"], epsilon: float
    ) -> Int64[Tensor, " m"]:
        """Return which images the last iterates do not fool the model with either."""
        some = select(model, left)
        return left[~settled(some, some(found[left]), labels[left], epsilon=epsilon)]

    def _descended(self, at: _Iterate, *, epsilon: float) -> tuple[Float32[Tensor, "k c h w"], Int64[Tensor, " m"]]:
        """Return each image's first success, or its last iterate, and the places of these last, not yet decided."""
        found = at.images.raw.clone()
        for _ in range(self.steps):
            logits, gradients = _differentiated(at.model, at.images.raw, at.labels)
            done = settled(at.model, logits, at.labels, epsilon=epsilon)
            if done.any():
                found[at.places[done]] = at.images.raw[done]
                at.keep(~done)
                gradients = gradients[~done]
            if len(at.places) == 0:
                break
            self._step(at, ep.astensor(gradients), epsilon=epsilon)
        found[at.places] = at.images.raw
        return found, at.places

    def _begun(self, model: foolbox.Model, clean: ep.Tensor, labels: Tensor, *, epsilon: float) -> _Iterate:
        start = clean
        if self.random_start:
            start = ep.clip(self.get_random_start(clean, epsilon), *model.bounds)
        stepsize = self.rel_stepsize * epsilon if self.abs_stepsize is None else self.abs_stepsize
        optimizer = self.get_optimizer(clean, stepsize)
        return _Iterate(model, clean, labels, start=start, optimizer=optimizer)

    def _step(self, at: _Iterate, gradients: ep.Tensor, *, epsilon: float) -> None:
        bounds = at.model.bounds
        ascent = at.optimizer(self.normalize(gradients, x=at.images, bounds=bounds))
        at.images = ep.clip(self.project(at.images + ascent, at.clean, epsilon), *bounds)


def _differentiated(
    model: foolbox.Model, images: Float32[Tensor, "k c h w"], labels: Int64[Tensor, " k"]
) -> tuple[Float32[Tensor, "k classes"], Float32[Tensor, "k c h w"]]:
    """Return the logits, and the gradient of the cross entropy in the images; none of the weights' is computed."""
    images = images.detach().requires_grad_()
    logits: Tensor = model(images)
    loss = functional.cross_entropy(logits, labels, reduction="none").sum()
    (gradients,) = torch.autograd.grad(loss, images)
    return logits.detach(), gradients


class LinfFastGradientAttack(Descent, foolbox.attacks.LinfFastGradientAttack):
    """FGSM, one step in the gradient's sign (Goodfellow et al. 2015), Linf."""


class LinfBasicIterativeAttack(Descent, foolbox.attacks.LinfBasicIterativeAttack):
    """The basic iterative method (Kurakin et al. 2017), Linf."""


class LinfAdamBasicIterativeAttack(Descent, foolbox.attacks.LinfAdamBasicIterativeAttack):
    """The basic iterative method with Adam, Linf."""


class LinfProjectedGradientDescentAttack(Descent, foolbox.attacks.LinfProjectedGradientDescentAttack):
    """Projected gradient descent (Madry et al. 2018), Linf."""


class LinfAdamProjectedGradientDescentAttack(Descent, foolbox.attacks.LinfAdamProjectedGradientDescentAttack):
    """Projected gradient descent with Adam, Linf."""


class LinfMomentumIterativeFastGradientMethod(Descent, foolbox.attacks.LinfMomentumIterativeFastGradientMethod):
    """MI-FGSM, the momentum iterative method (Dong et al. 2018), Linf."""


class L2FastGradientAttack(Descent, foolbox.attacks.L2FastGradientAttack):
    """One step of the fast gradient method (Goodfellow et al. 2015), L2."""


class L2BasicIterativeAttack(Descent, foolbox.attacks.L2BasicIterativeAttack):
    """The basic iterative method (Kurakin et al. 2017), L2."""


class L2AdamBasicIterativeAttack(Descent, foolbox.attacks.L2AdamBasicIterativeAttack):
    """The basic iterative method with Adam, L2."""


class L2ProjectedGradientDescentAttack(Descent, foolbox.attacks.L2ProjectedGradientDescentAttack):
    """Projected gradient descent (Madry et al. 2018), L2."""


class L2AdamProjectedGradientDescentAttack(Descent, foolbox.attacks.L2AdamProjectedGradientDescentAttack):
    """Projected gradient descent with Adam, L2."""


class L2MomentumIterativeFastGradientMethod(Descent, foolbox.attacks.L2MomentumIterativeFastGradientMethod):
    """MI-FGSM, the momentum iterative method (Dong et al. 2018), L2."""


class L1FastGradientAttack(Descent, foolbox.attacks.L1FastGradientAttack):
    """One step of the fast gradient method (Goodfellow et al. 2015), L1."""


class L1BasicIterativeAttack(Descent, foolbox.attacks.L1BasicIterativeAttack):
    """The basic iterative method (Kurakin et al. 2017), L1."""


class L1AdamBasicIterativeAttack(Descent, foolbox.attacks.L1AdamBasicIterativeAttack):
    """The basic iterative method with Adam, L1."""


class L1ProjectedGradientDescentAttack(Descent, foolbox.attacks.L1ProjectedGradientDescentAttack):
    """Projected gradient descent (Madry et al. 2018), L1."""


class L1AdamProjectedGradientDescentAttack(Descent, foolbox.attacks.L1AdamProjectedGradientDescentAttack):
    """Projected gradient descent with Adam, L1."""


class L1MomentumIterativeFastGradientMethod(Descent, foolbox.attacks.L1MomentumIterativeFastGradientMethod):
    """MI-FGSM, the momentum iterative method (Dong et al. 2018), L1."""


class SparseL1DescentAttack(Descent, foolbox.attacks.SparseL1DescentAttack):
    """Sparse L1 descent (Tramer and Boneh 2019)."""


FGSM, FGM = LinfFastGradientAttack, L2FastGradientAttack
MIFGSM = LinfMomentumIterativeFastGradientMethod
LinfPGD, L2PGD, L1PGD = (
    LinfProjectedGradientDescentAttack,
    L2ProjectedGradientDescentAttack,
    L1ProjectedGradientDescentAttack,
)
LinfAdamPGD, L2AdamPGD, L1AdamPGD = (
    LinfAdamProjectedGradientDescentAttack,
    L2AdamProjectedGradientDescentAttack,
    L1AdamProjectedGradientDescentAttack,
)
