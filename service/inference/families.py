"""Families: what the versions have done, as Prometheus counts it, by Triton's names and ours.

Ledger --counts, as they are-----------------\
index of versions --asked in the event loop--+--> families, one sample a version

Reading happens in the page's threads. The event loop is asked for the models' states alone, since only it may look at
them; everything else may be read at any time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from service.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from service.inference.statistics import Buckets, Durations, Ledger, Statistics

    Kept = list[tuple[str, str, Statistics]]

_LABELS = ("model", "version")
_SECOND_NS = 1e9
_MICROSECOND_NS = 1_000

# Seconds that the event loop may take to say which models there are; then the page goes without.
_PATIENCE_S = 1.0

# Triton's, each with what it says: of requests, images and calls of the engine; microseconds where the name says so,
# and in the two of the cache whose names do not.
_COUNTS: dict[str, tuple[str, Callable[[Statistics], int]]] = {
    "nv_inference_request_success": ("Requests that were answered", lambda each: each.success.count),
    "nv_inference_count": ("Images that an engine answered", lambda each: each.images),
    "nv_inference_exec_count": ("Calls of an engine", lambda each: each.executions),
    "nv_cache_num_hits_per_model": (
        "Requests that the response cache answered",
        lambda each: each.cache_hits.count,
    ),
    "nv_cache_num_misses_per_model": (
        "Requests that the response cache could not answer",
        lambda each: each.cache_misses.count,
    ),
}
_TIMES: dict[str, tuple[str, Callable[[Statistics], Durations]]] = {
    "nv_inference_request_duration_us": ("Time of answered requests", lambda each: each.success),
    "nv_inference_queue_duration_us": ("Time of requests in the queue", lambda each: each.queue),
    "nv_inference_compute_input_duration_us": (
        "Time in which inputs were joined for the engine",
        lambda each: each.compute_input,
    ),
    "nv_inference_compute_infer_duration_us": ("Time in the engine", lambda each: each.compute_infer),
    "nv_inference_compute_output_duration_us": (
        "Time in which the engine's answers were split",
        lambda each: each.compute_output,
    ),
    "nv_cache_hit_duration_per_model": ("Time to look up answers that were there", lambda each: each.cache_hits),
    "nv_cache_miss_duration_per_model": (
        "Time to look up answers that were not there, and to store them",
        lambda each: each.cache_misses,
    ),
}

# Ours: what it says, what is read, and how many of what is read are one of what is shown.
_HISTOGRAMS: dict[str, tuple[str, Callable[[Statistics], Buckets], float]] = {
    "tenet_request_seconds": (
        "Time of answered requests, from arrival to answer",
        lambda each: each.request_times.read(),
        _SECOND_NS,
    ),
    "tenet_queue_seconds": (
        "Time that requests waited for an engine",
        lambda each: each.queue_times.read(),
        _SECOND_NS,
    ),
    "tenet_compute_seconds": (
        "Time of calls of an engine, each of a whole batch",
        lambda each: each.compute_times.read(),
        _SECOND_NS,
    ),
    "tenet_batch_size": ("Images of calls of an engine", lambda each: each.batch_sizes(), 1.0),
}
_REASONS: dict[str, tuple[str, Callable[[Statistics], Mapping[Any, int]]]] = {
    "tenet_batches_closed": ("Batches, by why they took no more", lambda each: each.closed_by),
    "tenet_rejected": ("Requests that reached no engine, by reason", lambda each: each.rejections),
}


class Entry(Protocol):
    """What the index of a repository says of a version."""

    @property
    def state(self) -> str:
        """READY, LOADING, UNLOADING or UNAVAILABLE."""
        ...


class Families(Collector):
    """Reads what the versions have done; must be made where the event loop runs.

    Args:
        ledger: what is counted.
        index: every version and its state; it is called in the event loop.
    """

    def __init__(self, ledger: Ledger, *, index: Callable[[], Iterable[Entry]]) -> None:
        self._ledger = ledger
        self._index = index
        self._loop = asyncio.get_running_loop()

    def describe(self) -> list[Metric]:
        """Return every family without samples: the page finds those that `?name[]=` asks for by it."""
        return [*_counted([]), *_about(Counter())]

    def collect(self) -> Iterator[Metric]:
        """Read everything once; in any thread but the event loop's."""
        yield from _counted(self._ledger.read())
        yield from _about(self._ask())

    def _ask(self) -> Counter[str]:
        answer: Future[Counter[str]] = Future()
        try:
            self._loop.call_soon_threadsafe(self._count, answer)
        except RuntimeError:
            # The event loop is closed: this is the last that is read.
            return Counter()
        try:
            return answer.result(_PATIENCE_S)
        except TimeoutError:
            # It is busy: just then one wants to know what has been counted.
            return Counter()

    def _count(self, answer: Future[Counter[str]]) -> None:
        try:
            answer.set_result(Counter(entry.state for entry in self._index()))
        except Exception as error:  # noqa: BLE001 - it belongs to who asks
            answer.set_exception(error)


def _counted(kept: Kept) -> Iterator[Metric]:
    yield from _counts(kept)
    yield from _times(kept)
    yield _failures(kept)
    yield _waiting(kept)
    yield from _histograms(kept)
    yield from _reasons(kept)


def _about(states: Counter[str]) -> Iterator[Metric]:
    family = GaugeMetricFamily("tenet_models", "Versions in the repository, by state", labels=("state",))
    for state, number in sorted(states.items()):
        family.add_metric((state,), number)
    yield family
    yield InfoMetricFamily("tenet_build", "The product", {"version": VERSION})


def _counts(kept: Kept) -> Iterator[Metric]:
    for name, (documentation, read) in _COUNTS.items():
        family = UnknownMetricFamily(name, documentation, labels=_LABELS)
        for model, version, statistics in kept:
            family.add_metric((model, version), read(statistics))
        yield family


def _times(kept: Kept) -> Iterator[Metric]:
    for name, (documentation, read) in _TIMES.items():
        family = UnknownMetricFamily(name, f"{documentation}, microseconds", labels=_LABELS)
        for model, version, statistics in kept:
            family.add_metric((model, version), read(statistics).ns // _MICROSECOND_NS)
        yield family


def _failures(kept: Kept) -> Metric:
    family = UnknownMetricFamily(
        "nv_inference_request_failure", "Requests that were not answered, by reason", labels=(*_LABELS, "reason")
    )
    for model, version, statistics in kept:
        for reason, durations in statistics.failures.items():
            family.add_metric((model, version, reason), durations.count)
    return family


def _waiting(kept: Kept) -> Metric:
    family = GaugeMetricFamily(
        "nv_inference_pending_request_count", "Requests that wait for an engine now", labels=_LABELS
    )
    for model, version, statistics in kept:
        family.add_metric((model, version), statistics.waiting)
    return family


def _histograms(kept: Kept) -> Iterator[Metric]:
    for name, (documentation, read, unit) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(name, documentation, labels=_LABELS)
        for model, version, statistics in kept:
            buckets = read(statistics)
            ends = [*(str(bound / unit) for bound in buckets.bounds), "+Inf"]
            family.add_metric((model, version), list(zip(ends, buckets.cumulative, strict=True)), buckets.total / unit)
        yield family


def _reasons(kept: Kept) -> Iterator[Metric]:
    for name, (documentation, read) in _REASONS.items():
        family = CounterMetricFamily(name, documentation, labels=(*_LABELS, "reason"))
        for model, version, statistics in kept:
            for reason, number in read(statistics).items():
                family.add_metric((model, version, reason), number)
        yield family
