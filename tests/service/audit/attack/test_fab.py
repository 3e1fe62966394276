import json
from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from benchmarks.attack_references import GOLDEN, load
from service.audit.attack import fab
from service.audit.attack.fab import L2FABT, LinfFABT
from service.audit.attack.model import SearchModel
from service.audit.attack.search import Norm, Search
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain

NETWORK, IMAGES, LABELS = load()
REFERENCE = json.loads((GOLDEN / "attacks.json").read_text())
BALLS: list[tuple[Any, Norm]] = [(LinfFABT, "linf"), (L2FABT, "l2")]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def foolbox_model(network: nn.Module = NETWORK) -> foolbox.Model:
    return foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")


def sizes(changes: Tensor, norm: Norm) -> Tensor:
    measured: Tensor = torch.linalg.vector_norm(changes.flatten(1), {"linf": torch.inf, "l2": 2}[norm], dim=1)
    return measured


class Plane(nn.Module):
    """A linear classifier of two classes, whose boundary is known."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = torch.randn(4, generator=generator())

    def forward(self, images: Tensor) -> Tensor:
        lead = (images - 0.5).flatten(1) @ self.normal + 0.3
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LinfFABT", "L2FABT"])
def test_as_many_images_hold_as_against_autoattack(name: str) -> None:
    known = REFERENCE["attacks"][name]
    attack = getattr(fab, name)(generator=generator())
    _, _, success = attack(foolbox_model(), IMAGES, LABELS, epsilons=known["epsilon"])
    # Without a random start there is nothing but float32's rounding to tell two runs apart.
    assert abs(int((~success).sum()) - known["robust"][0]) <= 2
    differing = sum(held == str(int(fooled)) for held, fooled in zip(known["seed_0"], success, strict=True))
    assert differing <= 3


@pytest.mark.parametrize("name", ["LinfFABT", "L2FABT"])
def test_nearly_as_many_hold_against_a_short_attack(name: str) -> None:
    known = REFERENCE["attacks"][name]
    attack = getattr(fab, name)(generator=generator(), steps=20, targets=3)
    _, _, success = attack(foolbox_model(), IMAGES[:100], LABELS[:100], epsilons=known["epsilon"])
    long = known["seed_0"][:100].count("1")
    assert long - 2 <= int((~success).sum()) <= long + 8


def test_the_distance_to_a_plane_is_found() -> None:
    plane = Plane()
    images = torch.rand(20, 1, 2, 2, generator=generator()) * 0.2 + 0.4  # far from the box's faces
    labels = plane(images).argmax(1)
    lead = plane(images).diff(dim=1).squeeze(1).abs()
    for kind, norm, dual in ((LinfFABT, "linf", plane.normal.abs().sum()), (L2FABT, "l2", plane.normal.norm())):
        found = kind(generator=generator(), steps=30).run(foolbox_model(plane), images, labels)
        assert (plane(found).argmax(1) != labels).all()
        assert sizes(found - images, norm).tolist() == pytest.approx((lead / dual).tolist(), rel=0.02)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "norm"), BALLS)
def test_results_are_adversarial_in_range_and_nearer_than_a_single_step_finds(kind: Any, norm: Norm) -> None:
    model = foolbox_model()
    right = NETWORK(IMAGES[:30]).argmax(1) == LABELS[:30]
    images, labels = IMAGES[:30][right], LABELS[:30][right]
    found = kind(generator=generator(), steps=20, targets=3).run(model, images, labels)
    assert (NETWORK(found).argmax(1) != labels).all()
    assert found.min() >= 0
    assert found.max() <= 1
    known = {"linf": foolbox.attacks.LinfDeepFoolAttack(), "l2": foolbox.attacks.L2DeepFoolAttack()}[norm]
    deepfool = known.run(model, images, labels)
    assert sizes(found - images, norm).median() < sizes(deepfool - images, norm).median()


@pytest.mark.parametrize(("kind", "norm"), BALLS)
def test_the_target_decides_and_images_that_are_near_enough_are_left_alone(kind: Any, norm: Norm) -> None:
    epsilon = {"linf": 0.2, "l2": 0.75}[norm]

    def answer(images: Any) -> Any:
        with torch.no_grad():
            return NETWORK(torch.from_numpy(images)).numpy()

    target = FakeTarget(answer, image_shape=(1, 8, 8), classes=10, domain=Domain("uint8"))
    search = Search(target, Domain("uint8").sent(IMAGES[:40]), LABELS[:40], norm=norm)
    search.begin()
    rows = search.open(epsilon)
    model = SearchModel(search, rows, source=NETWORK)
    kind(generator=generator(), steps=20, targets=2).run(model, search.images[rows], LABELS[rows], early_stop=epsilon)
    fooled = search.fooled(epsilon)
    assert 0 < fooled.sum() < 40
    levels = search.adversarial * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    # The clean image twice, and then one question for each of 20 steps towards 2 classes.
    assert search.queries[rows][~fooled[rows]].tolist() == [42] * int((~fooled[rows]).sum())
    assert search.queries[rows][fooled[rows]].max() < 42


def test_what_is_wrong_already_is_returned_as_it_is() -> None:
    wrong = (NETWORK(IMAGES[:4]).argmax(1) + 1) % 10
    found = LinfFABT(generator=generator(), steps=3).run(foolbox_model(), IMAGES[:4], wrong)
    assert torch.equal(found, IMAGES[:4])


def test_a_constant_classifier_leaves_images_clean() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * images.flatten(1).sum(1, keepdim=True) + torch.tensor([1.0, 0, 0])

    found = L2FABT(generator=generator(), steps=3).run(foolbox_model(Constant()), IMAGES[:4], torch.zeros(4).long())
    assert torch.equal(found, IMAGES[:4])


def test_restarts_find_no_less() -> None:
    median = {
        restarts: sizes(
            LinfFABT(generator=generator(), steps=10, targets=1, restarts=restarts).run(
                foolbox_model(), IMAGES[:20], LABELS[:20]
            )
            - IMAGES[:20],
            "linf",
        )
        for restarts in (1, 2)
    }
    assert (median[2] <= median[1] + 1e-6).all()
    assert (median[2] < median[1] - 1e-4).any()


def test_numbers_out_of_range_are_named() -> None:
    for name, value in {"steps": 0, "restarts": 0, "targets": 0, "alpha_max": 1.5, "eta": 0.9, "beta": 1.0}.items():
        with pytest.raises(ValueError, match=rf"{name}: expected .*, got {value}"):
            LinfFABT(generator=generator(), **{name: value})  # type: ignore[arg-type]
