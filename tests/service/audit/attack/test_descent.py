from __future__ import annotations

from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
import pytest
import torch
from foolbox.attacks.gradient_descent_base import BaseGradientDescent
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn

from service.audit.attack import descent
from service.audit.attack.model import SearchModel
from service.audit.attack.search import Search
from service.audit.target.base import FakeTarget
from service.audit.target.domain import Domain

if TYPE_CHECKING:
    from export.engines.base import Images, Logits
    from service.audit.attack.search import Norm

N = 24
SHAPE = (2, 6, 6)
EPSILON = {"Linf": 0.06, "L2": 0.4, "L1": 3.0}
NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
NAMES = [
    name
    for name, kind in vars(foolbox.attacks).items()
    if isinstance(kind, type) and issubclass(kind, BaseGradientDescent) and kind.__name__ == name
]


def _epsilon(name: str) -> float:
    """Return one within which an attack fools the network with some images and not with all."""
    return 1.0 if name.startswith("Sparse") else next(value for norm, value in EPSILON.items() if norm in name)


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)]
    return nn.Sequential(*layers).eval().requires_grad_(requires_grad=False)


NETWORK = _network()
IMAGES = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = NETWORK(IMAGES).argmax(1)


class _Counted(nn.Module):
    """The network, and how many images it was given at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return NETWORK(images)  # type: ignore[no-any-return]


def _model(network: nn.Module = NETWORK) -> foolbox.Model:
    return foolbox.PyTorchModel(network.eval(), bounds=(0, 1), device="cpu")


def _run(attack: Any, *, epsilon: float, model: foolbox.Model | None = None, criterion: Any = None) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return attack.run(model or _model(), IMAGES, criterion or Misclassification(LABELS), epsilon=epsilon)  # type: ignore[no-any-return]


def _fooled(images: Tensor) -> Tensor:
    return torch.ne(NETWORK(images).argmax(1), LABELS)


def _answer(images: Images) -> Logits:
    return NETWORK(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]


def _search(norm: Norm = "linf", **options: Any) -> Search:
    target = FakeTarget(_answer, image_shape=SHAPE, classes=4, domain=Domain(), max_batch=7)
    search = Search(target, IMAGES, LABELS, norm=norm, **options)
    search.begin()
    return search


def _searched(search: Search, **options: Any) -> SearchModel:
    return SearchModel(search, torch.arange(N), source=NETWORK, **options)


def test_there_is_one_for_each_gradient_descent_of_foolbox() -> None:
    assert len(NAMES) == 19
    for name in NAMES:
        assert issubclass(getattr(descent, name), getattr(foolbox.attacks, name))
    for alias in ("FGSM", "FGM", "MIFGSM", "LinfPGD", "L2PGD", "L1PGD", "LinfAdamPGD", "L2AdamPGD", "L1AdamPGD"):
        assert getattr(descent, alias).__name__ == getattr(foolbox.attacks, alias).__name__


@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_foolboxes_where_no_image_leaves_the_batch(name: str) -> None:
    expected, found = (
        _run(getattr(kind, name)(), epsilon=_epsilon(name) / 1000) for kind in (foolbox.attacks, descent)
    )
    assert not _fooled(expected).any()
    assert not torch.equal(expected, IMAGES)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_fools_the_model_in_foolbox_fools_it_here_while_others_have_left_the_batch(name: str) -> None:
    epsilon = _epsilon(name)
    expected, found = (_run(getattr(kind, name)(), epsilon=epsilon) for kind in (foolbox.attacks, descent))
    fooled = _fooled(expected)
    assert 0 < fooled.sum() < N
    assert (_fooled(found) >= fooled).all()
    staying = ~_fooled(found)
    torch.testing.assert_close(found[staying], expected[staying])


def test_images_that_are_fooled_are_not_worked_on_any_more() -> None:
    network = _Counted()
    _run(descent.LinfPGD(steps=20), epsilon=0.05, model=_model(network))
    assert network.sizes == sorted(network.sizes, reverse=True)
    assert network.sizes[0] == N
    assert network.sizes[-1] < N / 2


def test_nothing_is_worked_on_once_all_are_fooled() -> None:
    network = _Counted()
    assert _fooled(_run(descent.LinfPGD(steps=40), epsilon=0.9, model=_model(network))).all()
    assert len(network.sizes) < 30


def test_restarts_are_for_the_images_that_are_left_and_find_more() -> None:
    epsilon, once, network = 0.03, descent.LinfPGD(steps=3), _Counted()
    first = _fooled(_run(once, epsilon=epsilon))
    again = _fooled(_run(once.repeat(8), epsilon=epsilon, model=_model(network)))
    assert again.sum() > first.sum()
    assert (again >= first).all()
    assert max(network.sizes[4:]) <= N - first.sum()
    assert once.restarts == 1


def test_repeating_twice_multiplies() -> None:
    assert descent.L2PGD().repeat(2).repeat(3).restarts == 6


def test_foolboxes_own_call_takes_it_as_any_attack() -> None:
    _, clipped, success = descent.L2PGD(steps=10)(_model(), IMAGES, LABELS, epsilons=[0.05, 0.8])
    assert 0 <= success[0].sum() < success[1].sum()
    assert (foolbox.distances.l2(IMAGES, clipped[1]) <= 0.8 + 1e-6).all()


def test_a_targeted_attack_is_foolboxes() -> None:
    criterion, epsilon = TargetedMisclassification((LABELS + 1) % 4), 0.1
    expected = _run(foolbox.attacks.LinfPGD(steps=5), epsilon=epsilon, criterion=criterion)
    assert torch.equal(_run(descent.LinfPGD(steps=5), epsilon=epsilon, criterion=criterion), expected)
    with pytest.raises(ValueError, match="unsupported criterion"):
        _run(descent.FGSM(), epsilon=epsilon, criterion=criterion)


def test_another_tensor_library_s_batch_comes_back_as_it_was_given() -> None:
    found = descent.FGSM().run(_model(), ep.astensor(IMAGES), ep.astensor(LABELS), epsilon=0.05)
    assert isinstance(found, ep.PyTorchTensor)


@pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD"])
def test_the_target_decides_at_every_iterate(name: str) -> None:
    norm, epsilon = name[:-3], EPSILON[name[:-3]]
    search = _search(NORMS[norm])
    found = _run(getattr(descent, name)(steps=20), epsilon=epsilon, model=_searched(search))
    fooled = search.fooled(epsilon)
    assert 0 < fooled.sum() < N
    assert _fooled(found)[fooled].all()
    # The clean image, and each iterate that a step was taken from; none after the first success.
    assert (search.queries[~fooled] == 1 + 20).all()
    assert torch.equal(search.queries[fooled], search.first_success[fooled])


def test_without_a_decision_at_every_iterate_the_target_is_asked_nothing() -> None:
    search = _search()
    found = _run(descent.LinfPGD(steps=20), epsilon=0.05, model=_searched(search, every=False))
    assert (search.queries == 1).all()
    search.propose(torch.arange(N), found)
    assert torch.equal(search.fooled(0.05), _fooled(found))


def test_a_target_that_is_fooled_otherwise_than_its_gradients_source_is_believed() -> None:
    """The target swaps two classes; the source of the gradients does not."""
    target = FakeTarget(
        lambda images: _answer(images)[:, [1, 0, 2, 3]], image_shape=SHAPE, classes=4, domain=Domain(), max_batch=64
    )
    search = Search(target, IMAGES, LABELS, norm="linf")
    search.begin()
    wrong = search.fooled(0)
    assert 0 < wrong.sum() < N
    _run(descent.LinfPGD(steps=5), epsilon=0.02, model=_searched(search))
    assert (search.queries[wrong] == 2).all()
    assert (search.queries[~wrong & ~search.fooled(0.02)] == 6).all()
