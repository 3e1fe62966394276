from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from training.adversarial import FreePerturbation, pgd
from training.recipe import FreeAdversarial, PgdAdversarial
from training.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

ULP = 1e-6  # an image plus epsilon is rounded


def seeded(seed: int = 0, *, process: int = 0, processes: int = 1) -> Stream:
    return Stream(torch.Generator().manual_seed(seed), process=process, processes=processes)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def network() -> nn.Module:
    """A classifier with batch statistics and dropout, one part of which is frozen in evaluation mode."""
    model = built(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(6 * 16, 4)
        )
    ).train()
    model[1].eval()  # type: ignore[index]
    return model


def batch(count: int = 8, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    images[0, 0, 0], images[0, 1, 0] = 0, 1
    return images, torch.arange(count) % 4


def attack(**settings: float | bool) -> PgdAdversarial:
    return PgdAdversarial.model_validate({"method": "pgd", **settings})


@given(epsilon=st.floats(1e-3, 1), step_size=st.floats(1e-3, 1), steps=st.integers(1, 4), random_start=st.booleans())
def test_pgd_stays_in_the_ball_and_in_range(epsilon: float, step_size: float, steps: int, random_start: bool) -> None:  # noqa: FBT001
    images, labels = batch()
    settings = attack(epsilon=epsilon, step_size=step_size, steps=steps, random_start=random_start)
    attacked = pgd(images, labels, model=network(), settings=settings, stream=seeded())
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert (attacked - images).abs().max() <= epsilon + ULP
    assert not attacked.requires_grad


def test_pgd_raises_the_loss_and_more_steps_raise_it_more() -> None:
    images, labels = batch(64)
    model = network().eval().requires_grad_(requires_grad=False)

    def loss(settings: PgdAdversarial) -> float:
        attacked = pgd(images, labels, model=model, settings=settings, stream=seeded())
        return float(functional.cross_entropy(model(attacked), labels))

    natural = float(functional.cross_entropy(model(images), labels))
    short = loss(attack(epsilon=0.1, step_size=0.01, steps=1, random_start=False))
    long = loss(attack(epsilon=0.1, step_size=0.01, steps=10, random_start=False))
    assert natural < short < long


def test_pgd_lowers_the_accuracy_of_a_trained_model() -> None:
    images, _ = batch(96)
    labels = (images.mean((1, 2, 3)) > images.mean()).long()
    model = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def accuracy(seen: Tensor) -> float:
        return float((model(seen).argmax(1) == labels).float().mean())

    attacked = pgd(images, labels, model=model, settings=attack(epsilon=0.1, step_size=0.02), stream=seeded())
    assert accuracy(images) > 0.9
    assert accuracy(attacked) < 0.2


def test_pgd_of_a_linear_model_is_the_closed_form() -> None:
    """Two classes: the gradient's sign is that of the other class's weights less the label's, wherever one is."""
    images, _ = batch(dtype=torch.float64)
    labels = torch.arange(8) % 2
    model = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 2).double()))
    weights = model[1].weight.detach()  # type: ignore[index]
    directions = (weights[1 - labels] - weights[labels]).sign().reshape(images.shape)
    settings = attack(epsilon=0.06, step_size=0.02, steps=7)
    attacked = pgd(images, labels, model=model, settings=settings, stream=seeded())
    assert torch.allclose(attacked, (images + 0.06 * directions).clamp(0, 1), rtol=0, atol=1e-12)


def test_pgd_equals_a_reference_written_step_by_step() -> None:
    images, labels = batch(dtype=torch.float64)
    model = network().double().eval()
    settings = attack(epsilon=0.05, step_size=0.02, steps=4)
    noise = (2 * seeded().uniform(8, 3, 6, 6) - 1).double()
    expected = (images + 0.05 * noise).clamp(0, 1)
    for _ in range(4):
        leaf = expected.clone().requires_grad_()
        gradient = torch.autograd.grad(functional.cross_entropy(model(leaf), labels), leaf)[0]
        stepped = torch.max(torch.min(expected + 0.02 * gradient.sign(), images + 0.05), images - 0.05)
        expected = stepped.clamp(0, 1)
    attacked = pgd(images, labels, model=model, settings=settings, stream=seeded())
    assert torch.allclose(attacked, expected, rtol=0, atol=1e-12)


def test_epsilon_is_of_pixels_also_where_the_model_normalises() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model((images - 0.4) / 0.02)
            return logits

    images, labels = batch()
    attacked = pgd(images, labels, model=Normalised(), settings=attack(epsilon=0.03), stream=seeded())
    assert 0.029 < (attacked - images).abs().max() <= 0.03 + ULP


def test_pgd_leaves_the_model_as_it_was() -> None:
    images, labels = batch()
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    grad = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = grad.clone()
    original = images.clone()
    pgd(images, labels, model=model, settings=attack(), stream=seeded())
    assert torch.equal(images, original)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first, *others = model.parameters()
    assert first.grad is not None
    assert torch.equal(first.grad, grad)
    assert all(other.grad is None for other in others)


def test_modes_are_restored_when_the_model_fails() -> None:
    model = network()
    images, labels = batch()
    with pytest.raises(RuntimeError):
        pgd(images[:, :, :5], labels, model=model, settings=attack(), stream=seeded())
    assert model.training


def test_pgd_works_where_gradients_are_switched_off() -> None:
    images, labels = batch()
    with torch.no_grad():
        quiet = pgd(images, labels, model=network(), settings=attack(), stream=seeded())
    assert torch.equal(quiet, pgd(images, labels, model=network(), settings=attack(), stream=seeded()))


def test_pgd_in_half_precision_gives_single_precision_images() -> None:
    images, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attacked = pgd(images, labels, model=network(), settings=attack(epsilon=0.03), stream=seeded())
    assert attacked.dtype == torch.float32
    assert 0 < (attacked - images).abs().max() <= 0.03 + ULP


def test_the_stream_decides_where_pgd_starts() -> None:
    images, labels = batch()
    first, second, other = (
        pgd(images, labels, model=network(), settings=attack(steps=1), stream=seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    stream = seeded()
    pgd(images, labels, model=network(), settings=attack(random_start=False), stream=stream)
    assert torch.equal(stream.generator.get_state(), seeded().generator.get_state())


def test_two_processes_attack_their_halves_like_one_the_whole() -> None:
    images, labels = batch(dtype=torch.float64)
    model = network().double()
    whole = pgd(images, labels, model=model, settings=attack(), stream=seeded())
    halves = [
        pgd(images[part], labels[part], model=model, settings=attack(), stream=seeded(process=p, processes=2))
        for p, part in enumerate((slice(0, 4), slice(4, 8)))
    ]
    assert torch.allclose(torch.cat(halves), whole, rtol=0, atol=1e-12)


def free(epsilon: float = 0.1) -> FreePerturbation:
    return FreePerturbation(FreeAdversarial(method="free", epsilon=epsilon))


def gradients(seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, 2, 2, generator=generator)
    values[0, 0, 0, 0] = 0  # which has no sign
    return values


def greys(count: int = 4) -> Tensor:
    return torch.full((count, 3, 2, 2), 0.5)


def test_the_first_images_are_the_natural_ones() -> None:
    perturbed = free().perturbed(greys())
    assert torch.equal(perturbed, greys())
    assert perturbed.is_leaf
    assert perturbed.requires_grad


def test_updates_of_the_free_perturbation_by_hand() -> None:
    perturbation = free(epsilon=0.1)
    expected = torch.zeros(4, 3, 2, 2)
    for seed in range(6):  # replays and batches alike: the perturbation persists
        perturbed = perturbation.perturbed(greys())
        assert torch.allclose(perturbed, greys() + expected)
        perturbation.update(gradients(seed))
        expected = (expected + 0.1 * gradients(seed).sign()).clamp(-0.1, 0.1)
        assert perturbation.state is not None
        assert torch.allclose(perturbation.state, expected)


def test_free_updates_are_those_of_the_published_code() -> None:
    """It differentiates with respect to the perturbation, through the clipping to [0, 1].

    The clamp of its time has a gradient of 1 at its bounds, where PyTorch 2.15's has 0: black and white pixels would
    never be perturbed.
    """
    images, labels = batch()
    model = network().eval()
    perturbation = free(epsilon=0.3)
    noise = torch.zeros_like(images)
    for _ in range(5):
        published = noise.clone().requires_grad_()
        moved = images + published
        clipped = torch.where(moved < 0, 0.0, torch.where(moved > 1, 1.0, moved))
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(clipped), labels), published)
        noise = (noise + 0.3 * gradient.sign()).clamp(-0.3, 0.3)
        perturbed = perturbation.perturbed(images)
        perturbation.update(torch.autograd.grad(functional.cross_entropy(model(perturbed), labels), perturbed)[0])
        assert perturbation.state is not None
        assert torch.equal(perturbation.state, noise)
    assert bool(((images + noise < 0) | (images + noise > 1)).any())  # some were clipped
    assert bool(noise[0, :, :2].any())  # black and white pixels too


@given(epsilon=st.floats(1e-3, 1), updates=st.integers(1, 5))
def test_free_images_stay_in_the_ball_and_in_range(epsilon: float, updates: int) -> None:
    images, _ = batch(4)
    perturbation = free(epsilon)
    for seed in range(updates):
        perturbation.perturbed(images)
        perturbation.update(torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
    perturbed = perturbation.perturbed(images)
    assert 0 <= perturbed.min() <= perturbed.max() <= 1
    assert (perturbed - images).abs().max() <= epsilon + ULP


def test_the_state_goes_on_in_another_perturbation() -> None:
    first, second = free(), free()
    assert first.state is None
    first.perturbed(greys())
    first.update(gradients())
    second.state = first.state
    assert torch.equal(second.perturbed(greys()), first.perturbed(greys()))


def test_a_state_that_was_read_stays_what_it_was() -> None:
    perturbation = free()
    perturbation.perturbed(greys())
    read = perturbation.state
    perturbation.update(gradients())
    assert read is not None
    assert not read.any()


def test_a_smaller_batch_takes_the_leading_part() -> None:
    perturbation = free()
    perturbation.perturbed(greys())
    perturbation.update(gradients())
    kept = perturbation.state
    assert kept is not None
    assert torch.equal(perturbation.perturbed(greys(3)), greys(3) + kept[:3])
    perturbation.update(-gradients()[:3])
    assert perturbation.state is not None
    assert torch.allclose(perturbation.state[:3], torch.zeros(3, 3, 2, 2))
    assert torch.equal(perturbation.state[3], kept[3])


def test_a_larger_batch_or_other_images_start_again() -> None:
    for images in (greys(5), torch.full((4, 3, 3, 3), 0.5)):
        perturbation = free()
        perturbation.perturbed(greys())
        perturbation.update(gradients())
        assert torch.equal(perturbation.perturbed(images), images)


def test_an_update_without_its_gradient_is_refused() -> None:
    perturbation = free()
    with pytest.raises(ValueError, match="call perturbed"):
        perturbation.update(gradients())
    perturbation.perturbed(greys())
    with pytest.raises(ValueError, match=r"expected .* of shape \(4, 3, 2, 2\), got shape None"):
        perturbation.update(None)
    with pytest.raises(ValueError, match=r"got shape \(3, 3, 2, 2\)"):
        perturbation.update(gradients()[:3])
