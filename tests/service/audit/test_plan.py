from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.audit import plan as plans

ROOT = Path(__file__).parents[3]
MINIMAL = '[target]\nmodel = "m"\n[data]\ndataset = "digits"\n'
ATTACK = '[[attacks]]\nname = "LinfPGD"\nepsilons = ["8/255"]\n'
SUITE = '[[attacks]]\nsuite = "standard"\nepsilons = ["8/255"]\n'
ENDPOINT = """
[target]
model = "m"
endpoint = "127.0.0.1:8001"
labels = ["a", "b"]
mapping = { mean = [0.5, 0.5, 0.5], layout = "NHWC" }
[data]
dataset = "digits"
"""


def test_defaults_are_those_of_the_documentation() -> None:
    plan = plans.parse(MINIMAL + ATTACK)
    assert (plan.data.split, plan.data.samples, plan.data.seed) == ("test", None, 0)
    assert (plan.attacks[0].id, plan.attacks[0].access) == ("LinfPGD", "white-box")
    assert plans.epsilon_value(plan.attacks[0].epsilons[0]) == pytest.approx(8 / 255)


def test_the_standard_suite_is_an_entry_like_others() -> None:
    plan = plans.parse(MINIMAL + SUITE)
    (attack,) = plan.attacks
    assert (attack.name, attack.id, attack.norm, attack.access) == ("AutoAttack", "AutoAttack", "linf", "white-box")
    assert plans.parse(plans.to_toml(plan)) == plan


def test_an_endpoint_says_what_it_takes_and_where_its_gradients_come_from(tmp_path: Path) -> None:
    text = ENDPOINT.replace("labels", 'twin = "nets/twin.onnx"\nlabels') + ATTACK
    assert plans.parse(text).attacks[0].access == "white-box"
    path = tmp_path / "plan.toml"
    path.write_text(text)
    plan = plans.read(path)
    assert plan.target.twin == str((tmp_path / "nets/twin.onnx").resolve())
    assert plan.target.mapping is not None
    assert plan.target.mapping.mean == (0.5, 0.5, 0.5)
    assert plans.parse(plans.to_toml(plan)) == plan
    assert plans.Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("FGSM", "linf"),
        ("FGM", "l2"),
        ("L1PGD", "l1"),
        ("EADAttack", "l1"),
        ("LInfFMNAttack", "linf"),
        ("L0FMNAttack", "l0"),
        ("DDNAttack", "l2"),
        ("LinfinityBrendelBethgeAttack", "linf"),
        ("SparseL1DescentAttack", "l1"),
        ("HopSkipJumpAttack", "l2"),
        ("GaussianBlurAttack", "l2"),
    ],
)
def test_a_name_says_in_which_norm_epsilons_are(name: str, norm: str) -> None:
    (attack,) = plans.parse(MINIMAL + ATTACK.replace("LinfPGD", name)).attacks
    assert attack.norm == norm


def test_reading_a_plan_needs_no_torch() -> None:
    code = "import sys; import service.audit.plan; sys.exit(bool({'torch', 'foolbox'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        (MINIMAL + ATTACK.replace('"8/255"', "8"), r"attacks\[0\].*expected at most 1 in linf.*write 8 grey levels"),
        (MINIMAL + ATTACK + "budget = 0\n", r"attacks\[0\].*budget: expected at least 1, got 0"),
        (MINIMAL + ATTACK + "restarts = 0\n", r"attacks\[0\].*restarts: .*got 0"),
        (MINIMAL + ATTACK + "momentum = 0.5\n", r"attacks\[0\].*momentum: unknown key"),
        (MINIMAL + ATTACK + 'access = "transfer"\n', r"attacks\[0\].*surrogate: expected a model beside access"),
        (MINIMAL + ATTACK + 'access = "decision"\n', r"attacks\[0\].*access: .*got 'decision'"),
        (MINIMAL + ATTACK + 'surrogate = "other"\n', r"surrogate: expected a model beside access = 'transfer'"),
        (
            MINIMAL + ATTACK + 'access = "transfer"\nsurrogate = "other"\ngradients = "onnx"\n',
            "gradients: expected none for a transfer attack",
        ),
        (
            MINIMAL + ATTACK.replace("LinfPGD", "LinfAPGD") + "targets = 3\n",
            "targets: expected none for LinfAPGD, which is not targeted",
        ),
        (MINIMAL + SUITE.replace("standard", "huge"), r"suite: expected 'standard', got 'huge'"),
        (MINIMAL + SUITE + "steps = 5\n", r"attacks\[0\].*steps: unknown key"),
        (MINIMAL + ATTACK.replace("LinfPGD", "Disagreement"), r"Disagreement needs a second engine"),
        (ENDPOINT + ATTACK, r"attacks\.LinfPGD: a white-box attack needs gradients, and an endpoint gives none"),
        (ENDPOINT.replace(":8001", ""), r"target\.endpoint: string should match pattern"),
        (ENDPOINT.replace("mean", "men"), r"target\.mapping\.men: unknown key"),
        (ENDPOINT.replace('"a", "b"', '"a", "a"'), "expected each value once, got 'a' twice"),
        (MINIMAL.replace('"m"', '"m"\ntwin = "m2"'), "expected 'twin' beside 'endpoint'"),
        (MINIMAL + "[checks]\nsamples = 0\n", r"checks\.samples: .*got 0"),
        (MINIMAL + "[sequential]\n", "sequential: expected gates, which say when to stop, found none"),
        (
            MINIMAL + "[gates]\na = 'accuracy >= 0.5'\n[sequential]\n",
            r"sequential: expected an attack, .*found none; add an \[\[attacks\]\] table",
        ),
        (MINIMAL + ATTACK + "stepz = 3\n", r"attacks\[0\].*stepz: unknown key"),
        (MINIMAL + ATTACK + ATTACK, "expected unique ids, got 'LinfPGD' twice"),
        (MINIMAL + '[corruptions]\nnames = ["smoke"]\n', r"corruptions\.names\[0\]: expected .*got 'smoke'"),
        (MINIMAL + "[corruptions]\nseverities = [6]\n", r"corruptions\.severities\[0\]: .*got 6"),
        (MINIMAL + "[gates]\na = 'beauty >= 1'\n", r"gates\.a: expected one of the metrics accuracy"),
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
