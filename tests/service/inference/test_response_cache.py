"""Answers that are kept: which requests are the same, how much memory they take, who goes first."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.inference.response_cache import OVERHEAD, ResponseCache
from service.settings import Cache


def cache_of(answers: int, *, classes: int = 10) -> ResponseCache:
    """A cache with room for so many answers to one image."""
    return ResponseCache(Cache(enabled=True, max_mib=answers * (classes * 4 + OVERHEAD) / (1 << 20)))


def answer(value: float, *, classes: int = 10) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.full((1, classes), value, np.float32)


IMAGES = np.random.default_rng(0).random((2, 3, 4, 4), np.float32)


def test_the_same_bytes_have_the_same_key() -> None:
    apart = np.asfortranarray(IMAGES)
    readonly = np.frombuffer(IMAGES.tobytes(), np.float32).reshape(IMAGES.shape)
    assert ResponseCache.key(IMAGES) == ResponseCache.key(apart) == ResponseCache.key(readonly)


@pytest.mark.parametrize(
    "other",
    [
        IMAGES.reshape(1, 3, 8, 4),
        IMAGES.reshape(2, 3, 2, 8),
        IMAGES.view(np.uint8),
        IMAGES[:1],
        IMAGES[::-1],
        np.nextafter(IMAGES, 1),
    ],
    ids=["batch", "shape", "datatype", "fewer", "order", "values"],
)
def test_other_requests_have_other_keys(other: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    assert ResponseCache.key(other) != ResponseCache.key(IMAGES)


def test_an_answer_is_given_again_and_nobody_can_change_it() -> None:
    cache = cache_of(2)
    logits = answer(1)
    cache.put(b"a", logits)
    logits[:] = 7
    kept = cache.get(b"a")
    assert kept is not None
    np.testing.assert_array_equal(kept, answer(1))
    with pytest.raises(ValueError, match="read-only"):
        kept[:] = 0


def test_the_answer_that_was_not_used_for_longest_goes_first() -> None:
    cache = cache_of(2)
    cache.put(b"a", answer(1))
    cache.put(b"b", answer(2))
    assert cache.get(b"a") is not None
    cache.put(b"c", answer(3))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None


def test_an_answer_that_is_larger_than_all_the_room_is_not_kept() -> None:
    cache = cache_of(2)
    cache.put(b"a", answer(1))
    cache.put(b"b", answer(2, classes=1000))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None


def test_a_cache_that_is_off_keeps_nothing() -> None:
    cache = ResponseCache(Cache())
    cache.put(b"a", answer(1))
    assert not cache.enabled
    assert cache.get(b"a") is None
    assert len(cache) == 0


def test_nothing_is_left_when_it_is_cleared() -> None:
    cache = cache_of(2)
    cache.put(b"a", answer(1))
    cache.clear()
    assert cache.get(b"a") is None
    assert cache.byte_size == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 400), st.booleans()), max_size=60))
def test_it_never_takes_more_than_its_room(requests: list[tuple[int, int, bool]]) -> None:
    cache = cache_of(5, classes=100)
    room = 5 * (400 + OVERHEAD)
    sizes: dict[bytes, int] = {}
    for number, classes, asked in requests:
        key = bytes([number])
        if asked:
            cache.get(key)
        else:
            held = cache.get(key)
            cache.put(key, answer(number, classes=classes))
            if held is None:
                sizes[key] = classes
        left = [kept for key in sizes if (kept := cache.get(key)) is not None]
        assert cache.byte_size == sum(kept.nbytes + OVERHEAD for kept in left) <= room
        assert len(cache) == len(left)


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_the_room_is_real_memory(classes: int) -> None:
    """Answers are views of a batch's, as the batcher returns them; small ones take their overhead above all."""
    mebibytes = 2.0
    cache = ResponseCache(Cache(enabled=True, max_mib=mebibytes))
    tracemalloc.start()
    try:
        for number in range(8000):
            batch = np.zeros((64, classes), np.float32)
            cache.put(ResponseCache.key(np.full((1, 4), number, np.float32)), batch[:1])
            del batch
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.byte_size > 0.95 * mebibytes * (1 << 20)
    assert taken < 1.05 * mebibytes * (1 << 20)
