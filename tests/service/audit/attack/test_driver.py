from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
import torch
from foolbox.attacks.base import FixedEpsilonAttack
from torch import nn

from service.audit import attack_tables, samples
from service.audit import plan as plans
from service.audit.attack import catalogue, driver
from service.audit.plan import Attack, Data
from service.audit.target.base import FakeTarget, TargetFailed
from service.audit.target.domain import Domain

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.audit.attack.search import Search

_N = 12
_SAMPLES = samples.load(Data(dataset="digits", samples=300), class_names=tuple("0123456789"))
# Back from the 3 x 32 x 32 pixels of a training run to the 8 x 8 that the digits have: less to compute.
_ALL = nn.functional.avg_pool2d(torch.from_numpy(samples.as_input(_SAMPLES.images))[:, :1], 4)
_IMAGES, _LABELS = _ALL[:_N], torch.from_numpy(_SAMPLES.labels[:_N]).long()
_POOL = _ALL[100:160]

# One plan entry for each family; budgets and steps are small, epsilons large enough for a weak network.
_QUICK = {
    "L2CarliniWagnerAttack": "binary_search_steps = 2\nsteps = 30\nstepsize = 0.05\ninitial_const = 1.0",
    "EADAttack": "binary_search_steps = 3\nsteps = 30\ninitial_stepsize = 0.05\ninitial_const = 1.0",
    "DDNAttack": "steps = 30",
    "NewtonFoolAttack": "steps = 30",
    **dict.fromkeys(("L0FMNAttack", "L1FMNAttack", "L2FMNAttack", "LInfFMNAttack"), "steps = 30"),
    **dict.fromkeys(("LinfUniformNoise", "LinfRepeatedAdditiveUniformNoiseAttack"), "repeats = 20"),
    "VirtualAdversarialAttack": "xi = 0.01",
    "HopSkipJumpAttack": "steps = 4",
    "BoundaryAttack": "steps = 40",
    "LinfFABT": "steps = 10\ntargets = 3",
    "L2FABT": "steps = 10\ntargets = 3",
    "LinfSquare": "steps = 100",
    "L2Square": "steps = 100",
    "GaussianBlurAttack": "steps = 20",
    "LinearSearchContrastReductionAttack": "steps = 20\ntarget = 0.0",
    "BinarySearchContrastReductionAttack": "target = 0.0",
    "L2ContrastReductionAttack": "target = 0.0",
    "LinearSearchBlendedUniformNoiseAttack": "directions = 10\nsteps = 20",
    "SaltAndPepperNoiseAttack": "steps = 50",
    "SpatialAttack": "max_translation = 3\nmax_rotation = 60",
}
_LARGE = {"linf": "0.5", "l2": "4.0", "l1": "20.0", "l0": "40"}
# Attacks that do not try to keep near.
_EVERYTHING = {"SpatialAttack": "1", "InversionAttack": "8"}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A linear classifier of digits: class means, which any attack can fool."""
    labels = torch.from_numpy(_SAMPLES.labels).long()
    means = torch.stack([_ALL[labels == digit].mean(dim=0).flatten() for digit in range(10)])
    linear = nn.Linear(means.shape[1], 10)
    with torch.no_grad():
        linear.weight.copy_(means)
        linear.bias.copy_(-(means**2).sum(dim=1) / 2)
    return nn.Sequential(nn.Flatten(), linear).requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class _Source:
    name: str
    module: nn.Module
    agreement: float = 1.0
    device = torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.module(images)
        return answer


def _target(answer: Callable[[torch.Tensor], torch.Tensor], *, kind: Any = "float32") -> FakeTarget:
    shape = tuple(int(side) for side in _IMAGES.shape[1:])
    return FakeTarget(
        lambda images: answer(torch.from_numpy(images)).detach().numpy(),
        image_shape=shape,  # type: ignore[arg-type]
        classes=10,
        domain=Domain(kind),
    )


def _entry(name: str, *, epsilons: str, extra: str = "") -> Attack:
    head = '[target]\nmodel = "m"\n[data]\ndataset = "digits"\n[differential]\nreference = "r"\n'
    which = 'suite = "standard"' if name == "AutoAttack" else f'name = "{name}"'
    (attack,) = plans.parse(f"{head}[[attacks]]\n{which}\nepsilons = {epsilons}\n{extra}\n").attacks
    return attack


def _run(entry: Attack, target: FakeTarget, *sources: _Source, seed: int = 3, **options: Any) -> tuple[Search, Any]:
    search, _ = driver.search_of(entry, target, _IMAGES, _LABELS)
    found = driver.run(entry, search, sources=sources, generator_seed=seed, pool=_POOL, **options)  # type: ignore[arg-type]
    return search, found


def _names() -> list[str]:
    union = get_args(attack_tables._Tables)
    names = [name for table in union for name in get_args(table.model_fields["name"].annotation)]
    return [name for name in names if name not in {"Disagreement", "AutoAttack"} and "BrendelBethge" not in name]


@pytest.mark.parametrize("name", _names())
def test_every_attack_of_the_catalogue_fools_a_weak_network_and_repeats_itself(name: str, network: nn.Module) -> None:
    epsilon = _EVERYTHING.get(name) or _LARGE[_entry(name, epsilons='["0.5"]').norm]
    entry = _entry(name, epsilons=f'["{epsilon}"]', extra=_QUICK.get(name, ""))
    target = _target(network)
    first, found = _run(entry, target, _Source("checkpoint", network))
    clean = first.fooled(0.0)
    assert clean.sum() < _N / 2
    assert first.fooled(plans.epsilon_value(epsilon)).sum() > clean.sum()
    assert int(first.queries.sum()) + (len(_POOL) if "Boundary" in name or "Hop" in name else 0) == target.queries
    assert list(found) == ["checkpoint" if entry.access == "white-box" else name]
    again, _ = _run(entry, _target(network), _Source("checkpoint", network))
    assert torch.equal(first.distances, again.distances)


def test_the_standard_suite_goes_on_with_survivors_only(network: nn.Module) -> None:
    entry = _entry("AutoAttack", epsilons='["0.2"]')
    search, found = _run(entry, _target(network), _Source("onnx", network))
    assert list(found) == ["LinfAPGD onnx", "LinfAPGDT onnx", "LinfFABT onnx", "LinfSquare"]
    assert search.fooled(0.2).all()
    assert not found["LinfSquare"].isfinite().any(), "nothing was left for it"
    assert int(search.queries.max()) < 300


def test_sources_are_united_by_image(network: nn.Module) -> None:
    """One source is blind to half the image, the other to the other half: together they find what each finds."""
    left, right = torch.ones_like(_IMAGES[:1]), torch.ones_like(_IMAGES[:1])
    left[..., : _IMAGES.shape[3] // 2], right[..., _IMAGES.shape[3] // 2 :] = 0, 0

    class Blind(nn.Module):
        def __init__(self, mask: torch.Tensor) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = network(images * self.mask)
            return answer

    entry = _entry("FGSM", epsilons='["0.15"]')
    one, other = _Source("checkpoint", Blind(left)), _Source("onnx", Blind(right))
    both, found = _run(entry, _target(network), one, other)
    alone = [_run(entry, _target(network), source)[0].fooled(0.15) for source in (one, other)]
    assert torch.equal(both.fooled(0.15), alone[0] | alone[1])
    assert set(found) == {"checkpoint", "onnx"}


@pytest.mark.parametrize(("name", "epsilon"), [("L2PGD", "0.6"), ("LinfPGD", "0.1"), ("L2DeepFoolAttack", "1.0")])
def test_what_counts_can_be_sent_and_keeps_to_epsilon(name: str, epsilon: str, network: nn.Module) -> None:
    rounded, _ = _run(_entry(name, epsilons=f'["{epsilon}"]'), _target(network, kind="uint8"), _Source("onnx", network))
    exact, _ = _run(_entry(name, epsilons=f'["{epsilon}"]'), _target(network), _Source("onnx", network))
    limit = plans.epsilon_value(epsilon)
    assert ((rounded.adversarial * 255) - (rounded.adversarial * 255).round()).abs().max() < 1e-3
    assert rounded.fooled(limit).sum() >= exact.fooled(limit).sum() - 1, "rounding undoes no more than one of these"
    assert exact.fooled(limit).sum() > exact.fooled(0).sum()
    assert rounded.unrounded.isfinite().any()


def test_what_is_wrong_from_the_start_is_so_for_every_part(network: nn.Module) -> None:
    entry = _entry("LinfPGD", epsilons='["0.1"]')
    wrong = torch.tensor([0, 5])
    labels = _LABELS.clone()
    labels[wrong] = (labels[wrong] + 1) % 10
    search, _ = driver.search_of(entry, _target(network), _IMAGES, labels)
    sources: Any = [_Source("checkpoint", network), _Source("onnx", network)]
    found = driver.run(entry, search, sources=sources, generator_seed=0, pool=_POOL)
    assert (search.distances[wrong] == 0).all()
    for distances in found.values():
        assert (distances[wrong] == 0).all()
        assert torch.equal(distances == 0, search.distances == 0)


@pytest.mark.parametrize(
    ("name", "extra", "known"),
    [
        ("LinfPGD", "", True),
        ("L2DeepFoolAttack", "", True),
        ("LinfPGD", "budget = 3", False),
        ("LinfPGD", 'access = "transfer"\nsurrogate = "other@2"', False),
        ("LinfSquare", "steps = 20", False),
        ("LinfUniformNoise", "repeats = 3", False),
        ("Disagreement", "queries = 20", False),
    ],
)
def test_what_nothing_could_decide_is_not_said_to_be_robust_without_rounding(
    name: str, extra: str, *, known: bool, network: nn.Module
) -> None:
    entry, target = _entry(name, epsilons='["0.02"]', extra=extra), _target(network, kind="uint8")
    source: Any = _Source("onnx", network)
    reference = _target(lambda images: network((images * 3).round() / 3), kind="uint8")
    search, kept = driver.search_of(entry, target, _IMAGES, _LABELS, reference=reference, reference_source=source)
    driver.run(
        entry,
        search,
        sources=[source],
        generator_seed=0,
        pool=_POOL,
        surrogates={"other@2": source},
        reference=kept,
    )
    assert (driver.unrounded(entry, search) is not None) == known
    exact, _ = driver.search_of(entry, _target(network), _IMAGES, _LABELS, reference=reference)
    assert driver.unrounded(entry, exact) is None, "nothing is rounded"


@pytest.mark.parametrize("name", _names())
def test_the_plan_knows_which_attacks_keep_to_an_epsilon(name: str) -> None:
    entry = _entry(name, epsilons='["0.5"]')
    (part,) = catalogue.parts(entry)
    assert isinstance(part.make(torch.Generator()), FixedEpsilonAttack) == entry.within


def test_an_epsilon_below_a_grey_level_costs_no_query(network: nn.Module) -> None:
    search, _ = _run(_entry("LinfPGD", epsilons="[0.003]"), _target(network, kind="uint8"), _Source("onnx", network))
    assert int(search.queries.max()) == 1


@pytest.mark.parametrize("name", ["LinfPGD", "L2DeepFoolAttack", "LinfSquare", "BoundaryAttack", "HopSkipJumpAttack"])
@pytest.mark.parametrize("budget", [1, 2, 9])
def test_a_budget_is_kept_by_image(name: str, budget: int, network: nn.Module) -> None:
    entry = _entry(name, epsilons='["0.02"]', extra=f"budget = {budget}")
    search, _ = _run(entry, _target(network), _Source("onnx", network))
    assert int(search.queries.max()) <= budget
    assert int(search.queries.min()) >= 1


def test_a_target_that_dies_leaves_what_was_found(network: nn.Module) -> None:
    def answer(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(images)
        return logits * torch.nan if search.distances.isfinite().any() else logits

    entry = _entry("LinfPGD", epsilons='["0.2", "0.5"]')
    search, _ = driver.search_of(entry, _target(answer), _IMAGES, _LABELS)
    with pytest.raises(TargetFailed, match="finite logits"):
        driver.run(
            entry,
            search,
            sources=[_Source("onnx", network)],  # type: ignore[list-item]
            generator_seed=0,
            pool=_POOL,
        )
    assert 0 < search.distances.isfinite().sum() < _N
    assert not search.fooled(0).any()


def test_a_transfer_attack_asks_the_target_about_results_only(network: nn.Module) -> None:
    entry = _entry("LinfPGD", epsilons='["0.3"]', extra='access = "transfer"\nsurrogate = "other@2"')
    surrogates = {"other@2": _Source("checkpoint", network)}
    search, found = _run(entry, _target(network), surrogates=surrogates)
    assert int(search.queries.max()) == 2
    assert search.fooled(0.3).all()
    assert list(found) == ["checkpoint"]
    with pytest.raises(ValueError, match=r"attacks\.LinfPGD: expected the surrogate 'other@2'"):
        _run(entry, _target(network))


def test_a_white_box_attack_without_gradients_is_refused_before_anything_is_asked(network: nn.Module) -> None:
    target = _target(network)
    with pytest.raises(ValueError, match=r"attacks\.LinfPGD: a white-box attack needs gradients"):
        _run(_entry("LinfPGD", epsilons='["0.3"]'), target)
    assert target.queries == 0


def test_results_only_costs_one_query_an_epsilon(network: nn.Module) -> None:
    entry = _entry("LinfPGD", epsilons='["0.001", "0.3"]', extra='decisions = "results"\nsteps = 5')
    search, _ = _run(entry, _target(network), _Source("onnx", network))
    assert int(search.queries.max()) <= 3
    assert search.fooled(0.3).all()


def test_random_numbers_of_the_caller_are_left_alone(network: nn.Module) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    _run(_entry("LinfPGD", epsilons='["0.1"]'), _target(network), _Source("onnx", network))
    assert torch.equal(torch.rand(3), expected)


def test_disagreement_is_between_the_engines(network: nn.Module) -> None:
    entry = _entry("Disagreement", epsilons='["0.1"]', extra='access = "score"\nqueries = 200')
    same, differing = _target(network), _target(lambda images: network((images * 3).round() / 3))
    for reference, expected in ((same, False), (differing, True)):
        search, kept = driver.search_of(entry, _target(network), _IMAGES, _LABELS, reference=reference)
        driver.run(entry, search, generator_seed=0, pool=_POOL, reference=kept)
        assert bool(search.fooled(0.1).any()) == expected


def test_what_cannot_be_run_is_refused_beforehand() -> None:
    shape = (1, 8, 8)
    with pytest.raises(ValueError, match="expected at most 8 in l2, the distance between black and white"):
        catalogue.check(_entry("L2PGD", epsilons="[9]"), classes=10, image_shape=shape)
    with pytest.raises(ValueError, match="needs at least 4 classes, got 3"):
        catalogue.check(_entry("AutoAttack", epsilons="[0.1]"), classes=3, image_shape=shape)
    catalogue.check(_entry("LinfAPGD", epsilons="[0.1]"), classes=2, image_shape=shape)


@pytest.mark.skipif(find_spec("numba") is not None, reason="numba is installed")
def test_an_attack_whose_package_is_missing_says_so() -> None:
    with pytest.raises(ValueError, match=r"attacks\.L2BrendelBethgeAttack: .* needs the package numba"):
        catalogue.check(_entry("L2BrendelBethgeAttack", epsilons="[1]"), classes=10, image_shape=(1, 8, 8))


def test_uniform_noise_keeps_to_epsilon_on_both_sides() -> None:
    seen: list[np.ndarray[Any, Any]] = []

    def answer(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.numpy().copy())
        return torch.nn.functional.one_hot(_LABELS, 10).float()[: len(images)]

    _run(_entry("LinfUniformNoise", epsilons="[0.25]", extra="repeats = 10"), _target(answer))
    assert len(seen) == 11
    assert max(np.abs(images - _IMAGES.numpy()).max() for images in seen) <= 0.25 + 1e-6
