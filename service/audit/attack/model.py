"""The Foolbox model of a search: gradients from a source, answers from the target, a row for each image.

inputs that want a gradient --> source (and, if asked, the target's decision on the same images)
inputs that want none       --> the search, which asks the target

An attack that goes on with some images only takes `select(model, rows)`, and learns by `settled` which are done; both
work on every Foolbox model, so that our attacks can be used without an audit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
from foolbox.types import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    from service.audit.attack.search import Search

    Source = Callable[[Float32[Tensor, "n c h w"]], Float32[Tensor, "n classes"]]


class SearchModel(foolbox.Model):
    """Some rows of a search, as Foolbox's attacks see them.

    A batch of k times as many images as there are rows is taken for k changes of each, all rows once, then all rows
    again.

    Attributes:
        search: counts and decides.
        rows: (n,) which of the search's images this model's batch has.
        source: differentiable; None for attacks without gradients.
        every: whether the target decides on each image that a gradient is taken at.
    """

    def __init__(
        self, search: Search, rows: Int64[Tensor, " n"], *, source: Source | None = None, every: bool = True
    ) -> None:
        self.search = search
        self.rows = rows
        self.source = source
        self.every = every

    @property
    def bounds(self) -> Bounds:
        """The range of an image: [0, 1]."""
        return Bounds(0, 1)

    def __call__(self, inputs: Any) -> Any:
        """Return logits in the framework of the inputs."""
        images, restore = ep.astensor_(inputs)
        return restore(ep.astensor(self._logits(images.raw)))

    def select(self, keep: Tensor) -> SearchModel:
        """Return the model of some of the rows: a mask, or places among them."""
        return SearchModel(self.search, self.rows[keep.cpu()], source=self.source, every=self.every)

    def settled(self, epsilon: float) -> Bool[Tensor, " n"]:
        """Return which rows need no more work: the target is fooled within epsilon."""
        return self.search.fooled(epsilon)[self.rows]

    def _logits(self, images: Tensor) -> Tensor:
        rows = self._rows(len(images))
        if not images.requires_grad:
            return self.search.ask(rows, images).to(images.device)
        assert self.source is not None, "an attack that wants gradients is refused before it starts"
        if self.every:
            self.search.ask(rows, images)
        return self.source(images)

    def _rows(self, n: int) -> Tensor:
        assert n % max(1, len(self.rows)) == 0, f"{n} images for {len(self.rows)} rows"
        return self.rows if n == len(self.rows) else self.rows.repeat(n // len(self.rows))


def select(model: foolbox.Model, keep: Tensor) -> foolbox.Model:
    """Return the model for some of the batch's images: itself, unless it counts by image."""
    return model.select(keep) if isinstance(model, SearchModel) else model


def settled(
    model: foolbox.Model, logits: Float32[Tensor, "n classes"], labels: Int64[Tensor, " n"], *, epsilon: float
) -> Bool[Tensor, " n"]:
    """Return which images of a batch need no more work.

    Args:
        model: a `SearchModel`, whose target decides; or any other, whose logits do.
        logits: what it just answered.
        labels: true classes.
        epsilon: of the attack, in the search's norm.
    """
    if isinstance(model, SearchModel) and (model.every or model.source is None):
        return model.settled(epsilon).to(logits.device)
    return logits.detach().argmax(dim=1) != labels
