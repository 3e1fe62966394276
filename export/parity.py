"""Two engines, one set of images: differences, agreement, verdict.

Logits are compared because a client may threshold them; top-1 agreement because that is what most clients use;
accuracy because two engines may differ and be as good as one another.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.intervals import wilson
from export.manifest import Difference, Parity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float32, Int64

    from export.engines.base import Images, Logits
    from export.images import ImageSet

# Of the images that two engines differ on most: enough to look at, few enough to read.
WORST = 10


class ParityFailed(ValueError):  # noqa: N818 - it is a verdict, as that of a gate
    """An engine does not answer as its source does; `result` is the proof that failed."""

    def __init__(self, message: str, result: Parity) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Limits:
    """What still counts as the same classifier.

    Attributes:
        disagreement: largest share of images whose top-1 class may differ.
        logit_difference: largest absolute difference of any logit, as a share of the largest absolute logit of the
            reference, or of 1 where that is smaller; of probabilities, as a share of the largest one; None where
            rounding is the point.
    """

    disagreement: float
    logit_difference: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.disagreement <= 1:
            raise ValueError(
                f"largest disagreement: expected a share of the images from 0 to 1, got {self.disagreement}; "
                "0.01 allows one image in a hundred"
            )

    def as_record(self) -> dict[str, float]:
        """Return the limits that are set, for the manifest."""
        record = {"disagreement": self.disagreement}
        return record if self.logit_difference is None else {**record, "logit_difference": self.logit_difference}

    def allowing(self, disagreement: float | None) -> Limits:
        """Return these limits with another share of images that may differ; None keeps it."""
        return self if disagreement is None else replace(self, disagreement=disagreement)


# fp32 differs by the order of sums alone: what flips then are ties. fp16 has 11 bits; sound networks differ on less
# than 1 %. int8 rounds to 8 bits, and 3 % is more than sound int8 of small models costs.
LIMITS = {
    "fp32": Limits(disagreement=0.005, logit_difference=1e-3),
    "fp16": Limits(disagreement=0.01, logit_difference=None),
    "int8": Limits(disagreement=0.03, logit_difference=None),
}


def compare(
    answers: Logits,
    expected: Logits,
    *,
    reference: str,
    images: ImageSet,
    limits: Limits,
    class_names: Sequence[str],
    output: str = "logits",
    machine: str = "",
) -> Parity:
    """Compare an engine's answers with its source's on the same images.

    Args:
        answers: (N, classes) of the engine under test.
        expected: (N, classes) of the source.
        reference: what the source is, for the reader.
        images: what both were asked, N of them.
        limits: what is allowed.
        class_names: of the classes, in their order.
        output: "logits" or "probabilities": what both answer with.
        machine: where the engine ran, for the reader.

    Raises:
        ValueError: the shapes differ or there are no images.
    """
    if answers.shape != expected.shape or len(answers) != len(images) or not len(images):
        raise ValueError(
            f"parity: expected two equal, non-empty shapes for {len(images)} images, got {answers.shape} and "
            f"{expected.shape}"
        )
    difference = np.abs(answers - expected).max(axis=1)
    agree = answers.argmax(axis=1) == expected.argmax(axis=1)
    found = faults(answers, expected, limits=limits, output=output)
    return Parity(
        status="failed" if found else "passed",
        reference=reference,
        images=images.record,
        agreement=float(agree.mean()),
        agreement_interval=wilson(int(agree.sum()), len(agree)),
        accuracy=_accuracy(answers, images.labels),
        reference_accuracy=_accuracy(expected, images.labels),
        max_abs_difference=float(difference.max()),
        mean_abs_difference=float(np.abs(answers - expected).mean()),
        limits=limits.as_record(),
        worst=_worst(answers, expected, difference, images=images, class_names=class_names),
        machine=machine,
        explanation="; ".join(found) or _reach(len(images), limits),
    )


def batched(run: Callable[[Images], Logits], images: Images, *, batch: int) -> Logits:
    """Run an engine (or anything alike) over any number of images, `batch` at a time."""
    return np.concatenate([run(images[start : start + batch]) for start in range(0, len(images), batch)])


def this_machine() -> str:
    """Return the processor that engines on the CPU run on, for the reader of a proof."""
    cpus = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpus) if line.startswith("model name")]
    return f"{platform.machine()}, {names[0]}" if names else platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def faults(answers: Logits, expected: Logits, *, limits: Limits, output: str = "logits") -> list[str]:
    """Return what is wrong with answers (N, classes), compared with those expected; empty if nothing is."""
    if not np.isfinite(answers).all():
        return ["some logits are not finite"]
    found = []
    share = float(np.mean(answers.argmax(axis=1) != expected.argmax(axis=1)))
    if share > limits.disagreement:
        found.append(f"top-1 differs on {share:.2%} of the images, allowed are {limits.disagreement:.2%}")
    largest = float(np.abs(answers - expected).max())
    if limits.logit_difference is not None:
        # Logits may all be as small as the noise of their sums; probabilities are at least one over the classes.
        floor = 0.0 if output == "probabilities" else 1.0
        allowed = limits.logit_difference * max(floor, float(np.abs(expected).max()))
        if not largest <= allowed:
            found.append(f"{output} differ by up to {largest:.2g}, allowed are {allowed:.2g}")
    return found


def _reach(n: int, limits: Limits) -> str:
    """Say that there were too few images to see what the limits are about, if so."""
    if not 0 < n * limits.disagreement < 1:
        return ""
    return f"one of {n} images is already more than the {limits.disagreement:.2%} allowed: too few to see less"


def _accuracy(answers: Logits, labels: Int64[np.ndarray, " n"] | None) -> float | None:
    return None if labels is None else float(np.mean(answers.argmax(axis=1) == labels))


def _worst(
    answers: Logits,
    expected: Logits,
    difference: Float32[np.ndarray, " n"],
    *,
    images: ImageSet,
    class_names: Sequence[str],
) -> tuple[Difference, ...]:
    """Return the images that the two differ on most: other classes first, then by their logits."""
    agree = answers.argmax(axis=1) == expected.argmax(axis=1)
    # An answer that is no number differs more than any.
    order = np.lexsort((-np.nan_to_num(difference, nan=np.inf), agree))[:WORST]
    return tuple(
        Difference(
            image=images.names[index],
            logit_difference=float(difference[index]),
            answer=class_names[answers[index].argmax()],
            expected=class_names[expected[index].argmax()],
            label=None if images.labels is None else class_names[images.labels[index]],
        )
        for index in order
    )
