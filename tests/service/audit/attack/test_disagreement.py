from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from foolbox import PyTorchModel

from service.audit.attack.disagreement import Differs, Disagreement
from service.audit.attack.model import SearchModel
from service.audit.attack.search import Search
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain
from tests.service.audit.attack import digits_network

IMAGES, LABELS = (tensor[:80] for tensor in digits_network.images_and_labels())
# Weights are rounded to multiples of this: coarse, as in an int8 engine whose scales were chosen badly.
_COARSE = 1 / 8


def _quantised() -> torch.nn.Module:
    module = copy.deepcopy(digits_network.network())
    for parameter in module.parameters():
        parameter.copy_((parameter / _COARSE).round() * _COARSE)
    return module


def _search(norm: Any, *, domain: Domain | None = None) -> tuple[Search, Differs]:
    target = digits_network.target(_quantised(), domain=domain)
    differs = Differs(target, digits_network.target(digits_network.network()), n=len(IMAGES))
    search = Search(target, IMAGES, LABELS, norm=norm, goal=differs)
    search.begin()
    return search, differs


def _attack(norm: Any, epsilon: float, *, gradients: bool, domain: Domain | None = None, **options: Any) -> Search:
    search, differs = _search(norm, domain=domain)
    rows = search.open(epsilon)
    attack = Disagreement(
        differs, norm=norm, reference_source=digits_network.network() if gradients else None, **options
    )
    model = SearchModel(search, rows, source=_quantised() if gradients else None)
    attack.run(model, search.images[rows], search.labels[rows], epsilon=epsilon)
    return search


def _noise(norm: Any, epsilon: float, *, queries: int) -> Search:
    """Ask about uniform noise of the size of epsilon: the least that an attack should beat."""
    search, _ = _search(norm)
    generator = torch.Generator().manual_seed(0)
    for _ in range(queries):
        rows = search.open(epsilon)
        noise = torch.rand(len(rows), 1, 8, 8, generator=generator) * 2 - 1
        scale = epsilon if norm == "linf" else epsilon / noise.flatten(1).norm(dim=1)[:, None, None, None]
        search.ask(rows, (search.images[rows] + scale * noise).clamp(0, 1))
    return search


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
def test_gradients_find_more_than_squares_and_squares_more_than_noise(norm: str, epsilon: float) -> None:
    noise = _noise(norm, epsilon, queries=100)
    squares = _attack(norm, epsilon, gradients=False, queries=100)
    gradients = _attack(norm, epsilon, gradients=True, steps=100)
    counts = [int(search.fooled(epsilon).sum()) for search in (noise, squares, gradients)]
    assert counts[0] < counts[1] <= counts[2]
    assert counts[2] > 2 * counts[0]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("domain", [Domain("float32"), Domain("uint8")])
def test_what_it_finds_is_seen_differently_by_the_two(domain: Domain, gradients: bool) -> None:  # noqa: FBT001
    epsilon = 20 / 255
    search = _attack(
        "linf", epsilon, gradients=gradients, domain=domain, **({"steps": 30} if gradients else {"queries": 60})
    )
    found = search.fooled(epsilon)
    candidates = search.adversarial[found]
    ours, others = _quantised()(candidates).argmax(dim=1), digits_network.network()(candidates).argmax(dim=1)
    assert found.any()
    assert torch.ne(ours, others).all()
    assert (candidates - search.images[found]).abs().max() <= epsilon + 1e-6
    assert torch.equal(domain.sent(candidates), candidates)


def test_the_same_engine_never_disagrees_with_itself() -> None:
    target = digits_network.target(digits_network.network())
    differs = Differs(target, digits_network.target(digits_network.network()), n=10)
    search = Search(target, IMAGES[:10], LABELS[:10], norm="linf", goal=differs)
    search.begin()
    source = digits_network.network()
    attack = Disagreement(differs, reference_source=source, steps=30)
    attack.run(SearchModel(search, search.open(), source=source), search.images, search.labels, epsilon=0.3)
    assert search.distances.isinf().all()
    assert (search.queries == 31).all()


def test_images_on_which_they_differ_need_no_perturbation_and_are_asked_about_once() -> None:
    search = _attack("linf", 0.05, gradients=False, queries=5)
    clean = torch.ne(_quantised()(IMAGES).argmax(dim=1), digits_network.network()(IMAGES).argmax(dim=1))
    assert clean.any()
    assert torch.equal(search.distances == 0, clean)
    assert (search.queries[clean] == 1).all()


def test_it_repeats_itself() -> None:
    first, second = (_attack("linf", 0.08, gradients=True, steps=20) for _ in range(2))
    assert torch.equal(first.distances, second.distances)


def test_engines_of_different_tasks_are_refused() -> None:
    other = FakeTarget(
        lambda images: np.zeros((len(images), 3), np.float32),
        image_shape=(1, 8, 8),
        classes=3,
        domain=Domain("float32"),
    )
    with pytest.raises(ValueError, match=r"reference fake: expected 10 classes of images \(1, 8, 8\), .* got 3 of"):
        Differs(digits_network.target(digits_network.network()), other, n=4)


def test_a_model_without_a_search_is_refused() -> None:
    _, differs = _search("linf")
    model = PyTorchModel(digits_network.network(), bounds=(0, 1), device="cpu")
    with pytest.raises(ValueError, match=r"expected a SearchModel, .* got PyTorchModel"):
        Disagreement(differs).run(model, IMAGES, LABELS, epsilon=0.1)


@pytest.mark.parametrize("options", [{"steps": 0}, {"queries": 0}, {"share": 1.5}, {"norm": "l1"}])
def test_settings_outside_their_range_are_refused(options: Any) -> None:
    _, differs = _search("linf")
    with pytest.raises(ValueError, match="expected"):
        Disagreement(differs, **options)
