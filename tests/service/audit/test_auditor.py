from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from export import publish
from export.publish import Form
from export.repository import Repository
from service.audit import page, summary
from service.audit import plan as plans
from service.audit.auditor import Auditor, shards_of
from service.audit.plan import CORRUPTIONS
from service.audit.report import Report
from service.audit.run import Finished, run
from service.audit.target.base import TargetFailed

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

PLAN = """
[target]
model = "digits-int8"
[data]
dataset = "digits"
samples = 60
[checks]
samples = 30
[[attacks]]
id = "pgd"
name = "LinfPGD"
gradients = "all"
epsilons = ["4/255", "48/255"]
steps = 5
[corruptions]
names = ["gaussian_noise", "contrast"]
severities = [1, 5]
[differential]
reference = "digits"
[gates]
accuracy = "accuracy >= 0.5"
robust = 'robust_accuracy["pgd", "48/255"] >= 0.9'
"""

KEYS = {
    "schema", "audit", "target", "data", "clean", "attacks", "worst_case", "corruptions", "differential", "gates",
    "warnings", "verdict", "provenance",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(digits_models: Repository) -> Finished:
    return run(plans.parse(PLAN), repository=digits_models)


@pytest.fixture(scope="module")
def audited(finished: Finished) -> Report:
    return finished.report


def _with(text: str, changes: dict[str, str]) -> plans.Plan:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return plans.parse(text)


def test_shards_cover_every_image_of_every_attack_once_slice_after_slice() -> None:
    second = '[[attacks]]\nid = "noise"\nname = "LinfUniformNoise"\nepsilons = [0.1]\n'
    shards = shards_of(plans.parse(PLAN + second), n=130)
    attacks = [shard for shard in shards if shard.kind == "attack"]
    assert [(shard.subject, shard.start, shard.stop) for shard in attacks] == [
        ("pgd", 0, 50), ("noise", 0, 50), ("pgd", 50, 100), ("noise", 50, 100), ("pgd", 100, 130), ("noise", 100, 130),
    ]  # fmt: skip
    assert len({shard.name for shard in shards}) == len(shards)
    assert sum(shard.kind == "corruption" for shard in shards) == 4
    assert [(shard.kind, shard.stop) for shard in shards[:2]] == [("clean", 130), ("checks", 30)]


def test_an_attack_by_decisions_keeps_its_budget_and_a_shard_counts_the_same_whatever_ran_before(
    digits_models: Repository,
) -> None:
    hsj = {'"LinfPGD"\ngradients = "all"': '"HopSkipJumpAttack"\nbudget = 30', "steps = 5": "steps = 2"}
    plan = _with(PLAN, hsj)
    *_, first, second = shards_of(plan, n=60)

    with Auditor(plan, repository=digits_models) as auditor:
        asked = auditor.target.queries
        found = [auditor.run(first), auditor.run(second)]
        asked = auditor.target.queries - asked
    with Auditor(plan, repository=digits_models) as auditor:
        alone = auditor.run(second)

    assert max(*found[0].asked, *found[1].asked) == 30
    # Of each image once more: the nearest that was found.
    assert [each.queries - sum(each.asked) for each in found] == [50, 10]
    assert alone.queries == found[1].queries
    # All 60 are starts for each other, and are asked about once for both shards.
    assert asked == sum(each.queries for each in found) + 60
    assert len(found[0].halfway) == 50


def test_every_number_has_its_n_and_an_interval_around_it(audited: Report) -> None:
    assert audited.complete
    assert audited.clean.n == 60
    assert audited.clean.interval[0] <= audited.clean.accuracy <= audited.clean.interval[1]
    (attack,) = audited.attacks
    weak, strong = attack.results
    assert strong.robust_accuracy < weak.robust_accuracy <= audited.clean.accuracy
    assert strong.interval[0] <= strong.robust_accuracy <= strong.interval[1]
    assert audited.corruptions is not None
    errors = {(cell.corruption, cell.severity): cell.error for cell in audited.corruptions.cells}
    assert errors["gaussian_noise", 5] >= errors["gaussian_noise", 1]
    assert audited.corruptions.mean_error == pytest.approx(sum(errors.values()) / 4)
    assert audited.differential is not None
    assert audited.differential.reference.model == "digits"
    assert audited.worst_case is not None
    assert audited.worst_case.accuracy == strong.robust_accuracy


def test_an_int8_engine_is_attacked_by_its_checkpoint_and_by_its_own_onnx(audited: Report) -> None:
    (attack,) = audited.attacks
    assert {source.name for source in attack.sources} == {"checkpoint", "onnx"}


def test_a_gate_that_fails_fails_the_verdict(audited: Report) -> None:
    assert [(gate.name, gate.outcome) for gate in audited.gates] == [("accuracy", "pass"), ("robust", "fail")]
    assert audited.verdict == "fail"


def test_two_runs_agree_in_everything_but_provenance(finished: Finished, digits_models: Repository) -> None:
    again = run(plans.parse(PLAN), repository=digits_models)
    reports = [json.loads(one.files["report.json"]) for one in (finished, again)]
    assert reports[0].pop("provenance") != reports[1].pop("provenance")
    assert reports[0] == reports[1]
    for name in ("outcomes.csv", "examples.npz"):
        assert finished.files[name] == again.files[name]


def test_a_report_has_the_published_keys(audited: Report) -> None:
    assert set(json.loads(audited.to_json())) >= KEYS
    assert Report.model_validate_json(audited.to_json()) == audited


def test_a_page_holds_the_numbers_and_nothing_from_elsewhere(audited: Report) -> None:
    html = page.render([audited.to_json()])
    assert summary.with_interval(audited.clean.accuracy, audited.clean.interval) in html
    assert str(audited.target.sha256) in html
    for outside in ("http://", "https://", "<script", "<link", "@import"):
        assert outside not in html


def test_the_files_of_an_audit_hold_every_image_and_the_worst_examples(
    finished: Finished, digits_models: Repository, tmp_path: Path
) -> None:
    finished.write(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "outcomes.csv").read_text())))
    assert len(rows) == 60
    kept = np.load(tmp_path / "examples.npz")
    pairs = [(kept[name], kept[name.replace("clean", "adversarial")]) for name in kept.files if name.endswith("clean")]
    assert pairs
    with Auditor(plans.parse(PLAN), repository=digits_models) as auditor:
        for clean, adversarial in pairs:
            before, after = auditor.target.predict(np.stack([clean, adversarial]))
            assert before != after


def test_what_is_measured_does_not_depend_on_how_many_images_memory_holds(
    digits_models: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans.parse(PLAN)
    with Auditor(plan, repository=digits_models) as auditor:
        whole = [auditor.run(shard) for shard in auditor.shards if shard.kind in {"clean", "corruption"}]
        monkeypatch.setattr(auditor.target, "batch_sizes", (1, 7))
        monkeypatch.setattr("service.audit.auditor._CHUNK_BYTES", 1)
        again = [auditor.run(result.shard) for result in whole]
    for one, other in zip(whole, again, strict=True):
        assert one.predictions == other.predictions
        assert one.reference_predictions == other.reference_predictions


def test_how_fast_the_target_answered_stands_beside_what_else_varies(audited: Report) -> None:
    latency = audited.provenance["latency_ms"]
    assert isinstance(latency, float)
    assert latency > 0


def test_what_gradients_are_not_taken_from_is_told(digits_models: Repository, tmp_path: Path) -> None:
    from export.mapping import Mapping
    from export.publish import publish_onnx

    repository = Repository(tmp_path)
    folder = digits_models.find("digits").folder
    names = digits_models.find("digits").manifest.class_names
    publish_onnx(folder / "model.onnx", repository=repository, name="theirs", mapping=Mapping(), labels=",".join(names))
    text = PLAN.split("[corruptions]", maxsplit=1)[0].replace("digits-int8", "theirs")
    report = run(plans.parse(text), repository=repository).report
    assert [source.name for source in report.attacks[0].sources] == ["onnx"]
    assert len(report.refused_sources) == 1
    assert report.refused_sources[0].startswith("checkpoint: ")
    assert report.refused_sources[0].removeprefix("checkpoint: ") in page.render([report.to_json()]).replace(
        "&#39;", "'"
    )


def test_what_a_folder_is_called_cannot_write_html(audited: Report) -> None:
    evil = audited.model_copy(update={"data": {"source": "<script>alert(1)</script>", "n": 60, "seed": 0}})
    assert "<script>" not in page.render([evil.to_json()])


def test_gates_that_are_decided_end_the_audit_early(digits_models: Repository) -> None:
    text = PLAN.replace("samples = 60", "samples = 200").split("[corruptions]")[0].replace('"all"', '"checkpoint"')
    gates = '[gates]\nrobust = \'robust_accuracy["pgd", "48/255"] >= 0.9\'\n[sequential]\nerror_rate = 0.05\n'
    report = run(plans.parse(text + gates), repository=digits_models).report
    assert report.verdict == "fail"
    assert report.sequential is not None
    assert report.sequential.used < report.sequential.planned == 200
    assert report.attacks[0].n == report.sequential.used


class _Dying:
    """An engine that answers so many images, and then no more."""

    def __init__(self, target: Any, *, images: int) -> None:
        self._answer = target._answer
        self._left = images

    def __call__(self, images: Any) -> Any:
        self._left -= len(images)
        if self._left < 0:
            raise TargetFailed("digits-int8@1: it is gone")
        return self._answer(images)


def test_a_target_that_dies_on_the_way_leaves_a_partial_report(
    digits_models: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans.parse(PLAN.split("[gates]", maxsplit=1)[0])
    whole = Auditor.run

    def dying(auditor: Auditor, shard: Any) -> Any:
        if shard.kind == "attack":
            monkeypatch.setattr(auditor.target, "_answer", _Dying(auditor.target, images=10))
        return whole(auditor, shard)

    monkeypatch.setattr(Auditor, "run", dying)
    report = run(plan, repository=digits_models).report
    assert not report.complete
    assert report.error == "pgd, images 1 to 50: digits-int8@1: it is gone"
    assert report.verdict == "inconclusive"
    assert report.corruptions is not None
    assert report.attacks == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'dataset = "digits"': 'dataset = "digits"\nsize = 20'}, "expected none, as these images are all of 32 x 32"),
        ({'reference = "digits"': 'reference = "digits-int8"'}, "expected another engine than the target"),
        ({"samples = 60": "samples = 100000"}, "expected at most the"),
        ({'"accuracy >= 0.5"': "'class_accuracy[\"zebra\"] >= 0.5'"}, "zebra"),
        ({"LinfPGD": "L2PGD", '48/255"]\n': '99"]\n', '48/255"] >=': '99"] >='}, "99"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(
    digits_models: Repository, changes: dict[str, str], message: str
) -> None:
    plan = _with(PLAN, changes)
    with pytest.raises(ValueError, match=message) as caught:
        run(plan, repository=digits_models)
    assert "\n" not in str(caught.value)


def test_the_plan_knows_exactly_the_corruptions_that_there_are() -> None:
    from service.audit import corruptions

    assert corruptions.NAMES == CORRUPTIONS


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_a_model_that_takes_uint8_is_audited_by_what_can_be_sent(
    digits_run: Path, tmp_path: Path, output: Literal["logits", "probabilities"]
) -> None:
    repository = Repository(tmp_path)
    publish.publish_checkpoint(digits_run, repository=repository, name="digits", form=Form("uint8", output))
    text = PLAN.replace("digits-int8", "digits").replace('[differential]\nreference = "digits"\n', "")
    report = run(plans.parse(text), repository=repository).report
    assert report.clean.accuracy > 0.9
    (attack,) = report.attacks
    weak, strong = attack.results
    assert strong.robust_accuracy < weak.robust_accuracy <= report.clean.accuracy
    # Less than a grey level is nothing that can be sent.
    tiny = text.split("[corruptions]", maxsplit=1)[0].replace("4/255", "0.4/255", 1)
    with pytest.raises(ValueError, match=r"epsilons: expected at least 1/255, a grey level.* got 0.4/255"):
        run(plans.parse(tiny), repository=repository)
