"""What became of every image: the results of an audit's shards, put together by image.

[ShardResult of some images] --gather--> Outcomes --> assembly: means over images
                                             '--to_csv--> outcomes.csv: one line an image

An audit that stopped early has looked at some images only, so everything says which rows it is about.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Bool, Float64, Int64

    from service.audit.plan import Plan
    from service.audit.shard import Distances, Shard, ShardResult

Key = TypeVar("Key")

# A perturbation may exceed its epsilon by float32's rounding, no more: as in service.audit.attack.search.
TOLERANCE = 1e-6

# Decimals of a distance in a file: more than float32 has at 1.
_DECIMALS = 9


@dataclass(frozen=True)
class Answers:
    """Top-1 classes of clean or corrupted images.

    Attributes:
        rows: (n,) which of the audit's samples.
        predictions: (n,) classes.
        confidences: (n,) softmax probabilities of these; None where they were not recorded.
        reference: (n,) the reference's classes; None without one.
    """

    rows: Int64[np.ndarray, " n"]
    predictions: Int64[np.ndarray, " n"]
    confidences: Float64[np.ndarray, " n"] | None = None
    reference: Int64[np.ndarray, " n"] | None = None


@dataclass(frozen=True)
class Attacked:
    """What one attack found.

    Attributes:
        nearest: answers to the nearest adversarial images; to the clean ones where there are none.
        distances: (n,) the smallest perturbation; 0 where none is needed, inf where none was found.
        unrounded: (n,) as `distances`, if results did not have to be rounded to what can be sent; None where nothing is
            rounded, or nothing could decide.
        parts: gradient source or attack of a suite -> its distances.
        agreement: gradient source -> (share of clean images that it classifies as the target does, images).
        asked: (n,) queries.
        first_success: (n,) queries up to the first success; 0 for none.
        queries: in all, those that no image's budget counts among them.
        budget_spent: images without any left.
    """

    nearest: Answers
    distances: Float64[np.ndarray, " n"]
    unrounded: Float64[np.ndarray, " n"] | None
    parts: dict[str, Float64[np.ndarray, " n"]]
    agreement: dict[str, tuple[float, int]]
    asked: Int64[np.ndarray, " n"]
    first_success: Int64[np.ndarray, " n"]
    queries: int
    budget_spent: int

    @property
    def rows(self) -> Int64[np.ndarray, " n"]:
        """Which of the audit's samples were attacked, (n,)."""
        return self.nearest.rows

    def robust(self, size: float) -> Bool[np.ndarray, " n"]:
        """Return which images were not fooled within a size."""
        return robust(self.distances, size)


@dataclass(frozen=True)
class Outcomes:
    """All that is known, by image.

    Attributes:
        labels: (n,) true classes of all samples.
        clean: answers to the clean images.
        corrupted: (corruption, severity) -> answers.
        attacked: attack's id -> what it found.
    """

    labels: Int64[np.ndarray, " n"]
    clean: Answers
    corrupted: dict[tuple[str, int], Answers] = field(default_factory=dict)
    attacked: dict[str, Attacked] = field(default_factory=dict)

    def correct(self, answers: Answers) -> Bool[np.ndarray, " k"]:
        """Return which answers are the true classes."""
        return np.asarray(answers.predictions == self.labels[answers.rows])


def robust(distances: Float64[np.ndarray, " n"], size: float) -> Bool[np.ndarray, " n"]:
    """Return which of the smallest perturbations exceed a size."""
    return np.asarray(distances > size + TOLERANCE)


def gather(results: Sequence[ShardResult], *, labels: Int64[np.ndarray, " n"]) -> Outcomes:
    """Put shards' results together, in the samples' order.

    Args:
        results: of any of an audit's shards, in any order.
        labels: true classes of all the audit's samples.

    Raises:
        ValueError: there is no answer to any clean image, without which nothing means anything.
    """
    clean = [result for result in _of(results, "clean") if result.predictions]
    if not clean:
        raise ValueError(
            "expected the answers to some clean images, got none: nothing was measured; run the audit again"
        )
    attacked = [result for result in _of(results, "attack") if result.distances]
    corrupted = [result for result in _of(results, "corruption") if result.predictions]
    return Outcomes(
        labels=labels,
        clean=_answers(clean),
        corrupted={key: _answers(own) for key, own in _grouped(corrupted, lambda s: (s.subject, s.severity))},
        attacked={key: _attacked(own) for key, own in _grouped(attacked, lambda s: s.subject)},
    )


def in_plan_order(plan: Plan, results: Sequence[ShardResult]) -> list[ShardResult]:
    """Return results in the order of the plan, whichever shard ended first: so equal results make equal files."""
    names = [*(plan.corruptions.names if plan.corruptions is not None else ()), *(attack.id for attack in plan.attacks)]
    places: dict[str, int] = {name: place for place, name in enumerate(names)}
    return sorted(results, key=lambda each: (places.get(each.shard.subject, -1), each.shard.severity, each.shard.start))


def to_csv(outcomes: Outcomes, *, indices: Int64[np.ndarray, " n"], class_names: Sequence[str]) -> str:
    """Return one line for each sample, and its columns' names; a field is empty where nothing was measured.

    Args:
        outcomes: of an audit.
        indices: of the samples in their data set.
        class_names: in the order of the logits.
    """
    columns: dict[str, dict[int, Any]] = {"label": _named(np.arange(len(indices)), outcomes.labels, class_names)}
    columns |= _answer_columns("clean", outcomes.clean, class_names)
    for (name, severity), answers in outcomes.corrupted.items():
        columns |= _answer_columns(f"{name} {severity}", answers, class_names)
    for attack, found in outcomes.attacked.items():
        columns |= _attack_columns(attack, found, class_names)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "index", *columns])
    writer.writerows(
        [row, int(index), *(column.get(row, "") for column in columns.values())] for row, index in enumerate(indices)
    )
    return file.getvalue()


def _of(results: Sequence[ShardResult], kind: str) -> list[ShardResult]:
    return sorted((each for each in results if each.shard.kind == kind), key=lambda each: each.shard.start)


def _grouped(results: Sequence[ShardResult], key: Callable[[Shard], Key]) -> Iterator[tuple[Key, list[ShardResult]]]:
    for value in dict.fromkeys(key(result.shard) for result in results):
        yield value, [result for result in results if key(result.shard) == value]


def _rows(results: Sequence[ShardResult]) -> Int64[np.ndarray, " n"]:
    counts = (len(result.predictions) or len(result.distances) for result in results)
    return np.concatenate(
        [np.arange(count) + result.shard.start for result, count in zip(results, counts, strict=True)]
    )


def _answers(results: Sequence[ShardResult]) -> Answers:
    return Answers(
        rows=_rows(results),
        predictions=np.concatenate([np.array(result.predictions) for result in results]),
        confidences=_joined([result.confidences for result in results]),
        reference=_joined([result.reference_predictions for result in results], dtype=np.int64),
    )


def _attacked(results: Sequence[ShardResult]) -> Attacked:
    nearest = Answers(
        rows=_rows(results),
        predictions=np.concatenate([np.array(result.adversarial_predictions) for result in results]),
        confidences=_joined([result.adversarial_confidences for result in results]),
        reference=_joined([result.reference_adversarial for result in results], dtype=np.int64),
    )
    return Attacked(
        nearest=nearest,
        distances=np.concatenate([_numbers(result.distances) for result in results]),
        unrounded=_unrounded(results),
        parts={name: _part(name, results) for name in dict.fromkeys(name for r in results for name in r.by_part)},
        agreement=_agreement(results),
        asked=np.concatenate([np.array(result.asked, dtype=np.int64) for result in results]),
        first_success=np.concatenate([np.array(result.first_success, dtype=np.int64) for result in results]),
        queries=sum(result.queries for result in results),
        budget_spent=sum(result.budget_spent for result in results),
    )


def _numbers(distances: Distances) -> Float64[np.ndarray, " n"]:
    return np.array([np.inf if value is None else value for value in distances], dtype=np.float64)


def _unrounded(results: Sequence[ShardResult]) -> Float64[np.ndarray, " n"] | None:
    """Return the distances without rounding; what was found rounded may be proposed there, too."""
    if not all(result.unrounded for result in results):
        return None
    unrounded = np.concatenate([_numbers(result.unrounded) for result in results])
    rounded = np.concatenate([_numbers(result.distances) for result in results])
    return np.asarray(np.minimum(unrounded, rounded))


def _part(name: str, results: Sequence[ShardResult]) -> Float64[np.ndarray, " n"]:
    """Return one part's distances; of a shard in which it was not needed, nothing more is found."""
    nothing = [tuple(0.0 if value == 0 else None for value in result.distances) for result in results]
    pairs = zip(results, nothing, strict=True)
    return np.concatenate([_numbers(result.by_part.get(name, missing)) for result, missing in pairs])


def _agreement(results: Sequence[ShardResult]) -> dict[str, tuple[float, int]]:
    sums: dict[str, tuple[float, int]] = {}
    for result in results:
        for name, share in result.agreement.items():
            n = len(result.distances)
            agreed, total = sums.get(name, (0.0, 0))
            sums[name] = (agreed + share * n, total + n)
    return {name: (agreed / total, total) for name, (agreed, total) in sums.items()}


def _joined(pieces: Sequence[Sequence[float]], *, dtype: type = np.float64) -> Any:
    return np.concatenate([np.array(piece, dtype=dtype) for piece in pieces]) if all(pieces) else None


def _named(
    rows: Int64[np.ndarray, " n"], classes: Int64[np.ndarray, " n"], class_names: Sequence[str]
) -> dict[int, Any]:
    return {int(row): class_names[each] for row, each in zip(rows, classes, strict=True)}


def _answer_columns(title: str, answers: Answers, class_names: Sequence[str]) -> dict[str, dict[int, Any]]:
    columns = {f"{title}: class": _named(answers.rows, answers.predictions, class_names)}
    if answers.confidences is not None:
        columns[f"{title}: confidence"] = dict(zip(answers.rows.tolist(), answers.confidences.tolist(), strict=True))
    if answers.reference is not None:
        columns[f"{title}: reference's class"] = _named(answers.rows, answers.reference, class_names)
    return columns


def _attack_columns(attack: str, found: Attacked, class_names: Sequence[str]) -> dict[str, dict[int, Any]]:
    columns = {f"{attack}: distance": _sizes(found.rows, found.distances)}
    if found.unrounded is not None:
        columns[f"{attack}: unrounded distance"] = _sizes(found.rows, found.unrounded)
    columns |= {f"{attack}, {name}: distance": _sizes(found.rows, sizes) for name, sizes in found.parts.items()}
    rows = found.rows.tolist()
    columns[f"{attack}: queries"] = dict(zip(rows, found.asked.tolist(), strict=True))
    columns[f"{attack}: queries to success"] = {
        row: each for row, each in zip(rows, found.first_success.tolist(), strict=True) if each
    }
    return columns | _answer_columns(attack, found.nearest, class_names)


def _sizes(rows: Int64[np.ndarray, " n"], sizes: Float64[np.ndarray, " n"]) -> dict[int, Any]:
    pairs = zip(rows.tolist(), sizes.tolist(), strict=True)
    return {row: round(size, _DECIMALS) for row, size in pairs if np.isfinite(size)}
