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

from service.audit.target.domain import within

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

# Candidates whose sizes are computed at once: few enough that what is computed stays in the processor's cache.
_MEASURED = 32


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
        halfway: (n,) `distances` when half of an image's budget was asked; without a budget as at the beginning.
        unrounded: (n,) as `distances`, of `propose`d images that were not rounded to what can be sent; inf where
            unknown.
        looked_at: (n,) whether any such image was.
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
        self.images = target.domain.sent(images).clone()
        self.labels = labels
        self.norm = norm
        self._budget = budget
        self._goal = goal or self._misclassified
        n = len(images)
        self.distances = torch.full((n,), torch.inf, dtype=torch.float64)
        self.halfway = self.distances.clone()
        self.unrounded = self.distances.clone()
        self.looked_at = torch.zeros(n, dtype=torch.bool)
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
        unsettled = ~self.fooled(limit) & ~self._spent(self.queries)
        return torch.nonzero(unsettled).flatten()

    def fooled(self, epsilon: float) -> Bool[Tensor, " n"]:
        """Return which images the target gets wrong within epsilon."""
        return self.distances <= epsilon + TOLERANCE

    @property
    def spent(self) -> int:
        """How many images have no queries left."""
        return int(self._spent(self.queries).sum())

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
        candidates = self._finite(rows, candidates)
        may = self._affordable(rows)
        if may.all():
            return self._asked(rows, candidates)
        if not may.any():
            raise BudgetSpent
        logits = self._clean[rows]
        logits[may] = self._asked(rows[may], candidates[may])
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
        rows = rows.cpu()
        clipped = self._finite(rows, candidates).clamp(0, 1)
        if self.target.domain.step and unrounded is not None:
            hit = torch.ne(unrounded(clipped).argmax(dim=1).cpu(), self.labels[rows])
            self._nearer(self.unrounded, rows[hit], self._size(rows, clipped)[hit])
            self.looked_at[rows] = True
        try:
            self.ask(rows, clipped)
        except BudgetSpent:
            return

    def _asked(self, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float32[Tensor, "k classes"]:
        sent = self.target.domain.sent(candidates)
        logits = torch.from_numpy(self.target(sent.contiguous().numpy()))
        self.queries.scatter_add_(0, rows, torch.ones_like(rows))
        hit = torch.nonzero(self._goal(rows, sent, logits)).flatten()
        if len(hit):
            self._keep(rows, sent, hit)
        if self._budget is not None:
            early = rows[2 * self.queries[rows] <= self._budget]
            self.halfway[early] = self.distances[early]
        return logits

    def _finite(self, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float32[Tensor, "k c h w"]:
        """Return candidates on the CPU; values that an attack's own arithmetic lost are those of the clean image."""
        candidates = candidates.detach().to("cpu", torch.float32)
        if within(candidates):
            return candidates
        return candidates.where(candidates.isfinite(), self.images[rows])

    def _size(self, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float64[Tensor, " k"]:
        difference = self.images[rows].sub_(candidates).flatten(1)
        if self.norm == "l0":
            return torch.count_nonzero(difference, dim=1).double()
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[self.norm]
        sizes: Tensor = torch.linalg.vector_norm(difference, ord=order, dim=1, dtype=torch.float64)
        return sizes

    def _misclassified(self, rows: Tensor, _candidates: Tensor, logits: Tensor) -> Tensor:
        return torch.ne(logits.argmax(dim=1), self.labels[rows])

    def _spent(self, queries: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        return queries >= self._budget if self._budget is not None else torch.zeros_like(queries, dtype=torch.bool)

    def _affordable(self, rows: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        if self._budget is None:
            return torch.ones(len(rows), dtype=torch.bool)
        return self.queries[rows] + _earlier(rows) < self._budget

    def _keep(self, rows: Int64[Tensor, " k"], sent: Float32[Tensor, "k c h w"], hit: Int64[Tensor, " m"]) -> None:
        """Keep those of the sent images, at the places that hit, that are nearer than before."""
        rows = rows[hit]
        fresh = rows[self.distances[rows].isinf()]
        self.first_success[fresh] = self.queries[fresh]
        parts = zip(torch.split(rows, _MEASURED), torch.split(hit, _MEASURED), strict=True)
        sizes = torch.cat([self._size(some, sent[places]) for some, places in parts])
        self._nearer(self.distances, rows, sizes)
        best = sizes == self.distances[rows]
        self.adversarial[rows[best]] = sent[hit[best]]

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
