"""How a model is served: the batches its engine meets, the images it can be sent, the scale of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from service.audit.target.domain import Domain

if TYPE_CHECKING:
    from export.engines.base import Logits

# What a plan wants of the images: "auto" for what the model takes.
InputKind = Literal["auto", "float32", "uint8"]

# Below any probability that float32 tells from zero: its logarithm is finite.
_SMALLEST = np.finfo(np.float32).tiny


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the powers of two up to the largest batch, and that one, ascending."""
    return tuple(sorted({largest, *(1 << power for power in range(largest.bit_length()))}))


def domain(wanted: InputKind, *, datatype: str, model: str) -> Domain:
    """Return what a model can be sent.

    Args:
        wanted: the plan's `target.input`; "uint8" for 8-bit images in front of a model that takes floats.
        datatype: the protocol's, of the model's input.
        model: its name, for errors.

    Raises:
        ValueError: floats are wanted for a model that takes bytes.
    """
    if datatype == "UINT8":
        if wanted == "float32":
            raise ValueError(f"target.input: expected 'uint8' or 'auto' for {model}, which takes UINT8, got 'float32'")
        return Domain("uint8")
    return Domain("uint8" if wanted == "uint8" else "float32")


def as_logits(answers: Logits, *, probabilities: bool) -> Logits:
    """Return answers as logits: of probabilities the logarithms, of which softmax makes the same probabilities.

    What is nearer to 0 or 1 than float32 can tell is lost in them; a probability that is none, below 0, becomes NaN.

    Args:
        answers: (n, classes).
        probabilities: whether that is what the model answers with.
    """
    if not probabilities:
        return answers
    return np.asarray(np.where(answers >= 0, np.log(np.maximum(answers, _SMALLEST)), np.float32(np.nan)))
