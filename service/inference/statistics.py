"""Statistics: what each version has done, counted in the event loop and read from anywhere.

    batcher --executed, rejected--> Statistics <--succeeded, failed, cache_hit, cache_miss-- inference
    Statistics --> ModelStatistics      Ledger of Statistics --> Prometheus's page

Counts are whole numbers that only grow and only the event loop changes; each list or dictionary of them is copied in
one step. So another thread may read them at any time: two numbers that it reads may differ by the request that was
being counted between them, and none ever goes back.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import grpc

from protos.inference import open_inference_pb2 as pb
from service.errors import ServiceError
from service.inference.batching import Rejection
from service.inference.queues import ClosedBy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.inference.batching import Execution

# Triton's own words for why a request failed.
Failure = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]

# Upper ends of the buckets, nanoseconds: 100 us, which is less than any call takes, to 10 s, after which nobody waits.
DURATIONS_NS = tuple(
    round(seconds * 1e9)
    for seconds in (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)

_FAILURES: dict[grpc.StatusCode, Failure] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "REJECTED",
    grpc.StatusCode.UNAVAILABLE: "REJECTED",
    grpc.StatusCode.DEADLINE_EXCEEDED: "REJECTED",
    grpc.StatusCode.CANCELLED: "CANCELED",
    grpc.StatusCode.INTERNAL: "BACKEND",
}


class Queue(Protocol):
    """What requests wait in."""

    @property
    def waiting(self) -> int:
        """Requests that wait to be taken."""
        ...


class Buckets(NamedTuple):
    """What a histogram held when it was read."""

    # Upper ends, ascending, in the unit of what was observed; the last bucket, without one, is not among them.
    bounds: Sequence[int]
    # Observations up to each bound, and all of them.
    cumulative: Sequence[int]
    # The sum of what was observed.
    total: int


class Histogram:
    """Observations counted in fixed buckets."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0

    def observe(self, value: int) -> None:
        """Count one observation in the first bucket whose upper end it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> Buckets:
        """Return what has been counted."""
        return Buckets(self._bounds, tuple(accumulate(self._counts.copy())), self._total)


class Durations:
    """How often something happened and the nanoseconds that it took, all together."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int, *, times: int = 1) -> None:
        """Count something that took `ns`, `times` times."""
        self.count += times
        self.ns += ns * times

    def as_message(self) -> pb.StatisticDuration:
        """Return the protocol's form of this."""
        return pb.StatisticDuration(count=self.count, ns=self.ns)


class BatchTimes:
    """The engine's calls with batches of one size."""

    __slots__ = ("executions", "infer_ns", "input_ns", "output_ns")

    def __init__(self) -> None:
        self.executions = 0
        self.input_ns = 0
        self.infer_ns = 0
        self.output_ns = 0

    def add(self, execution: Execution) -> None:
        """Count one call."""
        self.executions += 1
        self.input_ns += execution.input_ns
        self.infer_ns += execution.infer_ns
        self.output_ns += execution.output_ns

    def as_message(self, size: int) -> pb.InferBatchStatistics:
        """Return the protocol's form of this."""
        return pb.InferBatchStatistics(
            batch_size=size,
            compute_input=pb.StatisticDuration(count=self.executions, ns=self.input_ns),
            compute_infer=pb.StatisticDuration(count=self.executions, ns=self.infer_ns),
            compute_output=pb.StatisticDuration(count=self.executions, ns=self.output_ns),
        )


class Statistics:
    """What one version of a model has done; an `Observer` of its batcher.

    Args:
        max_batch: images that a call of the engine may have.
    """

    __slots__ = (
        "_by_size",
        "_queues",
        "cache_hits",
        "cache_misses",
        "closed_by",
        "compute_infer",
        "compute_input",
        "compute_output",
        "compute_times",
        "executions",
        "failures",
        "images",
        "last_inference_ms",
        "max_batch",
        "queue",
        "queue_times",
        "rejections",
        "request_times",
        "success",
    )

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        # Milliseconds since the epoch; 0 before the first one.
        self.last_inference_ms = 0
        # Images that the engine answered, and its calls.
        self.images = 0
        self.executions = 0
        # Requests; time in the engine is that of the whole batch for each request in it, as Triton counts.
        self.success = Durations()
        self.failures: dict[Failure, Durations] = {reason: Durations() for reason in get_args(Failure)}
        self.queue = Durations()
        self.compute_input = Durations()
        self.compute_infer = Durations()
        self.compute_output = Durations()
        self.cache_hits = Durations()
        self.cache_misses = Durations()
        # Nanoseconds: of each request in the queue, of each call of the engine, of each request from start to end.
        self.queue_times = Histogram(DURATIONS_NS)
        self.compute_times = Histogram(DURATIONS_NS)
        self.request_times = Histogram(DURATIONS_NS)
        self.closed_by: dict[ClosedBy, int] = dict.fromkeys(get_args(ClosedBy), 0)
        self.rejections: dict[Rejection, int] = dict.fromkeys(get_args(Rejection), 0)
        self._by_size: dict[int, BatchTimes] = {}
        self._queues: tuple[weakref.ref[Queue], ...] = ()

    def watch(self, queue: Queue) -> None:
        """Ask this queue, too, how many wait; nobody does in one that is gone, which this does not keep alive."""
        self._queues = (*(each for each in self._queues if each() is not None), weakref.ref(queue))

    @property
    def waiting(self) -> int:
        """Requests that wait in the queues now; while a version is loaded again, it has two."""
        queues = [each() for each in self._queues]
        return sum(queue.waiting for queue in queues if queue is not None)

    def executed(self, execution: Execution) -> None:
        """Count one call of the engine; of one that failed only why its batch was closed."""
        self.closed_by[execution.closed_by] += 1
        if execution.failed:
            return
        images, requests = execution.images, execution.requests
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.images += images
        self.executions += 1
        self.queue.count += requests
        for waited_ns in execution.waited_ns:
            self.queue.ns += waited_ns
            self.queue_times.observe(waited_ns)
        self.compute_input.add(execution.input_ns, times=requests)
        self.compute_infer.add(execution.infer_ns, times=requests)
        self.compute_output.add(execution.output_ns, times=requests)
        self.compute_times.observe(execution.infer_ns)
        if images not in self._by_size:
            self._by_size[images] = BatchTimes()
        self._by_size[images].add(execution)

    def rejected(self, reason: Rejection) -> None:
        """Count a request that never reached the engine."""
        self.rejections[reason] += 1

    def succeeded(self, total_ns: int) -> None:
        """Count a request that was answered, by the engine or the cache, and its time from arrival to answer."""
        self.success.add(total_ns)
        self.request_times.observe(total_ns)

    def failed(self, total_ns: int, error: BaseException | None = None) -> None:
        """Count a request that was not answered, and its time until that was known.

        Args:
            total_ns: nanoseconds.
            error: what is answered instead; it decides which reason is counted.
        """
        self.failures[_reason(error)].add(total_ns)

    def cache_hit(self, ns: int) -> None:
        """Count a request that the response cache answered, and the time to look it up."""
        self.cache_hits.add(ns)

    def cache_miss(self, ns: int) -> None:
        """Count a request that the response cache could not answer, and the time to look it up and to store it."""
        self.cache_misses.add(ns)

    def batch_sizes(self) -> Buckets:
        """Return the calls of the engine by their images: buckets up to powers of two and the largest batch."""
        calls = {size: times.executions for size, times in self._by_size.copy().items()}
        bounds = [*(1 << power for power in range((self.max_batch - 1).bit_length())), self.max_batch]
        counts = [0] * (len(bounds) + 1)
        for size, executions in calls.items():
            counts[bisect_left(bounds, size)] += executions
        return Buckets(bounds, tuple(accumulate(counts)), sum(size * count for size, count in calls.items()))

    def as_message(self, name: str, version: str) -> pb.ModelStatistics:
        """Return the protocol's form of this, for the model and version that it is of.

        As Triton counts and perf_analyzer reads it: the three `compute_*` have one count, the requests that the engine
        answered; `queue` has those that the cache answered, too, which waited for nothing.
        """
        return pb.ModelStatistics(
            name=name,
            version=version,
            last_inference=self.last_inference_ms,
            inference_count=self.images,
            execution_count=self.executions,
            inference_stats=pb.InferStatistics(
                success=self.success.as_message(),
                fail=_sum(list(self.failures.values())),
                queue=pb.StatisticDuration(count=self.queue.count + self.cache_hits.count, ns=self.queue.ns),
                compute_input=self.compute_input.as_message(),
                compute_infer=self.compute_infer.as_message(),
                compute_output=self.compute_output.as_message(),
                cache_hit=self.cache_hits.as_message(),
                cache_miss=self.cache_misses.as_message(),
            ),
            batch_stats=[times.as_message(size) for size, times in sorted(self._by_size.copy().items())],
        )


class Ledger:
    """The statistics of every version that has been served since the process began.

    They are kept when a version is taken out, and go on when it comes back: Prometheus takes a counter that went back
    for a process that began anew.
    """

    def __init__(self) -> None:
        self._statistics: dict[tuple[str, str], Statistics] = {}

    def of(self, model: str, version: int | str, *, max_batch: int) -> Statistics:
        """Return the statistics of a version, new ones if it was never served.

        Args:
            model: its name.
            version: its number.
            max_batch: images that a call of its engine may have now.
        """
        key = model, str(version)
        if key not in self._statistics:
            self._statistics[key] = Statistics(max_batch)
        statistics = self._statistics[key]
        statistics.max_batch = max_batch
        return statistics

    def read(self) -> list[tuple[str, str, Statistics]]:
        """Return (model, version, statistics) of each, by name and number."""
        kept = sorted(self._statistics.copy().items(), key=lambda item: (item[0][0], len(item[0][1]), item[0][1]))
        return [(model, version, statistics) for (model, version), statistics in kept]


def _reason(error: BaseException | None) -> Failure:
    if isinstance(error, asyncio.CancelledError):
        return "CANCELED"
    if isinstance(error, ServiceError):
        return _FAILURES.get(error.status, "OTHER")
    # What the engine raised, and whatever else nobody foresaw.
    return "OTHER" if error is None else "BACKEND"


def _sum(durations: list[Durations]) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=sum(each.count for each in durations), ns=sum(each.ns for each in durations))
