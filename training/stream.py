"""Random numbers that belong to images: an image gets the same however many processes share its batch.

generator of the run -> one draw for the whole batch, in every process -> the rows of this process's images
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A source of random numbers by image, shared by `processes` processes of equal parts of each batch.

    All processes hold a CPU generator in the same state, draw for all images of the batch, and take their own
    part: `process` is the number of this one. Numbers come out on the CPU.
    """

    generator: torch.Generator
    process: int = 0
    processes: int = 1

    def uniform(self, count: int, *shape: int) -> Float[Tensor, "count ..."]:
        """Return numbers in [0, 1) for this process's `count` images, of `shape` each."""
        return self._own(torch.rand(count * self.processes, *shape, generator=self.generator), count)

    def integers(self, below: int, count: int, *shape: int) -> Int64[Tensor, "count ..."]:
        """Return numbers in 0..below-1 for this process's `count` images, of `shape` each."""
        return self._own(torch.randint(below, (count * self.processes, *shape), generator=self.generator), count)

    def normal(self, count: int, *shape: int) -> Float[Tensor, "count ..."]:
        """Return standard normal numbers for this process's `count` images, of `shape` each."""
        return self._own(torch.randn(count * self.processes, *shape, generator=self.generator), count)

    def dirichlet(self, alpha: float, count: int, width: int) -> Float[Tensor, "count width"]:
        """Return weights that sum to 1, from a symmetric Dirichlet distribution, for `count` images."""
        rows = self._numpy().dirichlet([alpha] * width, size=count * self.processes)
        return self._own(torch.from_numpy(rows).float(), count)

    def beta(self, alpha: float, count: int) -> Float[Tensor, " count"]:
        """Return weights in [0, 1] from a symmetric Beta distribution, for `count` images."""
        return self._own(torch.from_numpy(self._numpy().beta(alpha, alpha, size=count * self.processes)).float(), count)

    def _own(self, rows: Tensor, count: int) -> Tensor:
        return rows[self.process * count : (self.process + 1) * count]

    def _numpy(self) -> np.random.Generator:
        """Return NumPy's generator, which has the distributions that PyTorch's public interface lacks."""
        return np.random.default_rng(int(torch.randint(2**62, (), generator=self.generator)))
