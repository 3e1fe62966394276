import json
from typing import Any

import foolbox
import pytest
import torch
from torch import Tensor, nn

from benchmarks.attack_references import GOLDEN, load
from export.intervals import wilson
from service.audit.attack import apgd
from service.audit.attack.apgd import L2APGD, L2APGDT, LinfAPGD, LinfAPGDT, checkpoints
from service.audit.attack.model import SearchModel
from service.audit.attack.search import BudgetSpent, Norm, Search
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain

NETWORK, IMAGES, LABELS = load()
REFERENCE = json.loads((GOLDEN / "attacks.json").read_text())
BALLS: list[tuple[Any, Norm, float]] = [
    (LinfAPGD, "linf", 0.2),
    (LinfAPGDT, "linf", 0.2),
    (L2APGD, "l2", 0.75),
    (L2APGDT, "l2", 0.75),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def foolbox_model(network: nn.Module = NETWORK) -> foolbox.Model:
    return foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")


class Counted(nn.Module):
    """A network that counts the images it has classified."""

    def __init__(self, network: nn.Module = NETWORK) -> None:
        super().__init__()
        self.network = network
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        answers: Tensor = self.network(images)
        return answers


def search(*, norm: Norm, n: int = 40, network: nn.Module = NETWORK, budget: int | None = None) -> Search:
    def answer(images: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(images)).numpy()

    target = FakeTarget(answer, image_shape=(1, 8, 8), classes=10, domain=Domain(), max_batch=64)
    return Search(target, IMAGES[:n], LABELS[:n], norm=norm, budget=budget)


@pytest.mark.parametrize(
    "name",
    [
        "LinfAPGD",
        "L2APGD",
        pytest.param("LinfAPGDT", marks=pytest.mark.slow),
        pytest.param("L2APGDT", marks=pytest.mark.slow),
    ],
)
def test_as_many_images_hold_as_against_autoattack(name: str) -> None:
    known = REFERENCE["attacks"][name]
    attack = getattr(apgd, name)(generator=generator())
    _, _, success = attack(foolbox_model(), IMAGES, LABELS, epsilons=known["epsilon"])
    robust = int((~success).sum())
    low, high = wilson(sorted(known["robust"])[len(known["robust"]) // 2], len(IMAGES))
    assert low <= robust / len(IMAGES) <= high
    # Two runs of one algorithm on the same images differ by much less than an interval: here by a few images.
    assert abs(robust - known["robust"][0]) <= 6
    differing = sum(held == str(int(fooled)) for held, fooled in zip(known["seed_0"], success, strict=True))
    assert differing <= 12


@pytest.mark.parametrize(("kind", "norm", "epsilon"), BALLS)
def test_perturbations_keep_to_epsilon_and_to_the_range(kind: Any, norm: Norm, epsilon: float) -> None:
    raw, _, success = kind(generator=generator(), steps=10)(foolbox_model(), IMAGES[:50], LABELS[:50], epsilons=epsilon)
    sizes = torch.linalg.vector_norm((raw - IMAGES[:50]).flatten(1), {"linf": torch.inf, "l2": 2}[norm], dim=1)
    assert sizes.max() <= epsilon + 1e-6
    assert raw.min() >= 0
    assert raw.max() <= 1
    assert 0 < success.sum() < 50
    assert torch.equal(NETWORK(raw).argmax(1) != LABELS[:50], success)


@pytest.mark.parametrize(("kind", "norm", "epsilon"), BALLS)
def test_the_target_decides_and_counts(kind: Any, norm: Norm, epsilon: float) -> None:
    searched = search(norm=norm)
    searched.begin()
    rows = searched.open(epsilon)
    model = SearchModel(searched, rows, source=NETWORK)
    kind(generator=generator(), steps=20).run(model, IMAGES[rows], LABELS[rows], epsilon=epsilon)
    fooled = searched.fooled(epsilon)
    assert 0 < fooled.sum() < len(searched)
    # Whoever is fooled is not asked about again.
    assert torch.equal(searched.queries[fooled], searched.first_success[fooled])
    assert (NETWORK(searched.adversarial[fooled]).argmax(1) != LABELS[:40][fooled]).all()
    _, _, direct = kind(generator=generator(), steps=20)(foolbox_model(), IMAGES[rows], LABELS[rows], epsilons=epsilon)
    assert torch.equal(fooled[rows], direct)


def test_success_counts_on_the_target_and_not_on_the_source() -> None:
    zeros = torch.nonzero(LABELS[:40] == LABELS[0]).flatten()
    target = FakeTarget(
        lambda images: nn.functional.one_hot(LABELS[0].expand(len(images)), 10).float().numpy(),
        image_shape=(1, 8, 8),
        classes=10,
        domain=Domain(),
    )
    stubborn = Search(target, IMAGES[zeros], LABELS[zeros], norm="linf")
    stubborn.begin()
    model = SearchModel(stubborn, torch.arange(len(zeros)), source=NETWORK)
    LinfAPGD(generator=generator(), steps=10).run(model, IMAGES[zeros], LABELS[zeros], epsilon=0.5)
    assert not stubborn.fooled(0.5).any()
    assert stubborn.queries.tolist() == [12] * len(zeros)  # the clean image, the start, and each step


def test_fooled_images_cost_nothing_more() -> None:
    counted = Counted()
    LinfAPGD(generator=generator()).run(foolbox_model(counted), IMAGES, LABELS, epsilon=1.0)
    assert counted.images < 10 * len(IMAGES)  # of 101 each


def test_further_classes_and_restarts_meet_survivors_only() -> None:
    held = {}
    for restarts in (1, 3):
        counted = Counted()
        attack = LinfAPGD(generator=generator(), steps=15, restarts=restarts)
        _, _, success = attack(foolbox_model(counted), IMAGES, LABELS, epsilons=0.2)
        held[restarts] = int((~success).sum())
    assert held[3] <= held[1]
    assert counted.images <= 16 * (len(IMAGES) + 2 * held[1]) + len(IMAGES)


def test_the_same_seed_gives_the_same_images_and_leaves_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    runs = [
        LinfAPGD(generator=generator(seed), steps=5).run(foolbox_model(), IMAGES[:8], LABELS[:8], epsilon=0.05)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_times_a_thousand_blind_cross_entropy_but_not_the_ratio() -> None:
    class Loud(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = 1000 * NETWORK(images)
            return logits

    held = {}
    for loss in ("ce", "dlr"):
        attack = LinfAPGD(generator=generator(), steps=30, loss=loss)
        held[loss] = int((~attack(foolbox_model(Loud()), IMAGES, LABELS, epsilons=0.2)[2]).sum())
    assert held["dlr"] < held["ce"] - 20


def test_a_spent_budget_ends_it_within_the_budget() -> None:
    searched = search(norm="linf", budget=7)
    searched.begin()
    rows = searched.open(0.01)
    with pytest.raises(BudgetSpent):
        LinfAPGD(generator=generator()).run(
            SearchModel(searched, rows, source=NETWORK), IMAGES[rows], LABELS[rows], epsilon=0.01
        )
    assert searched.queries.max() == 7


def test_checkpoints_of_a_hundred_steps_are_those_of_the_paper() -> None:
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(checkpoints(1)) == [1]


def test_numbers_out_of_range_are_named() -> None:
    for wrong in ({"steps": 0}, {"restarts": 0}, {"rho": 1.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: expected .*, got "):
            LinfAPGD(generator=generator(), **wrong)
    with pytest.raises(ValueError, match="targets: expected at least 1, got 0"):
        LinfAPGDT(generator=generator(), targets=0)
    with pytest.raises(ValueError, match='loss: expected "ce" or "dlr", got "mse"'):
        LinfAPGD(generator=generator(), loss="mse")  # type: ignore[arg-type]
