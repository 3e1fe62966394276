from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from training import augmix, models
from training.objective import Objective
from training.processes import Processes
from training.recipe import Recipe, decode


def recipe(**sections: dict[str, Any]) -> Recipe:
    document: dict[str, Any] = {
        "data": {"name": "digits"},
        "model": {"depth": 8, "width": 4},
        "training": {"epochs": 1},
        "tenet": {"stage": "layer2", "groups": 3, "lambda_tenet": 1.0},
    }
    return decode(
        {name: document.get(name, {}) | sections.get(name, {}) for name in {*document, *sections}}, source="x"
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objective(settings: Recipe) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.build(settings.model, classes=3)
    example = torch.rand(2, 3, 12, 12, generator=seeded())
    return Objective(
        model, recipe=settings, processes=Processes(torch.device("cpu")), centres=seeded(), example=example
    ).train()


def batch(*, views: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(6 * views, 3, 12, 12, generator=seeded(1)), torch.arange(6) % 3


def right(labels: Tensor) -> Tensor:
    """Logits that classify all images correctly."""
    return functional.one_hot(labels, 3).float()


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def test_the_ordinary_loss_is_cross_entropy_of_smoothed_labels() -> None:
    ours = objective(recipe(training={"label_smoothing": 0.2}))
    images, labels = batch()
    loss, tenet, logits = ours(images, labels)
    assert tenet is None
    assert not logits.requires_grad
    assert torch.isclose(loss, functional.cross_entropy(logits, labels, label_smoothing=0.2))


def test_three_views_add_the_jensen_shannon_term() -> None:
    ours = objective(recipe(augmentation={"augmix": {"jsd": 7.0}}))
    images, labels = batch(views=3)
    loss, _, logits = ours(images, labels)
    assert logits.shape == (6, 3)
    views = ours.model(images).chunk(3)  # batch statistics are the batch's own, so a second pass is the same
    expected = functional.cross_entropy(views[0], labels) + 7 * augmix.jensen_shannon(views)
    assert torch.isclose(loss, expected)


def test_a_fused_step_is_the_sum_of_both_losses_from_one_pass() -> None:
    settings = recipe(tenet={"fused": True})
    fused, apart = objective(settings), objective(settings)
    images, labels = batch()
    calls: list[int] = []
    fused.model.get_submodule("network.layer1").register_forward_hook(lambda *_: calls.append(1))
    fused.choose = lambda *_: apart.choose(right(labels), labels)  # type: ignore[method-assign]
    loss, tenet, _ = fused(images, labels, step="fused")
    loss.backward()
    assert len(calls) == 1
    apart.centres.manual_seed(0)
    ordinary, _, _ = apart(images, labels)
    chosen = apart.choose(right(labels), labels)
    second, _, _ = apart(images, labels, step="tenet", chosen=chosen)
    assert torch.allclose(loss, ordinary + second, atol=1e-5)
    assert torch.isclose(tenet, second.detach(), atol=1e-5)
    (ordinary + second).backward()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(fused), gradients(apart), strict=True))


def test_a_fused_step_without_correct_images_is_ordinary() -> None:
    ours = objective(recipe(tenet={"fused": True}))
    images, labels = batch()
    ours.choose = lambda *_: None  # type: ignore[method-assign]
    loss, tenet, logits = ours(images, labels, step="fused")
    assert tenet is None
    assert torch.isclose(loss, functional.cross_entropy(logits, labels))


def test_a_choice_is_of_the_correct_images_and_none_of_fewer_than_two() -> None:
    ours = objective(recipe())
    _, labels = batch()
    logits = right(labels)
    logits[2] = logits[2].roll(1)
    chosen = ours.choose(logits, labels)
    assert chosen is not None
    assert chosen.indices.tolist() == [0, 1, 3, 4, 5]
    assert chosen.initial.shape == (5, 3)
    assert chosen.weight == 1
    assert ours.choose(-right(labels), labels) is None


@pytest.mark.slow
def test_a_compiled_objective_has_the_same_losses() -> None:
    images, labels = batch()
    eager, compiled = (objective(recipe(training={"compile": on}))(images, labels)[0] for on in (False, True))
    assert torch.allclose(eager, compiled, atol=1e-4)
