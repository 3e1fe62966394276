"""The client for programs with threads: operations --calls, several in flight--> a gRPC channel."""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from protos.audit.v1 import audit_pb2, audit_pb2_grpc
from protos.inference import open_inference_pb2_grpc
from service.client import connection, encoding, failures, operations
from service.client.encoding import DEFAULT_OPTIONS
from service.client.operations import DEFAULT_IN_FLIGHT, DEFAULT_TIMEOUT_S, LOAD_TIMEOUT_S, Call, Operations
from service.client.retries import DEFAULT_RETRIES, Attempts
from service.client.shared_memory import Lane
from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from export.engines.base import Images, Logits, Stored
    from protos.inference.model_config_pb2 import ModelConfig
    from service.client.connection import Tls, Token
    from service.client.description import IndexEntry, ModelMetadata, ModelStatistics, Prediction, ServerMetadata
    from service.client.encoding import RequestOptions
    from service.client.operations import Calls, Result, Steps, Version
    from service.client.retries import Retries


class Client:
    """A connection to one server, synchronous, for any number of threads; use it in a `with` block.

    Every call raises `Unavailable` if the server cannot be reached, `DeadlineExceeded` if it does not answer in
    time, and otherwise the error of `service.errors` that the server answered with; all after the retries that are
    safe (`Retries`). Versions are numbers or aliases; where none is named, the server's latest answers.
    """

    def __init__(
        self,
        server: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        token: Token | None = None,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        """Connect at the first call.

        Args:
            server: HOST:PORT.
            timeout: seconds that each call may take, retries and all.
            tls: certificates; the connection is not encrypted without them.
            token: a bearer token, or what returns one; without TLS, whoever sees the network can read it.
            retries: how often what failed is tried again.
        """
        self._server = server
        self._timeout = timeout
        self._token = token
        self._retries = retries
        self._generator = np.random.default_rng()
        self._operations = Operations()
        self._channel = connection.blocking_channel(server, tls=tls)
        self._inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = connection.infer_method(self._channel)
        self._audits = audit_pb2_grpc.AuditServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def ready(self, model: str | None = None, *, version: Version = None) -> bool:
        """Return whether the server serves all that it should; or whether it serves this model or version."""
        return self._run(self._operations.ready(model, version=version))

    def server_metadata(self) -> ServerMetadata:
        """Return what the server is, and which extensions of the protocol it speaks."""
        return self._run(self._operations.server_metadata())

    def metadata(self, model: str, *, version: Version = None) -> ModelMetadata:
        """Return how the server describes a model, in its latest version if none is named."""
        return self._run(self._operations.metadata(model, version=version))

    def config(self, model: str, *, version: Version = None) -> ModelConfig:
        """Return a model's configuration, as Triton would have it."""
        return self._run(self._operations.config(model, version=version))

    def statistics(self, model: str = "", *, version: Version = None) -> list[ModelStatistics]:
        """Return what the versions of a model, or of all, did since the server first served them, over reloads."""
        return self._run(self._operations.statistics(model, version=version))

    def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Return every version in the server's repository, its state and why; or only those that answer."""
        return self._run(self._operations.index(ready=ready))

    def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Have a model loaded, or loaded again; returns when it answers."""
        self._run(self._operations.load(model, timeout_s=timeout_s))

    def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Have a model taken out of service."""
        self._run(self._operations.unload(model, timeout_s=timeout_s))

    def infer(
        self,
        images: Images | Stored,
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = 1,
    ) -> Logits:
        """Return the answers to any number of images, all of them from one version.

        Args:
            images: (N, C, H, W) float32 in [0, 1], N >= 1, for every model: one that takes uint8 is sent each value
                times 255, rounded half to even. Or, for such a model alone, what it takes: (N, H, W, C) uint8.
            model: its name on the server.
            version: its version, or an alias; the latest when the call begins if None.
            batch: images a request; as many as the server takes, 64 at most, if None.
            options: request id, priority and times of each request.
            in_flight: requests that are on their way at once; one by default, so that the server sees the batches
                as they are cut here and joins no two of them.

        Returns:
            (N, classes): logits, or probabilities where the model applies softmax (`ModelMetadata`).

        Raises:
            ValueError: the images are not of that form.
        """
        return self._run(
            self._operations.infer(
                images, model=model, version=version, batch=batch, options=options, in_flight=in_flight
            )
        )

    def infer_many(
        self,
        batches: Iterable[Images | Stored],
        *,
        model: str,
        version: Version = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> Iterator[Logits]:
        """Yield the answers to batches, in their order and all from one version, while later ones are on their way.

        Args:
            batches: each as `infer` takes images, and no larger than the server takes; read as there is room.
            model: its name on the server.
            version: its version, or an alias; the latest when the first batch is sent if None.
            options: request id, priority and times of each request.
            in_flight: requests that are on their way at once.

        Raises:
            ValueError: a batch is not of that form.
        """
        described = self.metadata(model, version=version)
        calls = (operations.batch_call(each, described, version=version, options=options) for each in batches)
        for response in self._in_order(calls, in_flight=in_flight):
            yield encoding.logits_of(response)

    def infer_encoded(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> Logits:
        """Return the answers to encoded images, which the server decodes, resizes and crops as the model wants it.

        Args:
            images: JPEG, PNG or WebP files, at least one; read as there is room.
            model: its name on a server that decodes (`ModelMetadata.takes_encoded_images`).
            version: its version, or an alias; the latest when the call begins if None.
            batch: images a request; as many as the server takes, 64 at most, if None.
            options: request id, priority and times of each request.
            in_flight: requests that are on their way at once.

        Returns:
            (N, classes), as `infer`.
        """
        return self._run(
            self._operations.infer_encoded(
                images, model=model, version=version, batch=batch, options=options, in_flight=in_flight
            )
        )

    def classify(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version = None,
        top: int = 1,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> list[list[Prediction]]:
        """Return the most probable classes of encoded images, the first first: `infer_encoded`, and names.

        Args:
            images: JPEG, PNG or WebP files, at least one; read as there is room.
            model: its name on a server that decodes (`ModelMetadata.takes_encoded_images`).
            version: its version, or an alias; the latest when the call begins if None.
            top: classes an image.
            options: request id, priority and times of each request.
        """
        return self._run(
            self._operations.classify(
                images, model=model, version=version, top=top, options=options, in_flight=DEFAULT_IN_FLIGHT
            )
        )

    @contextmanager
    def shared_memory(
        self,
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Iterator[Callable[[Images | Stored], Logits]]:
        """Make and register memory that this client shares with a server on this machine, for one model.

        Args:
            model: its name on the server.
            version: its version, or an alias; the latest when the block begins if None.
            batch: images that the memory holds; as many as the server takes if None.
            options: request id, priority and times of each request.

        Yields:
            What returns answers to images, as `infer` does; one call at a time.

        Raises:
            ServiceError: the server shares no memory, or not with this client.
        """
        lane = Lane(self._operations, model=model, version=version, batch=batch, options=options)
        self._run(lane.open())
        try:
            yield lambda images: self._run(lane.infer(images))
        finally:
            self._run(lane.close())

    def submit_audit(self, plan: str) -> audit_pb2.Audit:
        """Submit an audit plan (TOML); raises `InvalidArgument` naming the key that cannot be used."""
        return self._run(self._operations.submit_audit(plan))

    def audit(self, audit_id: str) -> audit_pb2.Audit:
        """Return one audit as it stands; raises `NotFound`."""
        return self._run(self._operations.audit(audit_id))

    def audits(self, *, limit: int) -> list[audit_pb2.Audit]:
        """Return the newest audits, at most `limit` of them."""
        return self._run(self._operations.audits(limit=limit))

    def watch_audit(self, audit_id: str, *, offset: int = 0) -> Iterator[audit_pb2.AuditProgress]:
        """Yield an audit's progress from event `offset` on, as it happens, until it has ended; raises `NotFound`."""
        request = audit_pb2.WatchAuditRequest(id=audit_id, offset=offset)
        try:
            # No deadline: an audit takes what it takes.
            yield from self._audits.WatchAudit(request, metadata=connection.call_metadata(self._token))
        except grpc.RpcError as error:
            failure = failures.failure_of(error)
            raise failures.as_error(failure, server=self._server, timeout_s=self._timeout) from error

    def cancel_audit(self, audit_id: str) -> audit_pb2.Audit:
        """Cancel an audit; raises `NotFound`, or `FailedPrecondition` if it has ended."""
        return self._run(self._operations.cancel_audit(audit_id))

    def audit_report(self, audit_id: str, *, html: bool = False) -> bytes:
        """Return an audit's report, JSON or HTML; raises `NotFound`, or `FailedPrecondition` if it has none (yet)."""
        return self._run(self._operations.audit_report(audit_id, html=html))

    def _run(self, steps: Steps[Result]) -> Result:
        """Make an operation's calls, and return what it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._answer(step)
                except ServiceError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as finished:
            result: Result = finished.value
            return result
        finally:
            steps.close()

    def _answer(self, step: Call | Calls) -> Any:
        if isinstance(step, Call):
            attempts = self._attempts(step)
            return self._finish(step, attempts, partial(self._send, step, attempts))
        return list(self._in_order(step.calls, in_flight=step.in_flight))

    def _in_order(self, calls: Iterable[Call], *, in_flight: int) -> Generator[Any]:
        """Yield the responses of calls in their order, while so many are on their way."""
        operations.check_in_flight(in_flight)
        if in_flight == 1:
            yield from map(self._answer, calls)
            return
        begun: deque[tuple[Call, Attempts, grpc.Future[Any]]] = deque()
        try:
            for call in calls:
                attempts = self._attempts(call)
                future = self._begin(call, attempts)
                future.add_done_callback(lambda _, attempts=attempts: attempts.ended())
                begun.append((call, attempts, future))
                if len(begun) == in_flight:
                    yield self._first(begun)
            while begun:
                yield self._first(begun)
        finally:
            for _, _, future in begun:
                future.cancel()

    def _first(self, begun: deque[tuple[Call, Attempts, grpc.Future[Any]]]) -> Any:
        call, attempts, future = begun.popleft()
        attempts.looked_at()
        return self._finish(call, attempts, partial(_result, future))

    def _finish(self, call: Call, attempts: Attempts, attempt: Callable[[], Any]) -> Any:
        """Return the response of the first attempt that succeeds."""
        while True:
            try:
                return attempt()
            except grpc.RpcError as error:
                wait = attempts.wait_s(error)
            time.sleep(wait)
            attempt = partial(self._send, call, attempts)

    def _attempts(self, call: Call) -> Attempts:
        return Attempts(
            self._retries,
            server=self._server,
            timeout_s=self._timeout if call.timeout_s is None else call.timeout_s,
            repeatable=call.repeatable,
            generator=self._generator,
        )

    def _send(self, call: Call, attempts: Attempts) -> Any:
        metadata = connection.call_metadata(self._token)
        return self._method(call)(call.request, timeout=attempts.left_s, metadata=metadata)

    def _begin(self, call: Call, attempts: Attempts) -> Any:
        metadata = connection.call_metadata(self._token)
        return self._method(call).future(call.request, timeout=attempts.left_s, metadata=metadata)

    def _method(self, call: Call) -> Any:
        if call.method == "ModelInfer":
            return self._infer
        stub = self._inference if hasattr(self._inference, call.method) else self._audits
        return getattr(stub, call.method)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except grpc.FutureCancelledError:
        # The server did, and the call says so as every other does.
        raise future from None
