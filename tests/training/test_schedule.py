from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import schedule
from training.recipe import Training


def training(**settings: Any) -> Training:
    return Training.model_validate({"epochs": 10} | settings)


def rates(**settings: Any) -> list[float]:
    return [schedule.rate(index / 100, training(**settings)) for index in range(101)]


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing() -> None:
    cycle = rates(schedule="one-cycle")
    assert cycle[0] == pytest.approx(0.04)
    assert cycle[30] == pytest.approx(1)
    assert cycle[100] == pytest.approx(0)
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)


def test_one_cycle_is_pytorch_s() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=4000, cycle_momentum=False)
    for index in range(3999):
        ours = schedule.rate(index / 4000, training(schedule="one-cycle"))
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=2e-3)  # theirs peaks a step earlier
        optimizer.step()
        theirs.step()


def test_cosine_starts_at_its_peak_and_a_warm_up_rises_to_it() -> None:
    assert rates(schedule="cosine")[0] == 1
    assert rates(schedule="cosine")[50] == pytest.approx(0.5)
    warmed = rates(schedule="cosine", warm_up=0.1)
    assert warmed[0] == pytest.approx(0.04)
    assert warmed[5] == pytest.approx(0.52)
    assert warmed[10] == pytest.approx(1)
    assert warmed[100] == pytest.approx(0)


def test_steps_are_at_their_milestones() -> None:
    stepped = rates(schedule="step", milestones=(5, 8), decay=0.2)
    assert [stepped[index] for index in (0, 49, 50, 79, 80, 99)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


@given(epochs=st.integers(2, 300), steps=st.integers(1, 2000), data=st.data())
def test_a_milestone_is_met_at_the_first_iteration_of_its_epoch(epochs: int, steps: int, data: st.DataObject) -> None:
    milestone = data.draw(st.integers(1, epochs - 1))
    settings = training(epochs=epochs, schedule="step", milestones=(milestone,))
    total, first = epochs * steps, milestone * steps
    assert schedule.rate(first / total, settings) == pytest.approx(0.1)
    assert schedule.rate((first - 1) / total, settings) == 1


def test_constant_is_constant_after_its_warm_up() -> None:
    assert set(rates(schedule="constant")) == {1.0}
    assert set(rates(schedule="constant", warm_up=0.2)[20:]) == {1.0}
