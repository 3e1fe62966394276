"""How many of a part's images a model classifies correctly, as they are or under a short attack.

Source -> batches of this process's images -> [PGD within the recipe's epsilon] -> model -> hits, over all processes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from training import adversarial, augment
from training import processes as launched
from training.recipe import PgdAdversarial

if TYPE_CHECKING:
    from torch import nn

    from training.batches import Source
    from training.processes import Processes
    from training.recipe import Recipe
    from training.stream import Stream

BATCH = 500  # images; bounds memory and does not change accuracies; attacks and large images take training's
ATTACK_STEPS = 10  # of the attack that picks the best epoch of adversarial training


def accuracy(
    model: nn.Module, source: Source, *, recipe: Recipe, processes: Processes, attack: Stream | None = None
) -> float:
    """Return the share, in [0, 1], of a source's images that a model classifies correctly.

    Args:
        model: the classifier; it is left in evaluation mode.
        source: the images.
        recipe: what the run is; with `attack`, of adversarial training.
        processes: those that share the images.
        attack: what the attack would draw from; with it, images are perturbed within the recipe's epsilon first.
    """
    indices = torch.arange(len(source))[processes.number :: processes.count]
    right = torch.zeros((), dtype=torch.int64, device=processes.device)
    model.eval()
    for images, labels in source.evaluation(indices, batch_size=_batch(recipe, processes, attacked=attack is not None)):
        x = augment.unit_range(images)
        if attack is not None:
            x = adversarial.pgd(x, labels, model=model, settings=_attack(recipe), stream=attack)
        with torch.inference_mode():
            right += (model(x).argmax(1) == labels).sum()
    return int(processes.sum(right)) / len(source)


def _batch(recipe: Recipe, processes: Processes, *, attacked: bool) -> int:
    large = attacked or recipe.data.size is not None
    return launched.own_batch(recipe.training, processes) if large else BATCH


def _attack(recipe: Recipe) -> PgdAdversarial:
    """Return a short attack that starts from the images themselves."""
    assert recipe.adversarial is not None
    epsilon = recipe.adversarial.epsilon
    return PgdAdversarial(method="pgd", epsilon=epsilon, steps=ATTACK_STEPS, step_size=epsilon / 4, random_start=False)
