"""Random search within epsilon: change what is best so far, ask, keep the change if the loss falls.

images --start--> candidates --model--> loss --lower?--> best --change--> candidates --model--> ...
                                          '-- settled images leave, the others go on

It needs logits and no gradients. What is changed are `Moves`, what is wanted is a `Loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from service.audit.attack.model import select, settled

if TYPE_CHECKING:
    from collections.abc import Callable

    import foolbox
    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    # (model of the images asked about, their logits, their labels) -> what shall fall.
    Loss = Callable[
        [foolbox.Model, Float32[Tensor, "n classes"], Int64[Tensor, " n"]],
        Float32[Tensor, " n"],
    ]


class Moves(Protocol):
    """Random changes that keep to a norm's ball; [0, 1] is left to the search."""

    def start(self, images: Float32[Tensor, "n c h w"], *, epsilon: float) -> Float32[Tensor, "n c h w"]:
        """Return first candidates."""
        ...

    def change(
        self,
        images: Float32[Tensor, "n c h w"],
        best: Float32[Tensor, "n c h w"],
        *,
        epsilon: float,
        progress: float,
    ) -> Float32[Tensor, "n c h w"]:
        """Return changes of the best candidates so far; progress goes from 0 to 1 as queries are spent."""
        ...


@dataclass
class _Active:
    """The images that go on: a row each in all that is known about them."""

    model: foolbox.Model
    images: Tensor
    labels: Tensor
    best: Tensor
    lowest: Tensor
    places: Tensor

    def accept(self, candidates: Tensor, losses: Tensor, done: Bool[Tensor, " n"]) -> None:
        better = (losses < self.lowest) | done
        places = torch.nonzero(better).flatten()
        self.best[places] = candidates[places]
        self.lowest = torch.where(better, losses, self.lowest)

    def leave(self, done: Bool[Tensor, " n"]) -> None:
        keep = ~done
        self.model = select(self.model, keep)
        self.images, self.labels, self.best = self.images[keep], self.labels[keep], self.best[keep]
        self.lowest, self.places = self.lowest[keep], self.places[keep]


@torch.no_grad()
def random_search(
    model: foolbox.Model,
    images: Float32[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    *,
    moves: Moves,
    loss: Loss,
    epsilon: float,
    queries: int,
) -> tuple[Float32[Tensor, "n c h w"], Int64[Tensor, " open"]]:
    """Return for each image the candidate with the lowest loss, and the places of those that are not settled.

    An image that is settled is asked about no more.

    Args:
        model: answers with logits.
        images: clean, within the model's bounds.
        labels: true classes.
        moves: make the candidates.
        loss: of a candidate.
        epsilon: of the moves, in their norm.
        queries: that an image may have, the start's among them; at least 1.
    """
    result = images.clone()
    active = _Active(
        model, images, labels, images.clone(), images.new_full((len(images),), torch.inf), torch.arange(len(images))
    )
    for query in range(queries):
        if len(active.places) == 0:
            break
        if query == 0:
            candidates = moves.start(active.images, epsilon=epsilon)
        else:
            # The start is no step: the schedule begins at the first change.
            progress = (query - 1) / queries
            candidates = moves.change(active.images, active.best, epsilon=epsilon, progress=progress)
        candidates = candidates.clamp(*model.bounds)
        logits = active.model(candidates)
        done = settled(active.model, logits, active.labels, epsilon=epsilon)
        active.accept(candidates, loss(active.model, logits, active.labels), done)
        if done.any():
            result[active.places[done.cpu()]] = active.best[done]
            active.leave(done)
    result[active.places] = active.best
    return result, active.places
