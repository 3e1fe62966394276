"""Reports made of shards' results that are written down here, so that every number can be worked out by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export.store import atomic
from service.audit import artifacts, assembly, examples, outcomes, page, summary
from service.audit import plan as plans
from service.audit.measures import Measures
from service.audit.report import Doubt, Report, TargetReport
from service.audit.samples import Samples
from service.audit.sequential import Sequential
from service.audit.shard import Shard, ShardResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PLAN = """
[target]
model = "toy"
[data]
dataset = "digits"
samples = 8
[[attacks]]
id = "pgd"
name = "LinfPGD"
epsilons = ["8/255", "16/255"]
[[attacks]]
id = "noise"
name = "LinfUniformNoise"
epsilons = ["8/255"]
[[attacks]]
id = "apart"
name = "Disagreement"
epsilons = ["8/255"]
[corruptions]
names = ["fog", "contrast"]
severities = [1]
[differential]
reference = "other"
[gates]
accuracy = "accuracy >= 0.05"
robust = 'robust_accuracy["pgd", "8/255"] >= 0.5'
drop = 'accuracy - robust_accuracy["pgd", "16/255"] <= 0.3 and ece <= 0.9'
"""

NAMES = ("cat", "dog")
LABELS = np.array([0, 1] * 4)
SAMPLES = Samples(np.zeros((8, 4, 4, 3), np.uint8), LABELS, np.arange(100, 108))
TARGET = TargetReport(model="toy", version=1, sha256="ab" * 32, runtime="onnxruntime", precision="int8", input="uint8")
OTHER = TargetReport(model="other", version=2, sha256="cd" * 32, runtime="onnxruntime", precision="fp32")

# The target is wrong about the last image, the reference about the last two.
CLEAN = (0, 1, 0, 1, 0, 1, 0, 0)
REFERENCE = (0, 1, 0, 1, 0, 1, 1, 0)


def _result(kind: str, start: int = 0, stop: int = 8, **found: Any) -> ShardResult:
    own = {key: found.pop(key) for key in ("subject", "severity") if key in found}
    shard = Shard.model_validate({"kind": kind, "start": start, "stop": stop, **own})
    return ShardResult.model_validate({"shard": shard, "queries": 10, "seconds": 0.1, **found})


def _attack(subject: str, distances: Sequence[float | None], start: int = 0, **found: Any) -> ShardResult:
    n = len(distances)
    clean = CLEAN[start : start + n]
    fooled = [each is not None and each > 0 for each in distances]
    return _result(
        "attack",
        start,
        start + n,
        subject=subject,
        distances=tuple(distances),
        asked=(5,) * n,
        first_success=tuple(4 if hit else 0 for hit in fooled),
        adversarial_predictions=tuple(1 - each if hit else each for each, hit in zip(clean, fooled, strict=True)),
        adversarial_confidences=(0.6,) * n,
        reference_adversarial=REFERENCE[start : start + n],
        queries=5 * n + 3,
        **found,
    )


def _results() -> list[ShardResult]:
    answers: dict[str, Any] = {"confidences": (0.9,) * 8, "reference_predictions": REFERENCE}
    return [
        _result("clean", predictions=CLEAN, **answers),
        _result("corruption", subject="fog", severity=1, predictions=(0, 1, 0, 1, 1, 0, 1, 0), **answers),
        _result("corruption", subject="contrast", severity=1, predictions=CLEAN, **answers),
        # In the wrong order: shards may end in any.
        _attack(
            "pgd",
            (0.05, None, None, 0.0),
            start=4,
            unrounded=(0.02, 0.03, None, None),
            by_part={"onnx": (0.05, None, None, 0.0)},
            agreement={"onnx": 1.0},
        ),
        _attack(
            "pgd",
            (0.02, 0.03, 8 / 255, 0.06),
            unrounded=(0.01, 0.03, 0.03, 0.05),
            by_part={"checkpoint": (0.02, None, None, None), "onnx": (0.04, 0.03, 8 / 255, 0.06)},
            agreement={"checkpoint": 1.0, "onnx": 0.5},
        ),
        _attack("noise", (None, None, None, None, None, 0.03, None, 0.0)),
        _attack("apart", (None,) * 6 + (0.0, 0.02)),
    ]


def _assemble(results: Sequence[ShardResult], text: str = PLAN, **given: Any) -> Report:
    doubts: tuple[Doubt, ...] = given.pop("doubts", ())
    return assembly.assemble(
        plans.parse(text),
        samples=SAMPLES,
        class_names=NAMES,
        target=TARGET,
        reference=OTHER,
        results=results,
        check=lambda _plan, _results, _attacks: doubts,
        provenance={"run": 1},
        **given,
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return _assemble(_results())


def test_robust_accuracy_is_the_share_that_no_perturbation_within_epsilon_fooled(report: Report) -> None:
    pgd, noise = report.attacks
    assert [result.robust_accuracy for result in pgd.results] == [4 / 8, 2 / 8]
    assert noise.results[0].robust_accuracy == 6 / 8
    assert (pgd.queries, pgd.overhead) == (40, 6)
    for result in pgd.results:
        assert result.n == 8
        assert result.interval[0] < result.robust_accuracy < result.interval[1]
        assert result.queries == 5
    assert {each.name: each.accuracy for each in pgd.results[0].classes} == {"cat": 2 / 4, "dog": 2 / 4}


def test_what_rounding_spoils_is_reported_beside_what_it_leaves(report: Report) -> None:
    pgd, noise = report.attacks
    # The last image is wrong without any perturbation, so that it needs none before rounding either.
    assert pgd.results[0].unrounded_accuracy == 2 / 8
    assert pgd.unrounded is not None
    assert pgd.unrounded.found == 7
    assert noise.results[0].unrounded_accuracy is None


def test_each_gradient_source_has_the_share_that_it_was_the_first_to_fool(report: Report) -> None:
    (pgd, _) = report.attacks
    small, large = pgd.results
    assert small.parts == {"checkpoint": 1 / 8, "onnx": 2 / 8}
    assert large.parts == {"checkpoint": 1 / 8, "onnx": 4 / 8}
    # With the images that are wrong as they are, these are all that is not robust.
    assert small.robust_accuracy == 1 - 1 / 8 - 2 / 8 - 1 / 8


def test_a_part_for_which_nothing_was_left_has_no_share() -> None:
    clean = _result("clean", predictions=CLEAN, confidences=(0.9,) * 8)
    parts = {"checkpoint": (0.02,) * 7 + (0.0,), "onnx": (None,) * 7 + (0.0,)}
    found = _assemble([clean, _attack("pgd", (0.02,) * 7 + (0.0,), by_part=parts)])
    assert found.attacks[0].results[0].parts == {"checkpoint": 7 / 8, "onnx": None}
    assert "checkpoint 87.5 %, onnx –" in page.render([found.to_json()])


def test_the_page_says_which_smallest_perturbations_are_upper_bounds(report: Report) -> None:
    pgd, noise = report.attacks
    assert pgd.within
    assert noise.within
    said = "at most 0.0314 ["
    assert said in page.render([report.to_json()])
    assert "Of pgd, noise\nthe smallest perturbations" in page.render([report.to_json()])
    minimised = [each.model_copy(update={"within": False}) for each in report.attacks]
    html = page.render([report.model_copy(update={"attacks": tuple(minimised)}).to_json()])
    assert "at most" not in html
    assert "upper bounds" not in html


def test_each_gradient_source_has_its_agreement(report: Report) -> None:
    (pgd, _) = report.attacks
    assert {source.name: (source.agreement, source.n) for source in pgd.sources} == {
        "checkpoint": (1.0, 4),
        "onnx": (0.75, 8),
    }


def test_distances_count_images_that_were_not_fooled_as_larger_than_any(report: Report) -> None:
    pgd, noise = report.attacks
    assert (pgd.distances.n, pgd.distances.found) == (8, 6)
    assert pgd.distances.median == pytest.approx(8 / 255)
    assert pgd.distances.values["0.9"] is None
    assert noise.distances.median is None
    assert pgd.distances.histogram is not None
    assert sum(pgd.distances.histogram.counts) == 5
    assert pgd.queries_to_success is not None
    assert pgd.queries_to_success.median == 4


def test_the_curve_falls_from_clean_accuracy_to_the_largest_epsilon(report: Report) -> None:
    curve = report.attacks[0].curve
    accuracies = [point.accuracy for point in curve]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (curve[0].size, curve[0].accuracy) == (0, report.clean.accuracy)
    assert curve[-1].accuracy == report.attacks[0].results[-1].robust_accuracy


def test_the_worst_case_is_the_union_of_what_all_attacks_found_by_image(report: Report) -> None:
    assert report.worst_case is not None
    assert report.worst_case.accuracy == 1 / 8
    small, large = report.worst_case.results
    assert (small.epsilon, small.accuracy, small.attacks) == ("8/255", 3 / 8, ("pgd", "noise"))
    assert (large.epsilon, large.accuracy) == ("16/255", 1 / 8)


def test_a_search_for_disagreement_is_no_attack_on_accuracy(report: Report) -> None:
    assert [attack.id for attack in report.attacks] == ["pgd", "noise"]
    assert report.differential is not None
    (search,) = report.differential.searches
    assert search.results[0].robust_accuracy == 6 / 8


def test_disagreement_is_compared_on_clean_corrupted_and_perturbed_images(report: Report) -> None:
    found = report.differential
    assert found is not None
    assert (found.disagreement, found.reference_accuracy) == (1 / 8, 6 / 8)
    comparisons = {each.on: each for each in found.comparisons}
    assert list(comparisons) == ["clean", "fog 1", "contrast 1", "pgd", "noise"]
    assert (comparisons["fog 1"].target_only, comparisons["fog 1"].reference_only) == (0, 2)
    assert comparisons["pgd"].reference_only == 5
    assert found.corrupted_disagreement == (2 + 1) / 16
    assert found.perturbed_disagreement == (6 + 2) / 16
    for each in found.comparisons:
        assert each.p_value <= each.adjusted_p_value <= 1
    # Five tests: Holm multiplies the smallest p-value by five, 7/32 here.
    assert comparisons["pgd"].p_value == 7 / 32
    assert comparisons["pgd"].adjusted_p_value == 1


def test_corruptions_and_calibration(report: Report) -> None:
    assert report.corruptions is not None
    assert [cell.error for cell in report.corruptions.cells] == [4 / 8, 1 / 8]
    assert report.corruptions.mean_error == 5 / 16
    assert report.calibration is not None
    assert report.calibration.ece == pytest.approx(0.9 - 7 / 8)
    shifts = {each.on: each.shift for each in report.calibration.shifts}
    assert shifts == {
        "corruptions": 0,
        "pgd": pytest.approx(-0.3),
        "noise": pytest.approx(-0.3),
    }


def test_gates_say_what_they_compared_and_what_would_decide_them(report: Report) -> None:
    accuracy, robust, drop = report.gates
    assert (accuracy.outcome, accuracy.value, accuracy.n) == ("pass", 7 / 8, 8)
    assert (robust.outcome, robust.value) == ("inconclusive", 4 / 8)
    assert [term.text for term in drop.terms] == [
        'accuracy - robust_accuracy["pgd", "16/255"] <= 0.3',
        "ece <= 0.9",
    ]
    assert drop.terms[0].value == 5 / 8
    assert drop.value is None
    assert drop.outcome == "inconclusive"
    assert drop.samples is not None
    assert drop.samples > 8
    assert report.verdict == "inconclusive"
    assert f"{drop.samples} samples would decide" in summary.measured(drop)


DECIDED = PLAN.split("robust =", maxsplit=1)[0]


def test_a_raised_check_turns_a_pass_and_nothing_else_into_untrusted() -> None:
    doubt = (Doubt(code="zero_gradients", explanation="no gradient anywhere"),)
    assert _assemble(_results(), DECIDED).verdict == "pass"
    assert _assemble(_results(), DECIDED, doubts=doubt).verdict == "untrusted"
    failed = DECIDED.replace("accuracy >= 0.05", "accuracy <= 0.05")
    assert _assemble(_results(), failed, doubts=doubt).verdict == "fail"


def test_a_target_that_died_leaves_a_partial_report_that_passes_nothing() -> None:
    partial = _assemble(_results()[:4], DECIDED, error="toy: expected finite logits, got NaN")
    assert not partial.complete
    assert partial.verdict == "inconclusive"
    (pgd,) = partial.attacks
    assert pgd.n == 4
    assert partial.worst_case is not None
    assert partial.worst_case.n == 4
    html = page.render([partial.to_json()])
    assert "the audit ended early. toy: expected finite logits, got NaN" in html


def test_a_number_that_was_not_measured_decides_no_gate() -> None:
    partial = _assemble(_results()[:3], error="gone")
    robust = partial.gates[1]
    assert (robust.outcome, robust.value, robust.interval) == ("inconclusive", None, None)
    assert "not measured" in summary.measured(robust)


def test_without_any_answer_there_is_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="expected the answers to some clean images, got none"):
        _assemble(_results()[1:])


def test_a_sequential_audit_says_what_it_saved() -> None:
    text = DECIDED + "[sequential]\nerror_rate = 0.1\n"
    plan = plans.parse(text)
    stopping = Sequential(plan.gates, error_rate=0.1, planned=80)
    found = outcomes.gather(_results(), labels=LABELS)
    assert stopping.look(Measures(plan, found, class_names=NAMES), samples=8)
    sequential = _assemble(_results(), text, stopping=stopping).sequential
    assert sequential is not None
    assert (sequential.decided, sequential.planned, sequential.used, sequential.saved) == (True, 80, 8, 0.9)


def test_the_order_in_which_shards_ended_changes_nothing() -> None:
    results = _results()
    swapped = [results[0], results[2], results[1], *results[3:]]
    assert _assemble(results[::-1]).to_json() == _assemble(results).to_json() == _assemble(swapped).to_json()


def test_a_report_survives_its_json_and_has_the_keys_that_readers_know(report: Report) -> None:
    document = json.loads(report.to_json())
    known = {
        "schema", "audit", "target", "data", "clean", "attacks", "worst_case", "corruptions", "differential", "gates",
        "warnings", "verdict", "provenance",
    }  # fmt: skip
    assert known < set(document)
    assert {"accuracy", "interval", "n"} <= set(document["clean"])
    assert {"epsilon", "robust_accuracy", "interval", "n", "queries"} <= set(document["attacks"][0]["results"][0])
    assert Report.model_validate_json(report.to_json()) == report


def _examples() -> list[examples.Example]:
    clean = np.full((4, 3, 4, 4), 0.5, np.float32)
    changed = clean + np.float32(8 / 255)
    return list(
        examples.nearest(
            attack="pgd", start=0, clean=clean, adversarial=changed, distances=np.array([0.02, 0.03, 8 / 255, 0.06])
        )
    )


def test_the_page_shows_the_numbers_the_pictures_and_nothing_from_elsewhere() -> None:
    kept = _examples()
    report = _assemble(_results(), kept=kept, doubts=(Doubt(code="masked", explanation="<b>why</b>"),))
    assert [(each.row, each.index, each.label, each.prediction) for each in report.examples] == [
        (0, 100, "cat", "dog"),
        (1, 101, "dog", "cat"),
    ]
    html = page.render([report.to_json()], pictures=[{each.picture: examples.to_png(each) for each in kept}])
    assert html.count("data:image/png;base64,") == 2
    assert html.count("<svg") == 2 + 4 + 1
    for number in (report.clean, *report.attacks[0].curve[-1:]):
        assert summary.with_interval(number.accuracy, number.interval) in html
    assert "<b>why</b>" not in html
    for outside in ("http://", "https://", "<script", "<link", "@import"):
        assert outside not in html
    assert page.render([report.to_json()]) == page.render([report.to_json()])


def test_the_files_of_two_audits_are_the_same(tmp_path: Path) -> None:
    contents = []
    for name, results in (("first", _results()), ("second", _results()[::-1])):
        report = _assemble(results, kept=_examples())
        content = artifacts.files(
            report,
            plan=plans.parse(PLAN),
            samples=SAMPLES,
            class_names=NAMES,
            results=results,
            kept=_examples(),
        )
        atomic.write_all(tmp_path / name, content)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {
        "examples.npz", "examples/pgd-0.png", "examples/pgd-1.png", "outcomes.csv", "report.html", "report.json",
    }  # fmt: skip
    assert contents[0]["report.html"].count(b"data:image/png;base64,") == 2


def test_an_endpoint_has_no_hash_and_its_report_says_where_it_is() -> None:
    endpoint = TargetReport(model="remote", runtime="endpoint", endpoint="127.0.0.1:8001")
    report = _assemble(_results()).model_copy(update={"target": endpoint})
    headings, _ = summary.table([report])
    assert headings[1] == "remote (127.0.0.1:8001)"
    assert "sha256" not in page.render([report.to_json()]).split("What was audited")[1].split("<details>")[0]


def test_checks_that_were_not_made_stand_in_the_report_and_on_the_page() -> None:
    probes = [{"code": "no_gradients", "count": 8, "n": 8}]
    report = _assemble([*_results(), _result("checks", probes=probes)])

    assert "zero_gradients" in report.not_checked
    assert "constant_outputs" not in report.not_checked
    assert "Not checked for toy@1</b>: zero_gradients, source_disagrees" in page.render([report.to_json()])
    measured = _assemble([*_results(), _result("checks", probes=[{"code": "constant_outputs", "count": 0, "n": 8}])])
    assert measured.not_checked == ()
    assert "Not checked" not in page.render([measured.to_json()])
