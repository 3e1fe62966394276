from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training import cutting, datasets, models, recipe
from training.inhibition import TenetStep

ROOT = Path(__file__).parents[2]
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.toml")) if "[training]" in path.read_text()]
SMALLEST = '[data]\nname = "digits"\n[training]\nepochs = 3\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "demo.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ValueError, match=r"demo\.toml") as caught:
        recipe.read(write(folder, text))
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).splitlines()]


def test_smallest_recipe_trains_without_tenet(tmp_path: Path) -> None:
    read = recipe.read(write(tmp_path, SMALLEST))
    assert read.tenet is None
    assert read.training.epochs == 3
    assert read.model.name == "resnet"


def test_tenet_defaults_are_the_published_ones(tmp_path: Path) -> None:
    tenet = recipe.read(write(tmp_path, SMALLEST + '[tenet]\nstage = "layer3"\n')).tenet
    assert tenet is not None
    assert (tenet.groups, tenet.interval, tenet.start, tenet.variant) == (6, 3, 500, "published")
    assert (tenet.lambda_tenet, tenet.lambda_orth, tenet.exact) == (0.1, 1e-3, False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_decode(path: Path) -> None:
    assert recipe.read(path).training.epochs >= 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_name_a_stage_of_their_model(path: Path) -> None:
    shipped = recipe.read(path)
    assert shipped.tenet is not None
    with torch.random.fork_rng(devices=[]):
        model = models.build(shipped.model, classes=10)
    assert shipped.tenet.stage in cutting.stages(model)
    tenet = TenetStep(model, stage=shipped.tenet.stage, groups=shipped.tenet.groups)
    side = shipped.data.size or {"tiny-imagenet": 64}.get(shipped.data.name, 32)
    assert tenet.channels(torch.zeros(2, 3, side, side)) >= 16


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    read = recipe.read(write(tmp_path, SMALLEST))
    with pytest.raises(ValidationError):
        read.training.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            SMALLEST + "[model]\ndepht = 8\n",
            "demo.toml: model.depht: unknown key; known keys are mean, std, name, depth, width",
        ),
        (
            SMALLEST + "[tenets]\n",
            "demo.toml: tenets: unknown key; known keys are data, model, training, augmentation, adversarial, tenet",
        ),
        ('[data]\nname = "digits"\n', "demo.toml: training: missing; expected this key in the recipe"),
        (
            SMALLEST.replace("3", "0"),
            "demo.toml: training.epochs: expected greater than or equal to 1, got 0",
        ),
        (SMALLEST.replace("3", '"3"'), "demo.toml: training.epochs: expected a valid integer, got '3'"),
        (SMALLEST.replace("3", "2.5"), "demo.toml: training.epochs: expected a valid integer, got 2.5"),
        (
            SMALLEST.replace("digits", "mnist"),
            "demo.toml: data.name: expected 'digits', 'folder', 'npz', 'cifar10', 'cifar100', 'tiny-imagenet' or "
            "'cub-200-2011', got 'mnist'",
        ),
        (
            SMALLEST + "[model]\ndepth = 9\n",
            "demo.toml: model.depth: expected 6n + 2 layers: 8, 14, 20, 26, ..., got 9",
        ),
        (
            SMALLEST + "[model]\nmean = [0.5, 0.5]\n",
            "demo.toml: model.mean.2: missing; expected this key in the recipe",
        ),
        (
            SMALLEST + "learning_rate = inf\n",
            "demo.toml: training.learning_rate: expected a finite number, got inf",
        ),
        (
            SMALLEST + f"seed = {2**60}\n",
            f"demo.toml: training.seed: expected less than {2**60}, got {2**60}",
        ),
        (
            SMALLEST + "[augmentation]\ncrop_padding = 65\n",
            "demo.toml: augmentation.crop_padding: expected less than or equal to 64, got 65",
        ),
        (
            SMALLEST + "learning_rate = 1e7\n",
            "demo.toml: training.learning_rate: expected less than or equal to 1000000, got 10000000.0",
        ),
        (
            SMALLEST + "threads = 1025\n",
            "demo.toml: training.threads: expected less than or equal to 1024, got 1025",
        ),
        (
            SMALLEST + "[augmentation]\nflip = 1\n",
            "demo.toml: augmentation.flip: expected a valid boolean, got 1",
        ),
        (
            SMALLEST + "[augmentation.augmix]\nwidht = 3\n",
            "demo.toml: augmentation.augmix.widht: unknown key; known keys are severity, width, depth, alpha, jsd, "
            "all_operations",
        ),
        (
            SMALLEST + '[model]\nname = "resnet18"\n',
            'demo.toml: model.name: expected "resnet", "resnext", "wide-resnet", "torchvision/NAME" or "timm/NAME", '
            "got 'resnet18'",
        ),
        (
            SMALLEST + '[model]\nname = "wide-resnet"\ndepth = 20\n',
            "demo.toml: model.depth: expected 6n + 4 layers: 10, 16, 22, 28, ..., got 20",
        ),
        (
            SMALLEST + '[model]\nname = "resnext"\ndepht = 29\n',
            "demo.toml: model.depht: unknown key; known keys are mean, std, name, depth, cardinality, width",
        ),
        (
            SMALLEST + '[model]\nfactory = "mine"\n',
            "demo.toml: model.factory: expected \"package.module:function\", got 'mine'",
        ),
        (
            SMALLEST + '[adversarial]\nepsilon = "8/255"\n',
            'demo.toml: adversarial.method: missing; expected "free" or "pgd"',
        ),
        (
            SMALLEST + '[adversarial]\nmethod = "fgsm"\n',
            'demo.toml: adversarial.method: expected "free" or "pgd", got \'fgsm\'',
        ),
        (
            SMALLEST + '[adversarial]\nmethod = "free"\nsteps = 3\n',
            "demo.toml: adversarial.steps: unknown key; known keys are method, epsilon, replays",
        ),
        (
            SMALLEST + '[adversarial]\nmethod = "pgd"\nepsilon = "8 / x"\n',
            "demo.toml: adversarial.epsilon: expected a number or a fraction such as \"8/255\", got '8 / x'",
        ),
        (
            SMALLEST + '[adversarial]\nmethod = "pgd"\nepsilon = 8\n',
            "demo.toml: adversarial.epsilon: expected less than or equal to 1, got 8",
        ),
        (
            SMALLEST + '[adversarial]\nmethod = "pgd"\n[augmentation.augmix]\n',
            "demo.toml: recipe: expected augmentation.augmix.jsd = 0 in adversarial training, whose images have one "
            "view, got 12.0",
        ),
        (
            SMALLEST + 'schedule = "step"\n',
            'demo.toml: training: expected milestones with schedule "step" and with no other, got schedule "step" and '
            "milestones []",
        ),
        (
            SMALLEST + 'schedule = "step"\nmilestones = [2, 3]\n',
            "demo.toml: training: expected milestones that rise and come before epoch 3, got [2, 3]",
        ),
        (
            SMALLEST + 'optimizer = "adamw"\nmomentum = 0.5\n',
            'demo.toml: training: expected momentum only with optimizer "sgd", without which it has no effect, '
            "got 0.5; leave it out",
        ),
        (
            SMALLEST + "decay = 0.5\n",
            'demo.toml: training: expected decay only with schedule "step", without which it has no effect, got 0.5; '
            "leave it out",
        ),
        (
            SMALLEST.replace("[training]", "workers = 4\n[training]"),
            "demo.toml: data: expected workers only with size, without which it has no effect, got 4; leave it out",
        ),
        (
            SMALLEST + "[augmentation]\nsmallest_crop = 0.5\n",
            "demo.toml: recipe: expected smallest_crop only with data.size, without which it has no effect, got 0.5; "
            "leave it out",
        ),
        (
            SMALLEST + '[tenet]\nstage = "layer2"\nexact = true\nfused = true\n',
            "demo.toml: tenet: expected exact or fused, got both; exact takes a second pass, which fused does without",
        ),
    ],
)
def test_a_problem_is_one_line_that_names_the_key(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


def test_each_problem_has_its_line(tmp_path: Path) -> None:
    lines = problems(tmp_path, SMALLEST + "flop = 1\nseed = -1\n")
    assert len(lines) == 2
    assert "training.seed" in lines[0] + lines[1]
    assert "training.flop" in lines[0] + lines[1]


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    assert "expected TOML" in problems(tmp_path, "[data\n")[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml: no such recipe"):
        recipe.read(tmp_path / "nowhere.toml")


def test_a_recipe_survives_its_json(document: dict[str, Any]) -> None:
    decoded = recipe.decode(document, source="x")
    assert recipe.Recipe.model_validate_json(decoded.model_dump_json()) == decoded


def test_every_name_in_a_recipe_has_something_behind_it() -> None:
    assert set(get_args(recipe.DataName)) == set(datasets.LOADERS)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
NAMES = st.sampled_from(["data", "model", "training", "tenet", "name", "epochs", "depth", "mean"]) | st.text()
DOCUMENTS = st.dictionaries(NAMES, SCALARS | st.lists(SCALARS) | st.dictionaries(NAMES, SCALARS | st.lists(SCALARS)))


@given(document=DOCUMENTS)
def test_anything_decodes_or_is_a_value_error(document: dict[str, Any]) -> None:
    problems = ""
    try:
        recipe.decode(document, source="fuzz")
    except ValueError as error:
        problems = str(error)
    assert all(line.startswith("fuzz: ") for line in problems.splitlines())
