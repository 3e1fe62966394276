"""Answers that were given before: one version of a model, asked with the same bytes, answers the same.

    inputs --sha256--> key --get--> answer | None --engine, put--> answer kept, the longest unused ones dropped

Requests that are alike and under way at once each reach the engine; the answer of the first to finish is kept.

The hash must resist collisions: otherwise a caller could prepare two images of which one gets the other's answer.
sha256 takes 0.33 ms for 600 KB on a processor with instructions for it, half of what blake2b takes.

For the thread of the event loop alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from export.engines.base import Inputs, Logits
    from service.settings import Cache

# Bytes that an answer takes beside its numbers: the array, the key and its place in the table (measured: 330 to 390).
OVERHEAD = 400


class ResponseCache:
    """The answers of one version of one model, at most so many bytes of them.

    Args:
        settings: whether there is one, and how large.
    """

    def __init__(self, settings: Cache) -> None:
        self.enabled = settings.enabled
        self._most = int(settings.max_mib * (1 << 20)) if settings.enabled else 0
        self._answers: OrderedDict[bytes, Logits] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._answers)

    @property
    def byte_size(self) -> int:
        """The memory that the answers take, with what is kept beside them."""
        return self._bytes

    @staticmethod
    def key(inputs: Inputs) -> bytes:
        """Return the hash of a request: of the datatype, the shape and the bytes of its images."""
        digest = hashlib.sha256(f"{inputs.dtype.str}{inputs.shape}".encode())
        digest.update(np.ascontiguousarray(inputs).reshape(-1).view(np.uint8).data)
        return digest.digest()

    def get(self, key: bytes) -> Logits | None:
        """Return the answer, which nobody may write to, or None; it counts as used."""
        if (answer := self._answers.get(key)) is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: bytes, logits: Logits) -> None:
        """Keep a copy of an answer; to make room those go first that were not used for longest."""
        size = logits.nbytes + OVERHEAD
        if key in self._answers or size > self._most:
            return
        # A copy: logits are a view of a whole batch's, which would be kept with them.
        kept = np.array(logits)
        kept.flags.writeable = False
        self._answers[key] = kept
        self._bytes += size
        while self._bytes > self._most:
            _, dropped = self._answers.popitem(last=False)
            self._bytes -= dropped.nbytes + OVERHEAD

    def clear(self) -> None:
        """Forget all answers."""
        self._answers.clear()
        self._bytes = 0
