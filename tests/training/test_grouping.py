from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from training import grouping

EXACT = 1e-9  # share of a distance that double precision may lose
CLEAR = 1e-4  # share of a distance that single precision can tell


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def maps(draw: st.DrawFn, *, groups: int = 3) -> Tensor:
    count, channels, size = draw(st.integers(1, 4)), draw(st.integers(groups, 9)), draw(st.integers(2, 4))
    return torch.randn(count, channels, size, size, generator=seeded(draw(st.integers(0, 1000))))


def reference(sample: Tensor, initial: Tensor) -> tuple[list[int], list[int], list[float]]:
    """Group one sample's maps as the equations say, in double precision, the lowest index first.

    Also return, of each choice, by how much the second-best distance was larger, as a share of the largest: 0 where
    one of the two maps of a group of two becomes its centre, as they are as near to their mean as each other.
    """
    maps, centres, leads = sample.double().flatten(1), initial.tolist(), []

    def nearest(point: Tensor, choices: list[int]) -> int:
        distances = [float((maps[choice] - point).square().mean()) for choice in choices]
        least, second = sorted(distances)[:2]
        leads.append((second - least) / (max(distances) + 1e-30))
        return next(index for index, value in enumerate(distances) if value <= least + EXACT * max(distances))

    for _ in range(50):
        ids, before = [nearest(point, centres) for point in maps], list(centres)
        for group in set(ids):
            members = [channel for channel, own in enumerate(ids) if own == group]
            centres[group] = nearest(maps[members].mean(0), list(range(len(maps))))
        if centres == before:
            break
    return [nearest(point, centres) for point in maps], centres, leads


def first_channels(features: Tensor, groups: int, *, seed: int) -> Tensor:
    return grouping.random_subset(len(features), features.shape[1], groups, generator=seeded(seed))


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


@given(features=maps(), seed=st.integers(0, 99), offset=st.sampled_from([0.0, -3.0, 1e4]))
def test_groups_are_those_of_the_equations_in_double_precision(features: Tensor, seed: int, offset: float) -> None:
    features = features + offset
    initial = first_channels(features, 3, seed=seed)
    ids, centres = grouping.group_channels(features, 3, initial=initial)
    for sample, start, group, centre in zip(features, initial, ids, centres, strict=True):
        expected_ids, expected_centres, leads = reference(sample, start)
        if not any(EXACT < lead < CLEAR for lead in leads):
            assert group.tolist() == expected_ids
            assert centre.tolist() == expected_centres


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_many_maps_are_grouped_as_in_double_precision(offset: float) -> None:
    features = torch.rand(2, 96, 12, 12, generator=seeded(0)).square() + offset
    initial = first_channels(features, 6, seed=1)
    ids, _ = grouping.group_channels(features, 6, initial=initial)
    expected = [reference(sample, start)[0] for sample, start in zip(features, initial, strict=True)]
    assert (ids == torch.tensor(expected)).float().mean() >= 0.98


@given(features=maps(), seed=st.integers(0, 99))
def test_a_permutation_of_the_channels_permutes_the_groups(features: Tensor, seed: int) -> None:
    features = features[:1]
    initial = first_channels(features, 3, seed=seed)
    assume(min(reference(features[0], initial[0])[2]) > CLEAR)  # which of two equally near maps is the lower changes
    order = torch.randperm(features.shape[1], generator=seeded(seed))
    ids, centres = grouping.group_channels(features, 3, initial=initial)
    permuted, moved = grouping.group_channels(features[:, order], 3, initial=order.argsort()[initial])
    assert torch.equal(permuted, ids[:, order])
    assert torch.equal(order[moved], centres)


@given(features=maps(), seed=st.integers(0, 99))
def test_a_centre_is_a_map_of_its_own_group(features: Tensor, seed: int) -> None:
    ids, centres = grouping.group_channels(features, 3, generator=seeded(seed))
    for group, centre in zip(ids, centres, strict=True):
        for channel in centre.unique():  # two groups may share a centre, and then the first of them has the maps
            assert group[channel] == (centre == channel).nonzero()[0]


@given(features=maps(), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_samples_do_not_see_each_other(features: Tensor, seed: int) -> None:
    ids, centres = grouping.group_channels(features, 3, generator=seeded(seed))
    initial = first_channels(features, 3, seed=seed)
    for index in range(len(features)):
        one = slice(index, index + 1)
        alone, centre = grouping.group_channels(features[one], 3, initial=initial[one])
        assert torch.equal(alone, ids[one])
        assert torch.equal(centre, centres[one])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_grouped_as_its_samples_one_by_one_whatever_the_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    features = torch.rand(24, 64, 16, 16, generator=seeded(0)).relu()
    initial = first_channels(features, 6, seed=1)
    ids, centres = grouping.group_channels(features, 6, initial=initial)
    again, _ = grouping.group_channels(features, 6, initial=initial)
    assert torch.equal(ids, again)
    alone = [grouping.group_channels(features[[index]], 6, initial=initial[[index]]) for index in range(24)]
    assert torch.equal(ids, torch.cat([group for group, _ in alone]))
    assert torch.equal(centres, torch.cat([centre for _, centre in alone]))


@given(value=st.floats(-10, 10), count=st.integers(1, 3), size=st.sampled_from([1, 3, 16]))
def test_constant_maps_are_one_group(value: float, count: int, size: int) -> None:
    ids, centres = grouping.group_channels(torch.full((count, 8, size, size), value), 4, generator=seeded(0))
    assert (ids == 0).all()
    assert centres.shape == (count, 4)


@given(features=maps())
def test_a_group_that_loses_all_its_maps_keeps_its_centre(features: Tensor) -> None:
    features[:, 1] = features[:, 0]  # of two centres on equal maps, the first has all that are near them
    initial = torch.tensor([0, 1, 2]).repeat(len(features), 1)
    _, centres = grouping.group_channels(features, 3, initial=initial, max_rounds=1)
    assert (centres[:, 1] == 1).all()


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_grouped_like_single(dtype: torch.dtype) -> None:
    features = torch.rand(4, 12, 3, 3, generator=seeded(0)).to(dtype)
    half, _ = grouping.group_channels(features, 4, generator=seeded(1))
    single, _ = grouping.group_channels(features.float(), 4, generator=seeded(1))
    assert torch.equal(half, single)


def test_autocast_does_not_lower_the_precision_of_the_grouping() -> None:
    features = torch.rand(8, 64, 6, 6, generator=seeded(0))
    expected, _ = grouping.group_channels(features, 4, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, _ = grouping.group_channels(features, 4, generator=seeded(1))
    assert torch.equal(ids, expected)


def test_channels_last_maps_are_grouped_like_others() -> None:
    features = torch.rand(8, 64, 6, 6, generator=seeded(0))
    expected, _ = grouping.group_channels(features, 4, generator=seeded(1))
    last = features.contiguous(memory_format=torch.channels_last)
    ids, _ = grouping.group_channels(last, 4, generator=seeded(1))
    assert torch.equal(ids, expected)


def test_maps_that_are_not_numbers_get_groups_all_the_same() -> None:
    features = torch.rand(3, 8, 3, 3, generator=seeded(0))
    features[0, 2, 1, 1], features[1] = float("nan"), float("inf")
    ids, centres = grouping.group_channels(features, 4, generator=seeded(1))
    assert ((ids >= 0) & (ids < 4)).all()
    assert ((centres >= 0) & (centres < 8)).all()


def test_a_batch_of_none_has_no_groups() -> None:
    ids, centres = grouping.group_channels(torch.rand(0, 8, 3, 3), 4, generator=seeded(1))
    assert ids.shape == (0, 8)
    assert centres.shape == (0, 4)


@given(count=st.integers(0, 5), channels=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_random_subset_has_different_channels(count: int, channels: int, seed: int) -> None:
    groups = (channels + 1) // 2
    subset = grouping.random_subset(count, channels, groups, generator=seeded(seed))
    assert subset.shape == (count, groups)
    assert all(0 <= channel < channels for channel in subset.flatten().tolist())
    assert all(len(set(sample)) == groups for sample in subset.tolist())


@pytest.mark.parametrize("groups", [0, 5])
def test_more_groups_than_channels_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: expected 1 to 4, the channels of the stage, got {groups}"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), groups)
    with pytest.raises(ValueError, match=f"groups: expected 1 to 4, the channels of the stage, got {groups}"):
        grouping.random_subset(2, 4, groups, generator=None)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="max_rounds: expected at least 1, got 0"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), 2, max_rounds=0)
    with pytest.raises(ValueError, match=r"initial: expected shape \(2, 2\), got \(2, 3\)"):
        grouping.group_channels(torch.rand(2, 4, 3, 3), 2, initial=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial: expected channels in 0\.\.3, got 0 to 4"):
        grouping.group_channels(torch.rand(1, 4, 3, 3), 2, initial=torch.tensor([[0, 4]]))
