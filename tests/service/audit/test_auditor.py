from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from service.audit import assembly, page, summary
from service.audit import plan as plans
from service.audit.auditor import Auditor, Shard, ShardResult, shards_of
from service.audit.plan import CORRUPTIONS
from service.audit.report import Report

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from export.repository import Repository

PLAN = """
[target]
model = "digits-int8"
[data]
dataset = "digits"
samples = 60
[[attacks]]
id = "pgd"
name = "LinfPGD"
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


def _audit(repository: Repository, text: str, **provenance: object) -> Report:
    with Auditor(plans.parse(text), repository=repository) as auditor:
        return assembly.assemble(auditor, [auditor.run(shard) for shard in auditor.shards], provenance=provenance)


@pytest.fixture(scope="module")
def audited(digits_models: Repository) -> Report:
    return _audit(digits_models, PLAN, run=1)


def test_shards_cover_every_image_of_every_attack_once() -> None:
    shards = shards_of(plans.parse(PLAN), n=130)
    attacked = [index for shard in shards if shard.kind == "attack" for index in range(shard.start, shard.stop)]
    assert attacked == list(range(130))
    assert len({shard.name for shard in shards}) == len(shards)
    assert sum(shard.kind == "corruption" for shard in shards) == 4


def test_every_number_has_its_n_and_an_interval_around_it(audited: Report) -> None:
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
    assert 0 <= audited.differential.p_value <= 1
    assert audited.differential.reference_accuracy > 0.9
    assert audited.worst_case is not None
    assert audited.worst_case.accuracy == strong.robust_accuracy


def test_a_gate_that_fails_fails_the_verdict(audited: Report) -> None:
    assert [(gate.name, gate.outcome) for gate in audited.gates] == [("accuracy", "pass"), ("robust", "fail")]
    assert audited.verdict == "fail"


def test_two_runs_agree_in_everything_but_provenance(audited: Report, digits_models: Repository) -> None:
    again = json.loads(_audit(digits_models, PLAN, run=2).to_json())
    first = json.loads(audited.to_json())
    assert first.pop("provenance") != again.pop("provenance")
    assert first == again


def test_a_report_has_the_published_keys(audited: Report) -> None:
    keys = {
        "schema", "audit", "target", "data", "clean", "attacks", "worst_case", "corruptions", "differential", "gates",
        "warnings", "verdict", "provenance",
    }  # fmt: skip
    assert set(json.loads(audited.to_json())) == keys
    assert Report.model_validate_json(audited.to_json()) == audited


def test_a_page_holds_the_numbers_and_nothing_from_elsewhere(audited: Report) -> None:
    html = page.render([audited.to_json()])
    assert summary.with_interval(audited.clean.accuracy, audited.clean.interval) in html
    assert audited.target.sha256 in html
    for outside in ("http://", "https://", "<script", "<link", "@import"):
        assert outside not in html


def test_what_a_folder_is_called_cannot_write_html(audited: Report) -> None:
    evil = audited.model_copy(update={"data": {"source": "<script>alert(1)</script>", "n": 60, "seed": 0}})
    assert "<script>" not in page.render([evil.to_json()])


def test_images_of_another_size_are_refused(digits_models: Repository, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
    text = f'[target]\nmodel = "digits"\n[data]\nfolder = "{tmp_path}"\nsamples = 2\n'
    with pytest.raises(ValueError, match=r"the images are 20 x 10, and digits@1 takes 32 x 32; resize them"):
        Auditor(plans.parse(text), repository=digits_models)


def test_the_plan_knows_exactly_the_corruptions_that_there_are() -> None:
    from service.audit import corruptions

    assert corruptions.NAMES == CORRUPTIONS


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_a_model_that_takes_uint8_is_audited_by_what_can_be_sent(
    digits_run: Path, tmp_path: Path, output: Literal["logits", "probabilities"]
) -> None:
    from export import publish
    from export.publish import Form
    from export.repository import Repository

    repository = Repository(tmp_path)
    publish.publish_checkpoint(digits_run, repository=repository, name="digits", form=Form("uint8", output))
    report = _audit(
        repository, PLAN.replace("digits-int8", "digits").replace('[differential]\nreference = "digits"\n', "")
    )
    assert report.clean.accuracy > 0.9
    (attack,) = report.attacks
    weak, strong = attack.results
    assert strong.robust_accuracy < weak.robust_accuracy <= report.clean.accuracy
    # Less than half a grey level is nothing that can be sent.
    none = _audit(
        repository, PLAN.replace("digits-int8", "digits").split("[corruptions]")[0].replace("4/255", "0.4/255")
    )
    assert none.attacks[0].results[0].robust_accuracy == none.clean.accuracy


def _result(shard: Shard, **found: object) -> ShardResult:
    return ShardResult.model_validate({"shard": shard, "correct": "1111", "queries": 4, "seconds": 0.0, **found})


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"unstable": 1}, "unstable_outputs"),
        ({"batch_dependent": 2}, "batch_dependent_outputs"),
    ],
)
def test_an_engine_that_contradicts_itself_is_called_untrusted(
    digits_models: Repository, found: dict[str, int], code: str
) -> None:
    text = '[target]\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 4\n'
    with Auditor(plans.parse(text), repository=digits_models) as auditor:
        result = assembly.assemble(auditor, [_result(Shard(kind="clean", stop=4), **found)], provenance={})
    assert [warning.code for warning in result.warnings] == [code]
    assert result.verdict == "untrusted"


@pytest.mark.parametrize(("name", "code"), [("FGSM", "single_step_wins"), ("LinfUniformNoise", "gradient_free_wins")])
def test_a_weaker_attack_that_finds_more_says_that_gradients_are_masked(
    digits_models: Repository, name: str, code: str
) -> None:
    text = (
        '[target]\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 40\n'
        '[[attacks]]\nid = "pgd"\nname = "LinfPGD"\nepsilons = ["8/255"]\n'
        f'[[attacks]]\nid = "weak"\nname = "{name}"\nepsilons = ["8/255"]\n'
    )

    def attacked(attack: str, robust: str) -> ShardResult:
        shard = Shard(kind="attack", subject=attack, stop=40)
        return _result(shard, correct="1" * 40, robust={"8/255": robust})

    def codes(pgd: str, weak: str) -> list[str]:
        clean = _result(Shard(kind="clean", stop=40), correct="1" * 40)
        results = [clean, attacked("pgd", pgd), attacked("weak", weak)]
        return [doubt.code for doubt in assembly.assemble(auditor, results, provenance={}).warnings]

    with Auditor(plans.parse(text), repository=digits_models) as auditor:
        assert codes("1" * 40, "0" * 40) == [code]
        assert codes("0" * 40, "1" * 40) == []
        assert codes("1" * 20 + "0" * 20, "1" * 19 + "0" * 21) == []


def test_an_attack_that_does_not_converge_or_cannot_move_is_called_untrusted(digits_models: Repository) -> None:
    text = (
        '[target]\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 40\n'
        '[[attacks]]\nid = "pgd"\nname = "LinfPGD"\nepsilons = ["1/255", "8/255"]\n'
    )
    with Auditor(plans.parse(text), repository=digits_models) as auditor:
        attacked = _result(
            Shard(kind="attack", subject="pgd", stop=40),
            correct="1" * 40,
            robust={"1/255": "0" * 40, "8/255": "1" * 40},
            zero_gradients=40,
        )
        clean = _result(Shard(kind="clean", stop=40), correct="1" * 40)
        result = assembly.assemble(auditor, [clean, attacked], provenance={})
    assert {warning.code for warning in result.warnings} == {"zero_gradients", "not_monotone"}
    assert result.verdict == "untrusted"
