"""Spans as a collector gets them: a real one, behind a real port."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service import tracing
from service.calls import Call, Calls
from service.errors import NotFound
from service.settings import Tracing

METHOD = "/inference.GRPCInferenceService/ModelInfer"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._lock = threading.Lock()
        self._requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002 - gRPC's own
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            self._requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def services(self) -> list[dict[str, str]]:
        every = [resource for request in self._requests for resource in request.resource_spans]
        return [{each.key: each.value.string_value for each in found.resource.attributes} for found in every]

    def spans(self) -> dict[str, Span]:
        every = [
            span
            for request in self._requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        found = {span.name: span for span in every}
        assert len(found) == len(every), "each once"
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield collector
    server.stop(None).wait()


@dataclass
class Switch:
    enabled: bool = True
    ratio: float = 1.0


class Context:
    """What a caller sent beside its request."""

    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._metadata


@asynccontextmanager
async def traced(collector: Collector, switch: Switch | None = None) -> AsyncIterator[Calls]:
    tracer = tracing.start(Tracing(endpoint=collector.endpoint), switch or Switch())
    assert tracer is not None
    yield Calls(tracer=tracer)
    await tracer.close()


def called(every: Calls, *metadata: tuple[str, str | bytes], error: Exception | None = None) -> Call:
    call = every.begin(METHOD, Context(*metadata))
    call.describe(model="digits", version="2", request_id="the-id")
    call.images = 3
    call.ran(waited_ns=1_000_000, ran_ns=2_000_000, batch=8)
    if error is not None:
        call.fail(error)
    every.end(call)
    return call


def attributes(span: Span) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        assert kind is not None
        found[each.key] = getattr(each.value, kind)
    return found


async def test_a_call_is_a_span_that_says_what_it_asked_and_waited_for(collector: Collector) -> None:
    async with traced(collector) as every:
        called(every)
    spans = collector.spans()
    span = spans["inference.GRPCInferenceService/ModelInfer"]
    assert span.kind == Span.SPAN_KIND_SERVER
    assert attributes(span) == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "tenet.request_id": "the-id",
        "tenet.model": "digits",
        "tenet.version": "2",
        "tenet.images": 3,
        "tenet.batch_size": 8,
        "tenet.queue_seconds": 0.001,
        "tenet.compute_seconds": 0.002,
    }
    assert not span.parent_span_id
    assert {service["service.name"] for service in collector.services()} == {"tenet"}


async def test_queue_and_engine_are_spans_within_the_call_s_one_after_the_other(collector: Collector) -> None:
    async with traced(collector) as every:
        called(every)
    spans = collector.spans()
    queue, compute = spans["queue"], spans["compute"]
    call = spans["inference.GRPCInferenceService/ModelInfer"]
    assert queue.parent_span_id == compute.parent_span_id == call.span_id
    assert queue.trace_id == compute.trace_id == call.trace_id
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == 1_000_000
    assert compute.end_time_unix_nano - compute.start_time_unix_nano == 2_000_000
    assert queue.end_time_unix_nano == compute.start_time_unix_nano
    assert compute.end_time_unix_nano <= call.end_time_unix_nano


async def test_a_call_joins_its_caller_s_trace(collector: Collector) -> None:
    async with traced(collector, Switch(ratio=0.0)) as every:
        call = called(every, ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"), ("x-bin", b"\0"))
    span = collector.spans()["inference.GRPCInferenceService/ModelInfer"]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")
    assert call.trace_id == TRACE


async def test_a_caller_that_does_not_trace_is_not_traced_and_its_trace_still_known(collector: Collector) -> None:
    async with traced(collector) as every:
        call = called(every, ("traceparent", f"00-{TRACE}-{PARENT}-00"))
    assert collector.spans() == {}
    assert call.trace_id == TRACE


@pytest.mark.parametrize("sent", ["", "rubbish", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "é" * 9_000])
async def test_a_parent_that_is_none_is_no_parent(collector: Collector, sent: str) -> None:
    async with traced(collector) as every:
        called(every, ("traceparent", sent))
    assert not collector.spans()["inference.GRPCInferenceService/ModelInfer"].parent_span_id


async def test_which_calls_are_traced_can_be_changed_while_it_runs(collector: Collector) -> None:
    switch = Switch(enabled=False)
    async with traced(collector, switch) as every:
        called(every, ("traceparent", f"00-{TRACE}-{PARENT}-01"))
        switch.enabled, switch.ratio = True, 0.0
        called(every)
        switch.ratio = 1.0
        call = called(every)
    assert collector.spans()["inference.GRPCInferenceService/ModelInfer"].trace_id.hex() == call.trace_id


async def test_about_the_ratio_of_calls_is_traced(collector: Collector) -> None:
    async with traced(collector, Switch(ratio=0.25)) as every:
        begun = [every.begin(METHOD, Context()) for _ in range(2_000)]
        number = sum(call.span is not None for call in begun)
    # Five standard deviations of a binomial with n = 2000, p = 1/4.
    assert abs(number - 500) < 5 * 19.4


async def test_only_the_server_s_own_failures_are_errors(collector: Collector) -> None:
    async with traced(collector) as every:
        called(every, error=RuntimeError("engine"))
    span = collector.spans()["inference.GRPCInferenceService/ModelInfer"]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]


async def test_a_caller_s_mistake_is_no_error_of_the_server(collector: Collector) -> None:
    async with traced(collector) as every:
        called(every, error=NotFound("model"))
    span = collector.spans()["inference.GRPCInferenceService/ModelInfer"]
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]


async def test_no_endpoint_traces_nothing_and_imports_nothing() -> None:
    script = (
        "import sys; from service import tracing; from service.settings import Tracing; "
        "assert tracing.start(Tracing(), None) is None; "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    assert await process.wait() == 0


async def test_the_extra_that_is_missing_is_named() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None; from service import tracing; "
        "from service.settings import Tracing; tracing.start(Tracing(endpoint='http://127.0.0.1:4317'), None)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert said.decode().splitlines()[-1].endswith('needs OpenTelemetry; pip install "tenet[tracing]"')


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://collector", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        tracing.start(Tracing(endpoint=endpoint), Switch())


async def test_a_collector_that_is_not_there_holds_the_end_up_for_seconds_at_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracer = tracing.start(Tracing(endpoint="http://127.0.0.1:1"), Switch())
    assert tracer is not None
    called(Calls(tracer=tracer))
    await asyncio.wait_for(tracer.close(), 10)
    assert "127.0.0.1:1" in caplog.text
