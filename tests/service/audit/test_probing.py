from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

from service.audit import attack_tables as tables
from service.audit import probing
from tests.service.audit import broken
from tests.service.audit.attack import digits_network
from tests.service.audit.broken import IMAGES, LABELS, Changed, source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from service.audit.plan import Attack
    from service.audit.shard import Probe

_FEW = 40


def _probed(
    module: nn.Module,
    *,
    sources: Sequence[Any] | None = None,
    attacks: Sequence[Attack] = (),
    n: int = _FEW,
    seed: int = 0,
    **options: Any,
) -> tuple[Probe, ...]:
    return probing.probe(
        target=broken.target(module, **options),
        sources=[source(module)] if sources is None else sources,
        attacks=attacks,
        images=IMAGES[:n],
        labels=LABELS[:n],
        seed=seed,
    )


@cache
def _sound() -> tuple[Probe, ...]:
    return _probed(digits_network.network(), seed=5)


@cache
def _rounded() -> tuple[Probe, ...]:
    return _probed(broken.ROUNDED, n=100)


def _of(probes: Sequence[Probe], code: str, **details: float) -> list[Probe]:
    return [
        probe
        for probe in probes
        if probe.code == code and all(probe.details.get(name) == value for name, value in details.items())
    ]


def _count(probes: Sequence[Probe], code: str, **details: float) -> int:
    (found,) = _of(probes, code, **details)
    return found.count


def test_it_measures_everything_whatever_the_plan_has() -> None:
    probes = _sound()

    assert {probe.code for probe in probes} == {
        "randomised_outputs",
        "batch_dependent_outputs",
        "constant_outputs",
        "softmax_outputs",
        "saturated_outputs",
        "zero_gradients",
        "source_disagrees",
        "single_step_wins",
        "gradient_free_wins",
        "noise_wins",
        "not_monotone",
        "large_epsilon",
        "steps_change",
        "restarts_change",
    }
    assert all(probe.n == _FEW for probe in probes)


def test_attacks_of_every_name_that_take_steps_are_run_with_more_of_them() -> None:
    families: dict[Any, dict[str, Any]] = {
        tables.GradientAttack: {"restarts": 2},
        tables.IterativeAttack: {},
        tables.MomentumAttack: {},
        tables.SparseDescentAttack: {},
        tables.AutoGradientAttack: {},
    }
    plan = [
        family(name=name, epsilons=("0.1",), steps=1, **options)
        for family, options in families.items()
        for name in get_args(family.model_fields["name"].annotation)
    ]
    probes = _probed(digits_network.network(), attacks=plan, n=8)

    assert [probe.attack for probe in _of(probes, "steps_change")] == [attack.id for attack in plan]
    assert {"LinfAdamPGD", "L2AdamPGD", "L1AdamPGD"} <= {probe.attack for probe in _of(probes, "restarts_change")}


def test_without_gradients_it_says_that_they_are_missing_and_measures_with_square() -> None:
    probes = _probed(digits_network.network(), sources=[])

    assert _count(probes, "large_epsilon") <= _FEW / 10
    (large,) = _of(probes, "noise_wins", epsilon=64 / 255)
    assert large.count == 0
    assert large.details["trusted"] > large.details["found"] > 0
    assert {probe.attack for probe in probes if "epsilon" in probe.details} == {"a short Square"}
    assert _count(probes, "no_gradients") == _FEW
    assert {probe.code for probe in probes} == {
        "no_gradients",
        "randomised_outputs",
        "batch_dependent_outputs",
        "constant_outputs",
        "softmax_outputs",
        "saturated_outputs",
        "noise_wins",
        "large_epsilon",
        "steps_change",
    }


def test_without_gradients_the_plan_s_own_square_is_given_twice_its_queries() -> None:
    square = tables.SquareAttack(name="LinfSquare", id="own", epsilons=("16/255", "4/255", "32/255"), steps=5)

    probes = _probed(digits_network.network(), sources=[], attacks=[square])

    (longer,) = _of(probes, "steps_change")
    assert (longer.attack, longer.details["epsilon"]) == ("own", 16 / 255)
    assert longer.count > 0


def test_two_runs_with_one_seed_measure_the_same_and_leave_other_random_numbers_alone() -> None:
    first = _sound()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()

    assert _probed(digits_network.network(), seed=5) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rounding_in_front_leaves_no_gradient_and_square_finds_what_pgd_does_not() -> None:
    probes = _rounded()

    assert _count(probes, "zero_gradients") == 100
    assert _count(probes, "gradient_free_wins", epsilon=64 / 255) > 50
    assert _count(probes, "large_epsilon") > 50


def test_a_single_step_beats_an_attack_whose_steps_have_no_gradient() -> None:
    # Clean images are whole grey levels: rounded one by one, the first step still has its gradient.
    def before(images: torch.Tensor) -> torch.Tensor:
        levels = images * 255
        whole = (levels - levels.round()).abs().flatten(1).amax(dim=1) < 1e-3
        return torch.where(whole[:, None, None, None], images, images.detach())

    probes = _probed(Changed(before=before))

    assert _count(probes, "zero_gradients") == 0
    assert _count(probes, "single_step_wins", epsilon=64 / 255) > _FEW / 2


def test_noise_finds_what_an_attack_that_cannot_move_does_not() -> None:
    probes = _rounded()

    (found,) = _of(probes, "noise_wins", epsilon=64 / 255)
    assert found.count > 10
    assert found.details["found"] - found.details["trusted"] == found.count - found.details["trusted_only"]


def test_of_two_sources_each_is_compared_with_the_other() -> None:
    network = digits_network.network()
    sources = [source(broken.ROUNDED), source(network, "onnx")]

    probes = _probed(network, sources=sources)

    masked, sound = (
        next(probe for probe in _of(probes, "transfer_wins", epsilon=64 / 255) if probe.attack == name)
        for name in ("checkpoint", "onnx")
    )
    assert masked.count > _FEW / 2
    assert sound.count == 0
    # The union of both is what other attacks are compared with.
    assert _count(probes, "large_epsilon") == 0


def test_a_source_of_another_model_is_noticed() -> None:
    other = source(Changed(after=lambda logits: logits.roll(1, dims=1)))

    probes = _probed(digits_network.network(), sources=[other])

    assert _count(probes, "source_disagrees") == _FEW


def test_a_source_that_answers_the_same_whatever_it_is_given_has_no_gradient() -> None:
    assert _count(_probed(broken.CONSTANT), "zero_gradients") == _FEW


def test_the_plans_own_attack_is_run_longer() -> None:
    short = tables.GradientAttack(
        name="L2PGD", id="short", epsilons=("1.0", "2.0", "3.0"), steps=1, rel_stepsize=0.1, random_start=False
    )
    enough = tables.GradientAttack(name="LinfPGD", id="enough", epsilons=("0.2",), steps=20)
    transfer = tables.GradientAttack(name="LinfPGD", epsilons=("0.1",), access="transfer", surrogate="other")

    probes = _probed(digits_network.network(), attacks=[short, enough, transfer], n=100)

    changed = {probe.attack: probe for probe in _of(probes, "steps_change")}
    assert set(changed) == {"short", "enough"}
    assert changed["short"].details["epsilon"] == 2.0
    assert changed["short"].count > 0
    assert changed["enough"].count <= 1
    # Without a random start, another one would be the same again.
    assert [probe.attack for probe in _of(probes, "restarts_change")] == ["enough"]


def test_a_plans_epsilon_is_the_one_that_attacks_are_compared_at() -> None:
    plan = [tables.SingleStepAttack(name="FGSM", epsilons=("4/255", "16/255"))]

    probes = _probed(digits_network.network(), attacks=plan)

    sizes = [probe.details["epsilon"] for probe in _of(probes, "gradient_free_wins")]
    assert sizes == pytest.approx([16 / 255, 64 / 255])
    steps = [(probe.details["smaller"], probe.details["epsilon"]) for probe in _of(probes, "not_monotone")]
    assert steps == [pytest.approx((8 / 255, 16 / 255)), pytest.approx((16 / 255, 64 / 255))]


def test_epsilons_for_8_bit_images_are_whole_grey_levels() -> None:
    plan = [tables.SingleStepAttack(name="FGSM", epsilons=("3/255",))]

    probes = _probed(digits_network.network(), attacks=plan, kind="uint8")

    assert _of(probes, "not_monotone")[0].details["smaller"] == pytest.approx(1 / 255)


def test_noise_in_the_answers_is_measured_and_rounding_is_not() -> None:
    noisy = _probed(Changed(after=broken.noise(0.5)), sources=[])
    exact = _probed(Changed(after=broken.noise(1e-5)), sources=[])

    assert _count(noisy, "randomised_outputs") == _FEW
    assert _count(exact, "randomised_outputs") == 0
    assert _of(exact, "randomised_outputs")[0].details["largest"] > 0


def test_every_served_batch_size_is_compared_with_an_image_alone() -> None:
    def only_in_eights(logits: torch.Tensor) -> torch.Tensor:
        return logits.roll(1, dims=1) if len(logits) == 8 else logits

    probes = _probed(Changed(after=only_in_eights), sources=[], n=30, batch_sizes=(1, 2, 8, 64))

    counts = {probe.details["batch"]: probe.count for probe in _of(probes, "batch_dependent_outputs")}
    assert counts == {2: 0, 8: 30, 64: 0}


def test_probabilities_and_saturated_logarithms_are_told_from_logits() -> None:
    assert _count(_probed(broken.SOFTMAX, sources=[]), "softmax_outputs") == _FEW
    saturated = _probed(broken.SATURATED, sources=[])
    assert _count(saturated, "softmax_outputs") == 0
    assert _count(saturated, "saturated_outputs") > _FEW / 2
    plain = _probed(Changed(after=lambda logits: logits.log_softmax(dim=1)), sources=[])
    (unsaturated,) = _of(plain, "saturated_outputs")
    assert unsaturated.details["logarithms"] == _FEW
    assert unsaturated.count < _FEW / 10


def test_equal_answers_are_counted() -> None:
    assert _count(_probed(broken.CONSTANT, sources=[]), "constant_outputs") == _FEW
    assert _count(_probed(digits_network.network(), sources=[]), "constant_outputs") == 1


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        _probed(digits_network.network(), n=0)
