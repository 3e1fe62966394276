from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.stream import Stream

DRAWS: dict[str, Callable[[Stream, int], Tensor]] = {
    "uniform": lambda stream, count: stream.uniform(count, 3, 2),
    "integers": lambda stream, count: stream.integers(1000, count, 4),
    "normal": lambda stream, count: stream.normal(count, 5),
    "dirichlet": lambda stream, count: stream.dirichlet(1.0, count, 3),
    "beta": lambda stream, count: stream.beta(1.0, count),
}


def seeded(seed: int = 0, *, process: int = 0, processes: int = 1) -> Stream:
    return Stream(torch.Generator().manual_seed(seed), process=process, processes=processes)


@pytest.mark.parametrize("name", DRAWS)
@given(processes=st.integers(2, 3), count=st.integers(1, 7), seed=st.integers(0, 100))
def test_parts_of_processes_make_up_what_one_draws(name: str, processes: int, count: int, seed: int) -> None:
    whole = seeded(seed)
    expected = [DRAWS[name](whole, count * processes) for _ in range(2)]
    parts = [seeded(seed, process=process, processes=processes) for process in range(processes)]
    for drawn in expected:
        assert torch.equal(torch.cat([DRAWS[name](part, count) for part in parts]), drawn)
    for part in parts:
        assert torch.equal(part.generator.get_state(), whole.generator.get_state())


@pytest.mark.parametrize("name", DRAWS)
def test_draws_go_on_and_differ(name: str) -> None:
    stream = seeded()
    first, second = (DRAWS[name](stream, 8) for _ in range(2))
    assert first.shape[0] == 8
    assert not torch.equal(first, second)
    assert torch.equal(DRAWS[name](seeded(), 8), first)


def test_uniform_numbers_fill_0_to_1() -> None:
    numbers = seeded().uniform(10_000)
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.02


def test_integers_are_each_about_as_frequent() -> None:
    counts = torch.bincount(seeded().integers(5, 10_000))
    assert len(counts) == 5
    assert 1800 < counts.min() <= counts.max() < 2200


def test_normal_numbers_are_standard() -> None:
    numbers = seeded().normal(10_000)
    assert abs(float(numbers.mean())) < 0.05
    assert abs(float(numbers.std()) - 1) < 0.05


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_dirichlet_weights_sum_to_1(alpha: float) -> None:
    weights = seeded().dirichlet(alpha, 5000, 3)
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    assert torch.allclose(weights.sum(1), torch.ones(5000))
    variance = (1 / 3) * (2 / 3) / (3 * alpha + 1)
    assert torch.allclose(weights.mean(0), torch.full((3,), 1 / 3), atol=0.02)
    assert torch.allclose(weights.var(0), torch.full((3,), variance), rtol=0.1)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_beta_weights_are_symmetric_in_0_to_1(alpha: float) -> None:
    weights = seeded().beta(alpha, 5000)
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert abs(float(weights.mean()) - 0.5) < 0.02
    assert abs(float(weights.var()) / (1 / (4 * (2 * alpha + 1))) - 1) < 0.1
