from __future__ import annotations

from pathlib import Path

import pytest

from service.audit import plan as plans

ROOT = Path(__file__).parents[3]
MINIMAL = '[target]\nmodel = "m"\n[data]\ndataset = "digits"\n'
ATTACK = '[[attacks]]\nname = "LinfPGD"\nepsilons = ["8/255"]\n'


def test_defaults_are_those_of_the_documentation() -> None:
    plan = plans.parse(MINIMAL + ATTACK)
    assert (plan.data.split, plan.data.samples, plan.data.seed) == ("test", 1000, 0)
    assert (plan.attacks[0].id, plan.attacks[0].access) == ("LinfPGD", "white-box")
    assert plans.epsilon_value(plan.attacks[0].epsilons[0]) == pytest.approx(8 / 255)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("audit-*.toml")), ids=lambda path: path.name)
def test_every_plan_that_ships_is_sound_and_survives_the_wire(path: Path) -> None:
    plan = plans.read(path)
    assert plans.parse(plans.to_toml(plan)) == plan
    assert plans.Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[target", "plan: expected TOML"),
        (MINIMAL + "[datas]\n", "plan: datas: unknown key"),
        (MINIMAL.replace('"m"', '"../m"'), r"plan: target\.model: model name '\.\./m': expected letters"),
        ('[target]\nmodel = "m"\n[data]\n', "plan: data: expected either 'dataset' or 'folder'"),
        (MINIMAL + 'folder = "x"\n', "expected either 'dataset' or 'folder', got both"),
        (
            MINIMAL.replace("dataset", "folder") + 'root = "x"\n',
            "expected 'root' beside 'dataset', got it beside 'folder'",
        ),
        (MINIMAL + "size = 7\n", r"plan: data\.size: .*got 7"),
        (MINIMAL + ATTACK.replace("LinfPGD", "Magic"), r"attacks\[0\]\.name: unknown 'Magic'; expected one of FGSM"),
        (
            MINIMAL + ATTACK.replace('"8/255"', '"a lot"'),
            "expected a number or a fraction such as '8/255', got 'a lot'",
        ),
        (MINIMAL + ATTACK.replace('"8/255"', "-0.1"), "expected a number or a fraction"),
        (MINIMAL + ATTACK.replace('"8/255"', '"0/255"'), "expected an epsilon above 0"),
        (MINIMAL + ATTACK.replace('"8/255"', '"1e99999999"'), "expected a number or a fraction"),
        (MINIMAL + ATTACK.replace('"8/255"', '"8/255", "8/255"'), "expected each value once, got '8/255' twice"),
        (MINIMAL + "[corruptions]\nseverities = [1, 1]\n", "expected each value once, got 1 twice"),
        (MINIMAL + "[corruptions]\nnames = []\n", r"corruptions\.names: "),
        (MINIMAL + ATTACK.replace('["8/255"]', "[]"), r"epsilons: tuple should have at least 1 item"),
        (MINIMAL + ATTACK + "stepz = 3\n", r"attacks\[0\].*stepz: unknown key"),
        (MINIMAL + ATTACK + ATTACK, "expected unique ids, got 'LinfPGD' twice"),
        (MINIMAL + '[corruptions]\nnames = ["smoke"]\n', r"corruptions\.names\[0\]: input should be .*got 'smoke'"),
        (MINIMAL + "[corruptions]\nseverities = [6]\n", r"corruptions\.severities\[0\]: .*got 6"),
        (MINIMAL + "[gates]\na = 'beauty >= 1'\n", r"gates\.a: expected one of the subjects accuracy"),
        (MINIMAL + "[gates]\na = 'mean_error <= 1'\n", "mean_error needs corruptions in the plan"),
        (
            MINIMAL + ATTACK + '[gates]\na = \'robust_accuracy["x", "1"] > 0\'\n',
            r'expected one of robust_accuracy\["Lin',
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plans.parse(text)


@pytest.mark.parametrize(("key", "beside"), [("folder", ""), ("root", 'dataset = "cifar10"\n')])
def test_a_relative_place_of_images_is_relative_to_the_plan(tmp_path: Path, key: str, beside: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f'[target]\nmodel = "m"\n[data]\n{beside}{key} = "images"\n')
    plan = plans.read(path)
    assert getattr(plan.data, key) == (tmp_path / "images").resolve()
    assert plans.parse(plans.to_toml(plan)) == plan


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an audit plan here"):
        plans.read(tmp_path / "plan.toml")
