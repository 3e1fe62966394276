"""Warm-up: each engine answers batches of zeros before anybody waits for it.

manifest, settings --sizes, largest first--> zeros --every engine--> allocated, kernels chosen, graphs recorded
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from export.engines.base import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.engines.base import Engine
    from export.manifest import Manifest

Which = Literal["all", "powers", "one"]

# Bytes of the images of one warm-up call. A manifest may allow batches that no machine has the memory for; what has
# to be warmed up comes over the wire, and few batches are larger.
_LARGEST_WARM_UP = 256 << 20


def largest_batch(manifest: Manifest, limit: int | None) -> int:
    """Return the images that one call may have: the manifest's limit, or a smaller one of `[batching]`."""
    return manifest.max_batch if limit is None else min(limit, manifest.max_batch)


def warm_up(engines: Sequence[Engine], *, largest: int, which: Which) -> None:
    """Have every engine answer batches of every size that callers will meet first, from the largest down.

    Runtimes allocate, choose kernels and record graphs when they first see a size. The largest comes first, so that
    memory is taken once and not in ever larger pieces.
    """
    spec = engines[0].manifest.inputs[0]
    images = np.zeros((_bounded(largest, engines[0].manifest), *spec.shape[1:]), DTYPES[spec.datatype])
    for engine in engines:
        for size in warm_up_sizes(len(images), which):
            engine(images[:size])


def warm_up_sizes(largest: int, which: Which) -> list[int]:
    """Return the batch sizes to warm up, descending: all, powers of two and the largest, or 1 alone."""
    match which:
        case "all":
            return list(range(largest, 0, -1))
        case "powers":
            return sorted({largest, *(1 << power for power in range(largest.bit_length()))}, reverse=True)
        case "one":
            return [1]


def _bounded(largest: int, manifest: Manifest) -> int:
    spec = manifest.inputs[0]
    image = DTYPES[spec.datatype].itemsize * int(np.prod(spec.shape[1:], dtype=np.int64))
    return max(1, min(largest, _LARGEST_WARM_UP // max(1, image)))
