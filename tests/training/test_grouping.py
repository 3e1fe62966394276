from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from training import grouping


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def maps(draw: st.DrawFn, *, groups: int = 3) -> Tensor:
    count, channels, size = draw(st.integers(1, 4)), draw(st.integers(groups, 9)), draw(st.integers(1, 4))
    return torch.randn(count, channels, size, size, generator=seeded(draw(st.integers(0, 1000))))


def test_groups_are_the_published_ones(golden: dict[str, Tensor]) -> None:
    initial = golden["initial_indices"]
    ids, _ = grouping.group_channels(golden["features"], initial.shape[1], initial=initial)
    assert (ids == golden["group_ids"]).float().mean() >= 0.98  # the published code forbids two centres on one map


@given(features=maps(), seed=st.integers(0, 99))
def test_each_channel_is_in_the_group_of_its_nearest_centre(features: Tensor, seed: int) -> None:
    ids, centres = grouping.group_channels(features, 3, generator=seeded(seed))
    assert ids.shape == features.shape[:2]
    assert centres.shape == (len(features), 3)
    assert ids.dtype == centres.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 3
    assert 0 <= int(centres.min()) <= int(centres.max()) < features.shape[1]
    for sample, group, centre in zip(features, ids, centres, strict=True):
        distances = (sample[:, None] - sample[centre]).square().mean((2, 3))
        assert torch.allclose(distances.gather(1, group[:, None])[:, 0], distances.min(1).values, atol=1e-6)


@given(features=maps(), seed=st.integers(0, 99))
def test_stable_centres_are_the_maps_nearest_to_their_group_means(features: Tensor, seed: int) -> None:
    ids, centres = grouping.group_channels(features, 3, generator=seeded(seed))
    again, after = grouping.group_channels(features, 3, initial=centres, max_rounds=1)
    assume(torch.equal(centres, after))  # k-medoids over means may go round in a circle, until the bound on rounds
    assert torch.equal(ids, again)
    for sample, group, centre in zip(features, ids, centres, strict=True):
        for index in group.unique():
            mean = sample[group == index].mean(0)
            distances = (sample - mean).square().mean((1, 2))
            assert torch.isclose(distances[centre[index]], distances.min(), atol=1e-6)


@given(features=maps(), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_samples_do_not_see_each_other(features: Tensor, seed: int) -> None:
    ids, centres = grouping.group_channels(features, 3, generator=seeded(seed))
    initial = torch.rand(features.shape[:2], generator=seeded(seed)).topk(3, dim=1).indices
    for index in range(len(features)):
        one = slice(index, index + 1)
        alone, centre = grouping.group_channels(features[one], 3, initial=initial[one])
        assert torch.equal(alone, ids[one])
        assert torch.equal(centre, centres[one])


@given(value=st.floats(-10, 10), count=st.integers(1, 3))
def test_constant_maps_are_one_group(value: float, count: int) -> None:
    ids, centres = grouping.group_channels(torch.full((count, 8, 3, 3), value), 4, generator=seeded(0))
    assert (ids == ids[:, :1]).all()
    assert centres.shape == (count, 4)


def test_two_kinds_of_maps_are_told_apart_by_a_centre_in_each() -> None:
    kinds = torch.tensor([0, 1, 0, 1, 1, 0])
    features = 5.0 * kinds[None, :, None, None] + 0.1 * torch.rand(2, 6, 3, 3, generator=seeded(0))
    ids, _ = grouping.group_channels(features, 2, initial=torch.tensor([[0, 1], [1, 0]]))
    assert torch.equal(ids, torch.stack([kinds, 1 - kinds]))


def test_as_many_groups_as_channels_is_a_group_each() -> None:
    ids, _ = grouping.group_channels(torch.rand(2, 5, 3, 3, generator=seeded(0)), 5, generator=seeded(1))
    assert all(len(sample.unique()) == 5 for sample in ids)


def test_the_generator_decides_where_centres_start() -> None:
    features = torch.rand(8, 12, 3, 3, generator=seeded(0))
    first, same, other = (grouping.group_channels(features, 4, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_half_precision_is_grouped_like_single() -> None:
    features = torch.rand(4, 12, 3, 3, generator=seeded(0)).half()
    half, _ = grouping.group_channels(features, 4, generator=seeded(1))
    single, _ = grouping.group_channels(features.float(), 4, generator=seeded(1))
    assert torch.equal(half, single)


@pytest.mark.parametrize("groups", [0, 5])
def test_more_groups_than_channels_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: expected 1 to 4, the channels of the stage, got {groups}"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), groups)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rounds: expected at least 1, got 0"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), 2, max_rounds=0)
    with pytest.raises(ValueError, match=r"initial: expected shape \(2, 2\), got \(2, 3\)"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), 2, initial=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial: expected channels in 0\.\.3, got 0 to 4"):
        grouping.group_channels(torch.rand(1, 4, 3, 3), 2, initial=torch.tensor([[0, 4]]))
