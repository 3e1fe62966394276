"""Models of a search that need not ask its target every time.

attack --> SurrogateModel --> the surrogate alone: the target sees results only
attack --> FirstSuccessModel --> target, except for images that it has got wrong already
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from service.audit.attack.model import SearchModel

if TYPE_CHECKING:
    from torch import Tensor


class SurrogateModel(SearchModel):
    """For transfer attacks: the source answers everything, so that the attack takes it for the target."""

    def select(self, keep: Tensor) -> SurrogateModel:
        """Return the model of some of the rows: a mask, or places among them."""
        return SurrogateModel(self.search, self.rows[keep.cpu()], source=self.source, every=self.every)

    def _logits(self, images: Tensor) -> Tensor:
        assert self.source is not None, "a transfer attack without its surrogate is refused before it starts"
        return self.source(images)


class FirstSuccessModel(SearchModel):
    """For searches along a line, which end at an image's first success: no query is spent on it afterwards."""

    def select(self, keep: Tensor) -> FirstSuccessModel:
        """Return the model of some of the rows: a mask, or places among them."""
        return FirstSuccessModel(self.search, self.rows[keep.cpu()], source=self.source, every=self.every)

    def _logits(self, images: Tensor) -> Tensor:
        rows = self._rows(len(images))
        done = self.search.distances[rows].isfinite()
        classes = len(self.search.target.class_names)
        logits = functional.one_hot((self.search.labels[rows] + 1) % classes, classes).to(images)
        if not done.all():
            logits[~done] = self.search.ask(rows[~done], images[~done.to(images.device)]).to(images)
        return logits
