from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from foolbox import PyTorchModel

from service.audit.attack.hop_skip_jump import HopSkipJumpAttack
from service.audit.attack.model import SearchModel
from service.audit.attack.search import BudgetSpent, Search
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain
from tests.service.audit.attack import digits_network

IMAGES, LABELS = (tensor[:32] for tensor in digits_network.images_and_labels())


def _search(n: int = 12, *, norm: Any = "l2", budget: int | None = None, **options: Any) -> Search:
    search = Search(
        digits_network.target(digits_network.network(), **options), IMAGES[:n], LABELS[:n], norm=norm, budget=budget
    )
    search.begin()
    return search


def _attack(search: Search, *, starting_points: Any = None, early_stop: float | None = None, **options: Any) -> Any:
    rows = search.open()
    attack = HopSkipJumpAttack(norm=search.norm, **{"steps": 8, **options})  # type: ignore[arg-type]
    return attack.run(
        SearchModel(search, rows),
        search.images[rows],
        search.labels[rows],
        starting_points=starting_points,
        early_stop=early_stop,
    )


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_more_steps_come_nearer_and_it_repeats_itself(norm: str) -> None:
    medians = []
    for steps in (1, 4, 10, 10):
        search = _search(6, norm=norm)
        _attack(search, steps=steps)
        medians.append(float(search.distances.median()))
        assert search.distances.isfinite().all()
    assert medians[0] > medians[1] > medians[2] == medians[3]


def test_it_comes_close_to_the_known_boundary_of_a_linear_model() -> None:
    """Two classes parted by a plane: the nearest adversarial image is the foot of the perpendicular."""
    normal = torch.randn(64, generator=torch.Generator().manual_seed(1)).numpy()

    def answer(images: Any) -> Any:
        side = (images.reshape(len(images), -1) - 0.5) @ normal
        return np.stack([side, -side], axis=1).astype(np.float32)

    target = FakeTarget(answer, image_shape=(1, 8, 8), classes=2, domain=Domain("float32"))
    images = 0.5 + 0.1 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.from_numpy(answer(images.numpy())).argmax(dim=1)
    search = Search(target, images, labels, norm="l2")
    search.begin()
    _attack(search, steps=30)
    exact = torch.from_numpy(np.abs((images.numpy().reshape(6, -1) - 0.5) @ normal) / np.linalg.norm(normal))
    assert (search.distances >= exact - 1e-5).all()
    assert (search.distances <= 1.1 * exact + 1e-3).all()


def test_the_result_does_not_depend_on_the_batch() -> None:
    """Foolbox's own, which normalises over the batch, gives several times the perturbation at 32 images."""
    alone = []
    for row in range(5):
        search = Search(
            digits_network.target(digits_network.network()), IMAGES[row : row + 1], LABELS[row : row + 1], norm="l2"
        )
        search.begin()
        _attack(search, steps=5)
        alone.append(float(search.distances[0]))
    together = _search(32)
    _attack(together, steps=5)
    assert float(together.distances[:5].median()) < 1.25 * float(np.median(alone))


def test_a_target_that_is_not_bit_stable_is_attacked_all_the_same() -> None:
    for noise in (1e-5, 0.5):
        search = _search(6, noise=noise)
        _attack(search, steps=6)
        assert search.distances.isfinite().all()
        assert float(search.distances.median()) < 2.0


def test_a_constant_target_ends_it() -> None:
    target = FakeTarget(
        lambda images: np.eye(10, dtype=np.float32)[np.zeros(len(images), dtype=int)],
        image_shape=(1, 8, 8),
        classes=10,
        domain=Domain("float32"),
    )
    search = Search(target, IMAGES[:4], torch.zeros(4, dtype=torch.int64), norm="l2")
    search.begin()
    found = _attack(search)
    assert search.distances.isinf().all()
    assert torch.equal(found, IMAGES[:4])
    assert search.queries.max() < 200


def test_all_probes_of_a_step_are_asked_about_in_one_call() -> None:
    calls = []

    class Counted(Search):
        def ask(self, rows: Any, candidates: Any) -> Any:
            calls.append(len(rows))
            return super().ask(rows, candidates)

    search = Counted(digits_network.target(digits_network.network()), IMAGES[:4], LABELS[:4], norm="l2")
    search.begin()
    _attack(search, steps=4)
    assert {4 * count for count in (100, 141, 173, 200)} <= set(calls)
    assert len(calls) < 200
    assert int(search.queries.sum()) == sum(calls)


def test_probes_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = _search(4), _search(4)
    _attack(whole, steps=3)
    monkeypatch.setattr("service.audit.attack.hop_skip_jump._PROBE_BYTES", 4 * 64 * 4 * 30)
    _attack(parts, steps=3)
    assert torch.equal(whole.queries > 300, parts.queries > 300)
    assert float(parts.distances.median()) == pytest.approx(float(whole.distances.median()), rel=0.3)


def test_starting_points_are_used_and_noise_where_they_do_not_fool() -> None:
    search = _search(2)
    other = IMAGES[torch.ne(LABELS, LABELS[0])][:1]
    _attack(search, steps=3, starting_points=torch.cat([other, IMAGES[1:2]]))
    assert search.distances.isfinite().all()
    assert search.first_success[0] == 2


def test_on_8_bit_targets_it_finds_images_that_can_be_sent() -> None:
    free, rounded = _search(8), _search(8, domain=Domain("uint8"))
    _attack(free, steps=8)
    _attack(rounded, steps=8)
    assert torch.allclose(rounded.adversarial * 255, (rounded.adversarial * 255).round(), atol=1e-4)
    assert float(rounded.distances.median()) < 1.2 * float(free.distances.median())


def test_a_budget_ends_it_and_early_stop_saves_queries() -> None:
    spent = _search(budget=150)
    # Either it asks once more and is told, or it sees that no image has queries left.
    with contextlib.suppress(BudgetSpent):
        _attack(spent)
    assert (spent.queries[spent.distances > 0] == 150).all()
    assert spent.distances.isfinite().all()
    early, full = _search(), _search()
    _attack(early, early_stop=1.5)
    _attack(full)
    assert early.queries.sum() < full.queries.sum()
    assert (early.distances <= 1.5).sum() == (full.distances <= 1.5).sum()


def test_it_attacks_any_foolbox_model_within_its_bounds() -> None:
    class Centred(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return digits_network.network()((images + 1) / 2)

    model = PyTorchModel(Centred().eval(), bounds=(-1, 1), device="cpu")
    images, labels = IMAGES[:8] * 2 - 1, LABELS[:8]
    found, _, success = HopSkipJumpAttack(steps=10)(model, images, labels, epsilons=None)
    assert success.all()
    assert found.min() >= -1 > -1.01
    assert found.min() < -0.5
    assert float((found - images).flatten(1).norm(dim=1).median()) < 4.0


@pytest.mark.parametrize("options", [{"steps": 0}, {"gamma": 0.0}, {"initial_gradient_eval_steps": 0}, {"norm": "l1"}])
def test_settings_outside_their_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        HopSkipJumpAttack(**options)


def test_the_search_keeps_what_was_found_in_the_first_half_of_the_budget() -> None:
    search, half = _search(budget=400), _search(budget=200)
    for each in (search, half):
        with contextlib.suppress(BudgetSpent):
            _attack(each, generator=torch.Generator().manual_seed(0))

    nearer = search.halfway > search.distances
    assert nearer.any()
    assert (search.halfway >= half.distances).all()
    assert search.halfway.isfinite().any()
    assert _search().halfway.isinf().all()
