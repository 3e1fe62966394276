"""How long an engine takes: each batch's time --smoothed, by size--> what a batch of a size will take at least."""

from __future__ import annotations

from time import monotonic_ns

# The share of a new measurement: a few batches forget an outlier, and none of them decides alone.
_WEIGHT = 0.25


class Durations:
    """Smoothed nanoseconds of an engine's calls, by batch size; one writer or several, no lock."""

    def __init__(self, max_batch: int) -> None:
        self._ns = [0] * (max_batch + 1)
        self._at_ns = [0] * (max_batch + 1)

    def measured(self, size: int, duration_ns: int) -> None:
        """Take in one measurement; one that is below what was expected counts in full.

        Who refuses requests by an estimate should err towards too little: what was slow once may have met another
        process, what was fast once can be.
        """
        before = self._ns[size]
        self._at_ns[size] = monotonic_ns()
        if not before or duration_ns < before:
            self._ns[size] = duration_ns
        else:
            self._ns[size] = before + round(_WEIGHT * (duration_ns - before))

    def certain(self, size: int, *, since_ns: int) -> int:
        """Return what a batch takes at least: 0 unless one of that size has run since, by the monotonic clock."""
        return self._ns[size] if self._at_ns[size] >= since_ns else 0

    def of(self, size: int) -> int:
        """Return what a batch takes: of that size, or of the largest smaller one that has run; 0 without any."""
        while size and not self._ns[size]:
            size -= 1
        return self._ns[size]
