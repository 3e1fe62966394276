from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.audit import attack_tables as tables
from service.audit import checks, outcomes, probing, robustness
from service.audit.plan import Plan
from service.audit.shard import Probe, Shard, ShardResult
from tests.service.audit import broken
from tests.service.audit.attack import digits_network
from tests.service.audit.broken import IMAGES, LABELS, Changed, source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from service.audit.plan import Attack
    from service.audit.report import Doubt

_EPSILON = "8/255"
_SIZE = 8 / 255
_PGD = tables.GradientAttack(name="LinfPGD", id="pgd", epsilons=(_EPSILON,))
_FGSM = tables.SingleStepAttack(name="FGSM", id="fgsm", epsilons=(_EPSILON,))
_SQUARE = tables.SquareAttack(name="LinfSquare", id="square", epsilons=("4/255", _EPSILON))
_TRANSFER = tables.GradientAttack(
    name="LinfPGD", id="transfer", epsilons=(_EPSILON,), access="transfer", surrogate="another"
)


def _plan(*attacks: Attack) -> Plan:
    return Plan.model_validate({"target": {"model": "digits"}, "data": {"dataset": "digits"}, "attacks": attacks})


def _checks(*probes: Probe) -> ShardResult:
    return ShardResult(shard=Shard(kind="checks", stop=100), queries=0, seconds=0.0, probes=probes)


def _attacked(attack: Attack, distances: Sequence[float | None], *, start: int = 0, **found: Any) -> ShardResult:
    n = len(distances)
    return ShardResult(
        shard=Shard(kind="attack", subject=attack.id, start=start, stop=start + n),
        queries=n,
        seconds=0.0,
        distances=tuple(distances),
        adversarial_predictions=(0,) * n,
        adversarial_confidences=(0.5,) * n,
        **{"asked": (10,) * n, "first_success": (5,) * n, **found},
    )


def _raised(attacks: Sequence[Attack], results: Sequence[ShardResult]) -> list[Doubt]:
    """Return what is raised, with reports made as an audit makes them."""
    stop = max((each.shard.stop for each in results), default=0)
    clean = ShardResult(shard=Shard(kind="clean", stop=stop), queries=0, seconds=0.0, predictions=(0,) * stop)
    found = outcomes.gather([clean, *results], labels=np.zeros(stop, dtype=np.int64))
    reports = [robustness.attack(each, found, class_names=("0",)) for each in attacks if each.id in found.attacked]
    return checks.check(_plan(*attacks), [clean, *results], reports)


def _codes(doubts: Sequence[Doubt]) -> set[str]:
    return {doubt.code for doubt in doubts}


def _first(count: int, *, of: int = 100, size: float = _SIZE) -> list[float | None]:
    """Return distances of which the first so many are found."""
    return [size if row < count else None for row in range(of)]


@cache
def _probed(module: nn.Module, *, kind: str = "float32", seed: int = 0, own: nn.Module | None = None) -> set[str]:
    """Return the codes raised for a model whose gradients are its own."""
    probes = probing.probe(
        target=broken.target(module, kind=kind),
        sources=[source(own or module)],
        attacks=[_PGD],
        images=IMAGES,
        labels=LABELS,
        seed=seed,
    )
    return _codes(checks.check(_plan(_PGD), [_checks(*probes)], []))


@pytest.mark.parametrize(("kind", "seed"), [("float32", 0), ("uint8", 1)])
def test_a_sound_network_raises_nothing(kind: str, seed: int) -> None:
    assert _probed(digits_network.network(seed), kind=kind, seed=seed) == set()


def test_without_gradients_a_sound_network_raises_nothing() -> None:
    probes = probing.probe(
        target=broken.target(digits_network.network()), sources=[], attacks=[], images=IMAGES, labels=LABELS, seed=0
    )

    assert checks.check(_plan(_PGD), [_checks(*probes)], []) == []


def test_without_gradients_square_is_named_where_it_leaves_more_than_chance() -> None:
    large = Probe(code="large_epsilon", attack="a short Square", count=30, n=100, details={"classes": 10})

    (doubt,) = _raised([], [_checks(large)])

    assert doubt.explanation.startswith("a short Square within 64/255 leaves 30 of 100 images robust")


def test_what_was_not_checked_is_told() -> None:
    sound, missing = (Probe(code=code, count=0, n=100) for code in ("constant_outputs", "no_gradients"))

    assert checks.not_checked([_checks(sound)]) == ()
    assert checks.not_checked([_checks(sound, missing)]) == (
        "zero_gradients",
        "source_disagrees",
        "single_step_wins",
        "gradient_free_wins",
        "transfer_wins",
        "not_monotone",
        "restarts_change",
    )
    everything = {each.__name__ for each in (*checks.CHECKS, *checks.CONTESTS)}
    assert {*checks.not_checked([])} == everything - {"parts_differ", "budget_spent"}


@pytest.mark.parametrize(
    ("module", "codes"),
    [
        pytest.param(broken.ROUNDED, {"zero_gradients", "gradient_free_wins", "large_epsilon"}, id="rounding"),
        pytest.param(broken.SCALED, {"zero_gradients", "gradient_free_wins", "large_epsilon"}, id="logits x 1000"),
        pytest.param(broken.SOFTMAX, {"softmax_outputs"}, id="softmax"),
        pytest.param(broken.SATURATED, {"saturated_outputs", "zero_gradients"}, id="saturated log-probabilities"),
        pytest.param(broken.CONSTANT, {"constant_outputs", "zero_gradients"}, id="constant"),
        pytest.param(broken.OF_THE_BATCH, {"batch_dependent_outputs"}, id="batch"),
    ],
)
def test_a_model_broken_on_purpose_is_caught(module: nn.Module, codes: set[str]) -> None:
    assert _probed(module) >= codes


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_random_noise_in_the_outputs_is_caught_and_not_blamed_on_the_batch(scale: float) -> None:
    noisy = Changed(after=broken.noise(scale))

    raised = _probed(noisy, own=digits_network.network())

    assert "randomised_outputs" in raised
    assert "batch_dependent_outputs" not in raised


def test_a_single_step_that_wins_says_by_how_much_and_what_to_do() -> None:
    doubts = _raised([_PGD, _FGSM], [_attacked(_PGD, _first(20)), _attacked(_FGSM, _first(40))])

    (doubt,) = doubts
    assert doubt.code == "single_step_wins"
    assert "fgsm fools 20 of 100 images at 8/255 that pgd does not" in doubt.explanation
    assert "attack by scores or decisions" in doubt.explanation


@pytest.mark.parametrize(("won", "raised"), [(0, False), (3, False), (8, True), (40, True)])
def test_a_win_counts_only_beyond_chance(won: int, raised: bool) -> None:  # noqa: FBT001 - pytest passes by name
    doubts = _raised([_PGD, _SQUARE], [_attacked(_PGD, _first(20)), _attacked(_SQUARE, _first(20 + won))])

    assert _codes(doubts) == ({"gradient_free_wins"} if raised else set())


def test_images_that_each_attack_finds_alone_cancel() -> None:
    other: list[float | None] = [None] * 80 + [_SIZE] * 20

    assert _raised([_PGD, _SQUARE], [_attacked(_PGD, _first(20)), _attacked(_SQUARE, other)]) == []


def test_a_transfer_attack_that_wins_is_named() -> None:
    (doubt,) = _raised([_PGD, _TRANSFER], [_attacked(_PGD, _first(20)), _attacked(_TRANSFER, _first(60))])

    assert doubt.code == "transfer_wins"


def test_attacks_are_compared_in_one_norm_and_epsilon_only() -> None:
    in_l2 = tables.SquareAttack(name="L2Square", id="l2", epsilons=(_EPSILON,))
    larger = tables.SquareAttack(name="LinfSquare", id="larger", epsilons=("16/255",))
    results = [_attacked(_PGD, _first(20)), _attacked(in_l2, _first(80)), _attacked(larger, _first(80))]

    assert _raised([_PGD, in_l2, larger], results) == []


def test_of_an_audit_that_ended_early_images_are_paired_by_their_place() -> None:
    results = [_attacked(_PGD, _first(10, of=50), start=50), _attacked(_SQUARE, _first(100))]

    (doubt,) = _raised([_PGD, _SQUARE], results)

    assert "40 of 50 images" in doubt.explanation


def test_many_attacks_raise_nothing_by_chance() -> None:
    """Of 200 audits in which attacks are equally good, at most 1 % may be called otherwise; 6 are beyond chance."""
    numbers = np.random.default_rng(0)
    attacks: list[Attack] = [_PGD, *(_SQUARE.model_copy(update={"id": f"square-{n}"}) for n in range(8))]
    wrong = 0
    for _ in range(200):
        found = [[_SIZE if hit else None for hit in numbers.random(100) < 0.5] for _ in range(9)]
        results = [_attacked(each, own) for each, own in zip(attacks, found, strict=True)]
        wrong += bool(_raised(attacks, results))
    assert wrong <= 5


def _contest(code: str, *, won: int, lost: int = 0, n: int = 100, **details: float) -> Probe:
    numbers = {"epsilon": 0.25, "found": 50.0 + won, "trusted": 50.0 + lost, "trusted_only": float(lost)}
    return Probe(code=code, attack="pgd", count=won, n=n, details={**numbers, **details})


@pytest.mark.parametrize("code", ["noise_wins", "steps_change", "restarts_change", "single_step_wins"])
def test_probed_contests_are_decided_by_what_only_one_found(code: str) -> None:
    assert _codes(_raised([], [_checks(_contest(code, won=20))])) == {code}
    assert _raised([], [_checks(_contest(code, won=20, lost=15))]) == []
    assert _raised([], [_checks(_contest(code, won=0, lost=50))]) == []


def test_more_steps_may_change_a_number_a_little() -> None:
    few = _contest("steps_change", won=15, n=1000)
    many = _contest("steps_change", won=40, n=1000)

    assert _raised([], [_checks(few)]) == []
    assert _codes(_raised([], [_checks(many)])) == {"steps_change"}


def test_an_attack_that_finds_less_within_more_is_named_with_both_epsilons() -> None:
    (doubt,) = _raised([], [_checks(_contest("not_monotone", won=20, smaller=0.125))])

    assert doubt.code == "not_monotone"
    assert "0.125" in doubt.explanation
    assert "0.25" in doubt.explanation


@pytest.mark.parametrize(
    ("probe", "raised"),
    [
        (Probe(code="zero_gradients", attack="onnx", count=9, n=100), False),
        (Probe(code="zero_gradients", attack="onnx", count=10, n=100), True),
        (Probe(code="source_disagrees", attack="onnx", count=2, n=100), False),
        (Probe(code="source_disagrees", attack="onnx", count=8, n=100), True),
        (Probe(code="large_epsilon", count=12, n=100, details={"classes": 10}), False),
        (Probe(code="large_epsilon", count=30, n=100, details={"classes": 10}), True),
        (Probe(code="large_epsilon", count=50, n=100, details={"classes": 2}), False),
        (Probe(code="constant_outputs", count=1, n=1), False),
        (Probe(code="constant_outputs", count=99, n=100), False),
        (Probe(code="constant_outputs", count=100, n=100), True),
        (Probe(code="softmax_outputs", count=20, n=100), False),
        (Probe(code="softmax_outputs", count=100, n=100), True),
        (Probe(code="saturated_outputs", count=5, n=100), False),
        (Probe(code="randomised_outputs", count=1, n=100), True),
        (Probe(code="batch_dependent_outputs", count=1, n=100), True),
        (Probe(code="no_gradients", count=100, n=100), False),
    ],
)
def test_a_check_is_raised_from_its_limit_on(probe: Probe, raised: bool) -> None:  # noqa: FBT001 - as above
    assert _codes(_raised([], [_checks(probe)])) == ({probe.code} if raised else set())


def test_a_source_that_adds_much_to_the_union_is_named() -> None:
    found = _first(60)
    parts = {"checkpoint": tuple(_first(20)), "onnx": tuple([None] * 20 + [_SIZE] * 40 + [None] * 40)}

    (doubt,) = _raised([_PGD], [_attacked(_PGD, found, by_part=parts)])

    assert doubt.code == "parts_differ"
    assert "pgd: onnx fools 40 of 100 images at 8/255" in doubt.explanation


def test_of_a_suite_white_box_attacks_may_add_and_square_may_not() -> None:
    suite = tables.SuiteAttack(name="AutoAttack", id="suite", epsilons=(_EPSILON,))
    alone = {"LinfAPGD checkpoint": tuple(_first(20))}
    white_box = {**alone, "LinfAPGDT checkpoint": tuple([None] * 20 + [_SIZE] * 40 + [None] * 40)}
    square = {**alone, "LinfSquare": tuple([None] * 20 + [_SIZE] * 10 + [None] * 70)}

    assert _raised([suite], [_attacked(suite, _first(60), by_part=white_box)]) == []
    assert _codes(_raised([suite], [_attacked(suite, _first(30), by_part=square)])) == {"parts_differ"}


def test_a_budget_that_ends_before_anything_is_found_is_no_robustness() -> None:
    attack = _SQUARE.model_copy(update={"budget": 10})

    (doubt,) = _raised([attack], [_attacked(attack, [0.0] * 10 + [None] * 90, asked=(1,) * 10 + (10,) * 90)])

    assert doubt.code == "budget_spent"
    assert "spent on 90 of 100 images" in doubt.explanation


def test_a_budget_after_whose_end_nothing_more_was_to_be_found_is_believed() -> None:
    attack = _SQUARE.model_copy(update={"budget": 100})

    def shard(*, early: bool) -> ShardResult:
        halfway = tuple(_first(30 if early else 0, size=4 / 255))
        return _attacked(attack, _first(30, size=4 / 255), asked=(100,) * 100, halfway=halfway)

    assert _raised([attack], [shard(early=True)]) == []
    assert _codes(_raised([attack], [shard(early=False)])) == {"budget_spent"}
    without = _SQUARE.model_copy(update={"budget": None})
    assert _raised([without], [_attacked(without, [None] * 100, asked=(5000,) * 100)]) == []


def test_an_attack_that_starts_from_adversarial_images_is_judged_by_what_is_within_its_epsilon() -> None:
    attack = tables.HopSkipJumpAttack(name="HopSkipJumpAttack", id="hsj", epsilons=("1.0",), budget=20)
    far, spent = [3.0] * 99, (20,) * 100

    (doubt,) = _raised([attack], [_attacked(attack, [0.0, *far], asked=spent)])
    assert doubt.code == "budget_spent"
    assert "spent on 99 of 100 images before anything was found on any at 1.0" in doubt.explanation
    (doubt,) = _raised([attack], [_attacked(attack, [0.5, *far], asked=spent)])
    assert "before more than 1 were fooled at 1.0" in doubt.explanation

    nearer = [0.5] * 60 + [3.0] * 40
    (doubt,) = _raised([attack], [_attacked(attack, nearer, asked=spent, halfway=(3.0,) * 100)])
    assert "its second half still fooled 60 of the 100 left at 1.0" in doubt.explanation
    assert _raised([attack], [_attacked(attack, nearer, asked=spent, halfway=tuple(nearer))]) == []
    assert _raised([attack], [_attacked(attack, [0.0, *far], asked=(12,) * 100)]) == []


def test_nothing_measured_raises_nothing() -> None:
    assert checks.check(_plan(_PGD), [], []) == []


@pytest.mark.parametrize("each", [*checks.CHECKS, *checks.CONTESTS], ids=lambda each: each.__name__)
def test_every_check_says_when_it_is_raised_and_what_it_means(each: Any) -> None:
    assert re.search(r"\n    Raised if: .+\n(.+\n)*    Explanation: .+", each.__doc__)
