"""One attack's search for adversarial images: what it asked, and the smallest perturbation that fooled the target.

attack --candidates--> ask: within [0, 1], as they are sent --> target --> logits --> attack
                                    |-- counted for each image, up to the budget
                                    '-- fooled? nearer than before? then kept
An attack only proposes: what counts is decided here, on the target, at every query. So success at any epsilon, the
smallest perturbation and the queries to it come out the same way for all attacks, also of one that dies half-way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float32, Float64, Int64
    from torch import Tensor

    from service.audit.target.base import Target

    # (rows, candidates as sent, logits) -> which candidates do what the attack is after.
    Goal = Callable[[Int64[Tensor, " k"], Float32[Tensor, "k c h w"], Float32[Tensor, "k classes"]], Bool[Tensor, " k"]]

Norm = Literal["linf", "l2", "l1", "l0"]

# A perturbation may exceed its epsilon by float32's rounding, no more.
TOLERANCE = 1e-6


class BudgetSpent(Exception):  # noqa: N818 - the search's ordinary end, not a failure
    """Every image asked about has had all the queries that it may have."""


class Search:
    """The search of one attack over some images; `begin` first asks about the images themselves.

    Attributes:
        images: (n, C, H, W) float32 in [0, 1], clean, as sent.
        labels: (n,) int64.
        norm: in which perturbations are measured.
        distances: (n,) the smallest perturbation that fooled the target; 0 where none is needed, inf where unknown.
        adversarial: (n, C, H, W) the image with that perturbation; the clean one where there is none.
        queries: (n,) how often the target was asked about each image.
        first_success: (n,) queries up to the first success, the clean image's among them; 0 where there is none.
        unrounded: (n,) as `distances`, of `propose`d images that were not rounded to what can be sent; inf where
            unknown.
    """

    def __init__(
        self,
        target: Target,
        images: Float32[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        *,
        norm: Norm,
        budget: int | None = None,
        goal: Goal | None = None,
    ) -> None:
        """Prepare a search.

        Args:
            target: what is attacked.
            images: clean.
            labels: true classes.
            norm: of perturbations.
            budget: queries an image may have, the clean one's among them; None for no bound.
            goal: what a candidate must do; be put into another class than its label, by default.
        """
        self.target = target
        self.images = target.domain.sent(images)
        self.labels = labels
        self.norm = norm
        self._budget = budget
        self._goal = goal or self._misclassified
        n = len(images)
        self.distances = torch.full((n,), torch.inf, dtype=torch.float64)
        self.unrounded = self.distances.clone()
        self.adversarial = self.images.clone()
        self.queries = torch.zeros(n, dtype=torch.int64)
        self.first_success = torch.zeros(n, dtype=torch.int64)
        self._clean = torch.zeros(n, len(target.class_names))

    def __len__(self) -> int:
        return len(self.images)

    def begin(self) -> Float32[Tensor, "n classes"]:
        """Ask about the clean images, and return their logits; what is wrong already has distance 0."""
        rows = torch.arange(len(self))
        self._clean = self.ask(rows, self.images)
        return self._clean

    def open(self, epsilon: float | None = None) -> Int64[Tensor, " k"]:
        """Return the rows that the attack should go on with: not fooled (within epsilon), and with queries left.

        Args:
            epsilon: in the search's norm; None leaves out only what is wrong without a perturbation.
        """
        limit = 0.0 if epsilon is None else epsilon
        unsettled: Tensor = ~self.fooled(limit) & ~self._spent(self.queries)
        return unsettled.nonzero().flatten()

    def fooled(self, epsilon: float) -> Bool[Tensor, " n"]:
        """Return which images the target gets wrong within epsilon."""
        return self.distances <= epsilon + TOLERANCE

    def ask(self, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float32[Tensor, "k classes"]:
        """Ask the target about candidates, and keep what fools it.

        A row may stand several times. Candidates whose row has no queries left are not asked: they get the logits of
        their clean image.

        Args:
            rows: which image each candidate is a change of.
            candidates: in [0, 1], on any device; they are sent as the target's domain has it.

        Returns:
            The target's logits, on the CPU.

        Raises:
            BudgetSpent: no row has any left.
            TargetFailed: see `Target`.
        """
        rows = rows.cpu()
        may = self._affordable(rows)
        if len(rows) and not may.any():
            raise BudgetSpent
        sent = self.target.domain.sent(candidates.detach().to("cpu", torch.float32))
        logits = self._clean[rows]
        asked = rows[may]
        answers = torch.from_numpy(self.target(sent[may].contiguous().numpy()))
        logits[may] = answers
        self._count(asked)
        self._keep(asked, sent[may], self._goal(asked, sent[may], answers))
        return logits

    def propose(
        self,
        rows: Int64[Tensor, " k"],
        candidates: Float32[Tensor, "k c h w"],
        *,
        unrounded: Callable[[Float32[Tensor, "k c h w"]], Float32[Tensor, "k classes"]] | None = None,
    ) -> None:
        """Ask about an attack's results, and note what they would do if they did not have to be rounded.

        Args:
            rows: which image each is a change of.
            candidates: the results, not rounded.
            unrounded: gives logits of images that the target cannot be sent, by a gradient source; None if nothing can.
        """
        if len(rows) == 0:
            return
        clipped = candidates.detach().to("cpu", torch.float32).clamp(0, 1)
        if self.target.domain.step and unrounded is not None:
            hit = unrounded(clipped).argmax(dim=1).cpu() != self.labels[rows.cpu()]
            self._nearer(self.unrounded, rows.cpu()[hit], self._size(rows.cpu(), clipped)[hit])
        try:
            self.ask(rows, clipped)
        except BudgetSpent:
            return

    def _size(self, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float64[Tensor, " k"]:
        difference = (candidates - self.images[rows]).flatten(1).double()
        match self.norm:
            case "linf":
                return difference.abs().amax(dim=1)
            case "l2":
                return difference.norm(dim=1)
            case "l1":
                return difference.abs().sum(dim=1)
        return difference.ne(0).sum(dim=1).double()

    def _misclassified(self, rows: Tensor, _candidates: Tensor, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1) != self.labels[rows]

    def _spent(self, queries: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        return queries >= self._budget if self._budget is not None else torch.zeros_like(queries, dtype=torch.bool)

    def _affordable(self, rows: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        if self._budget is None:
            return torch.ones(len(rows), dtype=torch.bool)
        return self.queries[rows] + _earlier(rows) < self._budget

    def _count(self, rows: Int64[Tensor, " k"]) -> None:
        self.queries += torch.bincount(rows, minlength=len(self))

    def _keep(self, rows: Int64[Tensor, " k"], sent: Float32[Tensor, "k c h w"], hit: Bool[Tensor, " k"]) -> None:
        if not hit.any():
            return
        rows, sent = rows[hit], sent[hit]
        fresh = rows[self.distances[rows].isinf()]
        self.first_success[fresh] = self.queries[fresh]
        sizes = self._size(rows, sent)
        self._nearer(self.distances, rows, sizes)
        best = sizes == self.distances[rows]
        self.adversarial[rows[best]] = sent[best]

    @staticmethod
    def _nearer(distances: Float64[Tensor, " n"], rows: Int64[Tensor, " k"], sizes: Float64[Tensor, " k"]) -> None:
        distances.scatter_reduce_(0, rows, sizes, reduce="amin")


def _earlier(rows: Int64[Tensor, " k"]) -> Int64[Tensor, " k"]:
    """Return how many equal rows stand before each."""
    order = torch.argsort(rows, stable=True)
    sorted_rows = rows[order]
    first = torch.searchsorted(sorted_rows, sorted_rows)
    earlier = torch.empty_like(rows)
    earlier[order] = torch.arange(len(rows)) - first
    return earlier
