"""The classes with the highest scores, as Triton's extension "classification" gives them.

scores [batch, ...] --the k highest of each--> BYTES [batch, k]: "score:index", or "score:index:name"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.inference.datatypes import Array


def top_classes(scores: Array, k: int, *, class_names: Sequence[str]) -> Array:
    """Return each item's classes in falling order of their scores; equal scores in the order of the classes.

    Args:
        scores: [batch, ...] numbers, of any real dtype; all axes but the batch are one row of classes.
        k: how many classes, at least 1; all of them if there are fewer.
        class_names: their names; where one is missing or empty, the class is given without.

    Returns:
        [batch, min(k, classes)] objects, each a `bytes`; floating-point scores with six decimals.

    Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md.
    """
    rows = scores.reshape(len(scores), -1)
    best = _falling(rows)[:, :k]
    described = np.empty(best.shape, object)
    highest = np.take_along_axis(rows, best, axis=1)
    for item, (values, classes) in enumerate(zip(highest.tolist(), best.tolist(), strict=True)):
        described[item] = [_described(score, index, class_names) for score, index in zip(values, classes, strict=True)]
    return described


def _falling(rows: Array) -> Array:
    """Return the indices that sort each row from high to low, NaN last, equal ones in their order."""
    if rows.dtype.kind == "f":
        return np.argsort(-rows, axis=1, kind="stable")
    # Integers have no negative that is sure to fit: the reverse of the reversed row's rising order.
    order: Array = rows.shape[1] - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1]
    return order


def _described(score: float, index: int, class_names: Sequence[str]) -> bytes:
    number = f"{score:f}" if isinstance(score, float) else f"{score:d}"
    name = class_names[index] if index < len(class_names) else ""
    return (f"{number}:{index}:{name}" if name else f"{number}:{index}").encode()
