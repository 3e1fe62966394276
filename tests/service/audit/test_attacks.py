from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from export import twin
from export.engines import open_engine
from service.audit import attacks, samples
from service.audit import plan as plans
from service.audit.plan import Attack, Data
from service.audit.targets import AttackModel, EngineTarget, zero_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from export.engines.base import Images, Logits
    from export.repository import Repository

    Labels = np.ndarray[Any, np.dtype[np.int64]]

_SAMPLES = samples.load(Data(dataset="digits", samples=40), class_names=tuple("0123456789"))
_IMAGES, _LABELS = samples.as_input(_SAMPLES.images), _SAMPLES.labels


def _attack(name: str, epsilons: str, **options: int) -> Attack:
    extra = "".join(f"{key} = {value}\n" for key, value in options.items())
    head = '[target]\nmodel = "m"\n[data]\ndataset = "digits"\n'
    (attack,) = plans.parse(f'{head}[[attacks]]\nname = "{name}"\nepsilons = {epsilons}\n{extra}').attacks
    return attack


@pytest.fixture
def model(digits_models: Repository) -> Iterator[AttackModel]:
    version = digits_models.find("digits")
    module = twin.load(version, repository=digits_models)
    assert module is not None
    with open_engine(version.folder) as engine:
        yield AttackModel(EngineTarget(engine), module.requires_grad_(requires_grad=False))


ATTACKS = [
    _attack("FGSM", '["1/255", "16/255"]'),
    _attack("LinfPGD", '["1/255", "32/255"]', steps=10),
    _attack("L2PGD", "[0.1, 6.0]", steps=10),
    _attack("BoundaryAttack", "[2.0, 12.0]", steps=100),
    _attack("LinfUniformNoise", "[0.3, 0.9]", repeats=20),
    _attack("L2GaussianNoise", "[10.0, 40.0]", repeats=20),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_every_attack_finds_more_within_a_large_epsilon_and_repeats_itself(attack: Attack, model: AttackModel) -> None:
    first = attacks.run(attack, model=model, images=_IMAGES, labels=_LABELS, pool=_IMAGES, seed=7)
    small, large = (first.robust[epsilon] for epsilon in attack.epsilons)
    assert first.correct.mean() > 0.9
    assert not (small & ~first.correct).any()
    assert large.sum() < small.sum() <= first.correct.sum()
    assert first.queries >= 2 * first.correct.sum()
    again = attacks.run(attack, model=model, images=_IMAGES, labels=_LABELS, pool=_IMAGES, seed=7)
    assert {key: list(value) for key, value in first.robust.items()} == {k: list(v) for k, v in again.robust.items()}


def test_a_seed_leaves_the_callers_random_numbers_alone(model: AttackModel) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    attacks.run(ATTACKS[1], model=model, images=_IMAGES[:4], labels=_LABELS[:4], pool=_IMAGES, seed=7)
    assert torch.equal(torch.rand(3), expected)


class _Stubborn:
    """An engine that answers with the labels it was given, whatever the image: nothing fools it."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self.queries = 0

    def __call__(self, images: Images) -> Logits:
        self.queries += len(images)
        return np.asarray(np.eye(10, dtype=np.float32)[self._labels[: len(images)]])

    def predict(self, images: Images) -> Labels:
        return np.asarray(self(images).argmax(axis=1))

    def seen(self, images: Images) -> Images:
        return images


def test_the_engine_decides_and_not_the_twin(model: AttackModel) -> None:
    """The twin is fooled by these perturbations; an engine that is not must be reported robust."""
    stubborn = AttackModel(_Stubborn(_LABELS), model.twin)  # type: ignore[arg-type]
    outcome = attacks.run(ATTACKS[1], model=stubborn, images=_IMAGES, labels=_LABELS, pool=_IMAGES, seed=7)
    assert all(robust.all() for robust in outcome.robust.values())
    fooled = attacks.run(ATTACKS[1], model=model, images=_IMAGES, labels=_LABELS, pool=_IMAGES, seed=7)
    assert not fooled.robust["32/255"].any()


def test_images_that_the_engine_gets_wrong_are_not_attacked(model: AttackModel) -> None:
    wrong = (_LABELS + 1) % 10
    outcome = attacks.run(ATTACKS[1], model=model, images=_IMAGES[:8], labels=wrong[:8], pool=_IMAGES, seed=0)
    assert outcome.queries == 8
    assert not outcome.correct.any()
    assert not any(robust.any() for robust in outcome.robust.values())


def test_a_white_box_attack_without_a_twin_is_refused_before_it_starts(model: AttackModel) -> None:
    bare = AttackModel(model.target, None)
    with pytest.raises(ValueError, match=r"attacks\.LinfPGD: a white-box attack needs gradients"):
        attacks.run(ATTACKS[1], model=bare, images=_IMAGES, labels=_LABELS, pool=_IMAGES, seed=0)
    assert model.target.queries == 0


def test_a_decision_attack_needs_no_second_class_among_the_images_it_attacks(model: AttackModel) -> None:
    attack = _attack("BoundaryAttack", "[40.0]", steps=5)
    one = slice(0, 1)
    attacked = attacks.run(attack, model=model, images=_IMAGES[one], labels=_LABELS[one], pool=_IMAGES, seed=0)
    assert not attacked.robust["40.0"].any()
    nowhere = attacks.run(attack, model=model, images=_IMAGES[one], labels=_LABELS[one], pool=_IMAGES[one], seed=0)
    assert nowhere.robust["40.0"].all()


def test_zero_gradients_are_seen(model: AttackModel) -> None:
    class Rounded(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert model.twin is not None
            logits: torch.Tensor = model.twin((images * 4).round() / 4)
            return logits

    images, labels = torch.from_numpy(_IMAGES[:5]), torch.from_numpy(_LABELS[:5])
    assert model.twin is not None
    assert not zero_gradients(model.twin, images, labels).any()
    assert zero_gradients(Rounded(), images, labels).all()
