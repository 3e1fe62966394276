"""A plan's attack -> robust or not, image by image and epsilon by epsilon, decided on the engine.

images --engine--> correct ones --Foolbox--> candidates --within epsilon? engine fooled?--> robust flags
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from foolbox import attacks as foolbox_attacks
from foolbox.criteria import Misclassification
from jaxtyping import Bool

from service.audit.plan import (
    Attack,
    DecisionAttack,
    GradientAttack,
    NoiseAttack,
    SingleStepAttack,
    epsilon_value,
)

if TYPE_CHECKING:
    from torch import Tensor

    from export.engines.base import Images
    from service.audit.targets import AttackModel

# Foolbox's own values adapt the step sizes after 300 steps, for the first time. On 50 digits, 300 steps from the
# same starts came to a median L2 distance of 5.3 with those, and of 3.4 with these, which adapt after 30 steps at
# twice the queries a step; 2,000 steps with Foolbox's came to 3.2.
_BOUNDARY_STEPS: dict[str, Any] = {"update_stats_every_k": 1, "spherical_step": 0.03, "source_step": 0.003}

# Halvings of the way to an image of another class: 2^-10 of it is less than a grey level.
_BISECTIONS = 10

# A perturbation may exceed its epsilon by float32's rounding, no more.
_TOLERANCE = 1e-5

_GRADIENT_ATTACKS = {"LinfPGD": foolbox_attacks.LinfPGD, "L2PGD": foolbox_attacks.L2PGD}
_NOISE_ATTACKS = {
    "LinfUniformNoise": foolbox_attacks.LinfRepeatedAdditiveUniformNoiseAttack,
    "L2GaussianNoise": foolbox_attacks.L2RepeatedAdditiveGaussianNoiseAttack,
}


@dataclass(frozen=True)
class Outcome:
    """What an attack did to a batch.

    Attributes:
        correct: (N,) the engine classifies the clean image correctly.
        robust: epsilon -> (N,) correct, and no adversarial image was found within it.
        queries: images that the engine was asked about.
    """

    correct: Bool[np.ndarray, " n"]
    robust: dict[str, Bool[np.ndarray, " n"]]
    queries: int


def run(
    attack: Attack, *, model: AttackModel, images: Images, labels: np.ndarray[Any, Any], pool: Images, seed: int
) -> Outcome:
    """Attack a batch; images that the engine gets wrong to begin with are not attacked.

    Args:
        attack: an entry of the plan.
        model: the engine, with a twin if the attack is white-box.
        images: (N, C, H, W) float32 in [0, 1].
        labels: (N,) the true classes.
        pool: (M, C, H, W) other images, among which a decision-based attack finds where to start from.
        seed: of every random choice of the attack.

    Raises:
        ValueError: a white-box attack on a target without a twin.
    """
    if attack.access == "white-box" and model.twin is None:
        raise ValueError(
            f"attacks.{attack.id}: a white-box attack needs gradients, and this engine has no PyTorch checkpoint; "
            "export it from a training run, or use a decision-based attack"
        )
    before = model.target.queries
    predictions = model.target.predict(images)
    correct = predictions == labels
    robust = {epsilon: correct.copy() for epsilon in attack.epsilons}
    active, options = np.flatnonzero(correct), {}
    if isinstance(attack, DecisionAttack) and len(active):
        start, found = _starting_points(model, images[active], predictions[active], pool)
        # An image is robust where the engine puts the whole pool into its class: the attack has nowhere to start from.
        active, options = active[found], {"starting_points": start}
    if len(active):
        subject = _Subject(torch.from_numpy(images[active]), torch.from_numpy(labels[active]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            candidates = _candidates(attack, model, subject, options)
        for epsilon, candidate in candidates.items():
            robust[epsilon][active] = ~_fooled(attack, model, subject, candidate, epsilon)
    return Outcome(correct, robust, model.target.queries - before)


@dataclass(frozen=True)
class _Subject:
    images: Tensor
    labels: Tensor


def _candidates(attack: Attack, model: AttackModel, subject: _Subject, options: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return for each epsilon the images that the attack proposes."""
    with warnings.catch_warnings():
        # Foolbox warns of its own deprecated scipy imports.
        warnings.simplefilter("ignore")
        _, clipped, _ = _foolbox(attack)(
            model,
            subject.images,
            Misclassification(subject.labels),
            epsilons=[epsilon_value(epsilon) for epsilon in attack.epsilons],
            **options,
        )
    return dict(zip(attack.epsilons, clipped, strict=True))


def _foolbox(attack: Attack) -> Any:
    match attack:
        case SingleStepAttack():
            return foolbox_attacks.LinfFastGradientAttack()
        case GradientAttack():
            # 2.5 epsilon / steps lets an iterate cross the ball from any start (Madry et al., 2018).
            return _GRADIENT_ATTACKS[attack.name](rel_stepsize=2.5 / attack.steps, steps=attack.steps)
        case NoiseAttack():
            return _NOISE_ATTACKS[attack.name](repeats=attack.repeats)
        case DecisionAttack():
            return foolbox_attacks.BoundaryAttack(steps=attack.steps, tensorboard=False, **_BOUNDARY_STEPS)


def _fooled(
    attack: Attack, model: AttackModel, subject: _Subject, candidate: Tensor, epsilon: str
) -> Bool[np.ndarray, " n"]:
    """Return for each image whether the candidate keeps to the rules and the engine errs on it."""
    candidate = torch.from_numpy(model.target.seen(candidate.numpy()))
    difference = (candidate - subject.images).flatten(1).double()
    size = difference.abs().amax(dim=1) if attack.norm == "linf" else difference.norm(dim=1)
    legal = (size <= epsilon_value(epsilon) + _TOLERANCE) & (candidate.flatten(1).amin(1) >= 0)
    legal &= candidate.flatten(1).amax(1) <= 1
    wrong = model.target.predict(candidate.numpy()) != subject.labels.numpy()
    return legal.numpy() & wrong  # type: ignore[no-any-return]


def _starting_points(
    model: AttackModel, images: Images, classes: np.ndarray[Any, Any], pool: Images
) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Return images next to the decision boundary, on the way to the nearest of the pool in another class.

    Returns:
        An adversarial start for each image that has one, and (N,) bool: which these are.
    """
    ours, others = torch.from_numpy(images), torch.from_numpy(pool)
    distances = torch.cdist(ours.flatten(1), others.flatten(1))
    distances[torch.from_numpy(classes[:, None] == model.target.predict(pool)[None, :])] = torch.inf
    closest, chosen = distances.min(dim=1)
    found = closest.isfinite()
    near, far = ours[found], others[chosen[found]]
    for _ in range(_BISECTIONS if len(far) else 0):
        middle = (near + far) / 2
        fooled = torch.from_numpy(model.target.predict(middle.numpy()) != classes[found.numpy()])[:, None, None, None]
        near, far = torch.where(fooled, near, middle), torch.where(fooled, middle, far)
    return far, found.numpy()
