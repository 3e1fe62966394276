"""The Square attack: random search over squares, with the model's logits and no gradients.

images --stripes (Linf) or a grid of bumps (L2)--> start --squares, ever smaller--> candidates --margin falls?--> kept

Source: Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, with the settings of AutoAttack's standard protocol (Croce and Hein, ICML 2020): 5,000
queries, an initial share of 0.8, margin loss, the schedule stretched to the queries. Unlike there, each image draws
its own squares, and squares reach the last row and column.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import eagerpy as ep
import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs, verify_input_bounds
from foolbox.distances import l2, linf

from service.audit.attack.labels import labels_of
from service.audit.attack.model import select
from service.audit.attack.random_search import random_search

if TYPE_CHECKING:
    import foolbox
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from service.audit.attack.random_search import Moves

# The steps, of 10,000, after which the share of the image that a square covers is halved (the paper's section 5).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_STEPS = 10_000

# The least side of a square in L2: a smaller one has no middle and two sides (AutoAttack).
_L2_SIDE = 3
# Bumps along a side of the L2 start (the paper's algorithm 4).
_L2_TILES = 5
# Against division by the zero norm of a window without perturbation.
_TINY = 1e-12


def margin(
    _model: foolbox.Model, logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"]
) -> Float32[Tensor, " n"]:
    """Return the true class's logit less the largest other; negative where the image is misclassified."""
    true = logits.gather(1, labels[:, None]).flatten()
    return true - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


class LinfSquares:
    """Squares of +-epsilon in each channel, after a start of vertical stripes (the paper's algorithm 2)."""

    def __init__(self, *, share: float, generator: torch.Generator) -> None:
        """Prepare.

        Args:
            share: of the image that the first squares cover, in (0, 1].
            generator: of all random choices.
        """
        self._share = share
        self._generator = generator

    def start(self, images: Float32[Tensor, "n c h w"], *, epsilon: float) -> Float32[Tensor, "n c h w"]:
        """Return images with stripes one pixel wide."""
        n, c, _, w = images.shape
        return images + epsilon * _signs((n, c, 1, w), self._generator).to(images)

    def change(
        self,
        images: Float32[Tensor, "n c h w"],
        best: Float32[Tensor, "n c h w"],
        *,
        epsilon: float,
        progress: float,
    ) -> Float32[Tensor, "n c h w"]:
        """Return the best with one square each turned to +-epsilon, by channel."""
        n, c, h, w = images.shape
        side = min(max(round(math.sqrt(_share(self._share, progress) * h * w)), 1), h, w)
        square = _window(images, side, self._generator)
        turn = epsilon * _signs((n, c, 1, 1), self._generator).to(images)
        before, clean = best[square], images[square]
        after = clean + turn
        # One that changes nothing would be a query wasted; in a grey image that is every other square.
        idle = (after == before).flatten(1).all(dim=1)
        candidates = best.clone()
        candidates[square] = torch.where(idle[:, None, None, None], clean - turn, after)
        return candidates


class L2Squares:
    """Bumps that take over the perturbation of another window (the paper's algorithm 3)."""

    def __init__(self, *, share: float, generator: torch.Generator) -> None:
        """Prepare, as `LinfSquares`."""
        self._share = share
        self._generator = generator

    def start(self, images: Float32[Tensor, "n c h w"], *, epsilon: float) -> Float32[Tensor, "n c h w"]:
        """Return images with a grid of bumps, of norm epsilon together."""
        n, c, h, w = images.shape
        side = max(min(h, w) // _L2_TILES, 1)
        perturbation = torch.zeros_like(images)
        for top in range(0, h - side + 1, side):
            for left in range(0, w - side + 1, side):
                bumps = self._bumps(n, side).to(images) * _signs((n, c, 1, 1), self._generator).to(images)
                perturbation[:, :, top : top + side, left : left + side] = bumps
        return images + epsilon * perturbation / _norm(perturbation)

    def change(
        self,
        images: Float32[Tensor, "n c h w"],
        best: Float32[Tensor, "n c h w"],
        *,
        epsilon: float,
        progress: float,
    ) -> Float32[Tensor, "n c h w"]:
        """Return the best with the budget of two windows in the first, and none in the second."""
        n, c, h, w = images.shape
        side = _odd(max(round(math.sqrt(_share(self._share, progress) * h * w)), _L2_SIDE), most=min(h, w))
        perturbation = best - images
        unused = (epsilon**2 - _norm(perturbation) ** 2).clamp(min=0)
        target, source = (_window(images, side, self._generator) for _ in range(2))
        old = perturbation[target]
        emptied = perturbation.clone()
        emptied[target] = 0
        emptied[source] = 0
        # What both windows hold, by channel, and each channel's part of what is not used at all.
        available = perturbation.square().sub_(emptied.square()).sum(dim=(2, 3), keepdim=True) + unused / c
        bumps = self._bumps(n, side).to(images) * _signs((n, c, 1, 1), self._generator).to(images)
        new = bumps + old / (old.norm(dim=(2, 3), keepdim=True) + _TINY)
        emptied[target] = new / (new.norm(dim=(2, 3), keepdim=True) + _TINY) * available.clamp(min=0).sqrt()
        # Clipping to [0, 1] made it smaller than epsilon.
        norms = _norm(emptied)
        return emptied.mul_(epsilon).div_(norms).add_(images)

    def _bumps(self, n: int, side: int) -> Tensor:
        """Return (n, 1, side, side) bumps of norm 1, half positive and half negative, lying or standing."""
        bump = _bump(side)
        lying = torch.rand(n, generator=self._generator, device=self._generator.device) < 1 / 2
        return torch.where(lying.cpu()[:, None, None], bump.T, bump)[:, None]


class _Square(FixedEpsilonAttack):
    def __init__(
        self, *, queries: int = 5000, share: float = 0.8, restarts: int = 1, generator: torch.Generator | None = None
    ) -> None:
        """Prepare an attack.

        Args:
            queries: an image may have, in each restart; at least 1.
            share: of the image that the first squares cover, in (0, 1].
            restarts: for images not fooled; at least 1.
            generator: of all random choices; one seeded with 0 if there is none.

        Raises:
            ValueError: one of them is outside its range.
        """
        if queries < 1 or restarts < 1:
            raise ValueError(f"queries, restarts: expected at least 1, got {queries} and {restarts}")
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a number in (0, 1], got {share}")
        self.queries = queries
        self.share = share
        self.restarts = restarts
        self.generator = generator or torch.Generator().manual_seed(0)

    @abstractmethod
    def moves(self) -> Moves:
        """Return the changes that it tries."""

    def run(self, model: foolbox.Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Return for each image the candidate with the smallest margin, within epsilon.

        Args:
            model: answers with logits.
            inputs: (n, C, H, W) images within the model's bounds.
            criterion: the labels, or Foolbox's `Misclassification` of them.
            epsilon: of the attack's norm.
            **kwargs: none.

        Raises:
            ValueError: any other criterion.
        """
        raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        verify_input_bounds(wrapped, model)
        images, labels = wrapped.raw, labels_of(criterion)
        result = images.clone()
        places = torch.arange(len(images))
        for _ in range(self.restarts):
            found, unsettled = random_search(
                select(model, places),
                images[places],
                labels[places],
                moves=self.moves(),
                loss=margin,
                epsilon=epsilon,
                queries=self.queries,
            )
            result[places] = found
            places = places[unsettled]
        return restore(ep.astensor(result))


class LinfSquare(_Square):
    """Square with perturbations of at most epsilon in every value."""

    distance = linf

    def moves(self) -> Moves:
        """Return the changes that it tries."""
        return LinfSquares(share=self.share, generator=self.generator)


class L2Square(_Square):
    """Square with perturbations of at most epsilon in Euclidean length."""

    distance = l2

    def moves(self) -> Moves:
        """Return the changes that it tries."""
        return L2Squares(share=self.share, generator=self.generator)


def _share(first: float, progress: float) -> float:
    return first / float(2 ** bisect_left(_HALVINGS, int(progress * _SCHEDULE_STEPS)))


def _odd(side: int, *, most: int) -> int:
    """Return the least odd number from side on, or the largest that is not above most."""
    return min(side | 1, most if most % 2 else most - 1) if most > 1 else 1


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=generator.device).float() * 2 - 1


def _corners(n: int, last: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, last + 1, (n,), generator=generator, device=generator.device).cpu()


def _window(images: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the index of a square at a random place of each image."""
    n, c, h, w = images.shape
    steps = torch.arange(side)
    rows = _corners(n, h - side, generator)[:, None] + steps
    columns = _corners(n, w - side, generator)[:, None] + steps
    return (
        torch.arange(n)[:, None, None, None],
        torch.arange(c)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )


def _norm(perturbation: Tensor) -> Tensor:
    norms: Tensor = perturbation.flatten(1).norm(dim=1)
    return norms[:, None, None, None].clamp(min=_TINY)


@lru_cache(maxsize=64)
def _bump(side: int) -> Tensor:
    """Return (side, side) of norm 1: a positive half above, a negative one below (the paper's equation 2)."""
    upper = side // 2
    bump = torch.cat([_pyramid(upper, side), -_pyramid(side - upper, side)])
    normalised: Tensor = bump / bump.norm()
    return normalised


def _pyramid(h: int, w: int) -> Tensor:
    """Return (h, w) of norm 1: falls with the rings around the middle as the tail of the sum of 1 / k^2."""
    rings = max(h, w) // 2 + 1
    tails = (1 / torch.arange(1, rings + 1) ** 2).flip(0).cumsum(0).flip(0)
    away = torch.maximum((torch.arange(h) - h // 2).abs()[:, None], (torch.arange(w) - w // 2).abs()[None, :])
    values = tails[away.clamp(max=rings - 1)]
    normalised: Tensor = values / values.norm().clamp(min=_TINY)
    return normalised
