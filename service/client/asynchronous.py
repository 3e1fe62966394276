"""The client for programs with an event loop: operations --calls, several in flight--> a grpc.aio channel."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing, asynccontextmanager
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
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
    from types import TracebackType
    from typing import Self

    from export.engines.base import Images, Logits, Stored
    from protos.inference.model_config_pb2 import ModelConfig
    from service.client.connection import Tls, Token
    from service.client.description import IndexEntry, ModelMetadata, ModelStatistics, Prediction, ServerMetadata
    from service.client.encoding import RequestOptions
    from service.client.operations import Calls, Result, Steps, Version
    from service.client.retries import Retries


class AsyncClient:
    """A connection to one server, for one event loop; use it in an `async with` block.

    The methods are those of `Client`, where they are described; they raise the same errors. A call whose task is
    cancelled is cancelled on the server, too.
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
        """Connect at the first call; the arguments are those of `Client`."""
        self._server = server
        self._timeout = timeout
        self._token = token
        self._retries = retries
        self._generator = np.random.default_rng()
        self._operations = Operations()
        self._channel = connection.asynchronous_channel(server, tls=tls)
        self._inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._infer = connection.infer_method(self._channel)
        self._audits = audit_pb2_grpc.AuditServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight fail."""
        await self._channel.close()

    async def ready(self, model: str | None = None, *, version: Version = None) -> bool:
        """Do what `Client.ready` does."""
        return await self._run(self._operations.ready(model, version=version))

    async def server_metadata(self) -> ServerMetadata:
        """Do what `Client.server_metadata` does."""
        return await self._run(self._operations.server_metadata())

    async def metadata(self, model: str, *, version: Version = None) -> ModelMetadata:
        """Do what `Client.metadata` does."""
        return await self._run(self._operations.metadata(model, version=version))

    async def config(self, model: str, *, version: Version = None) -> ModelConfig:
        """Do what `Client.config` does."""
        return await self._run(self._operations.config(model, version=version))

    async def statistics(self, model: str = "", *, version: Version = None) -> list[ModelStatistics]:
        """Do what `Client.statistics` does."""
        return await self._run(self._operations.statistics(model, version=version))

    async def index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Do what `Client.index` does."""
        return await self._run(self._operations.index(ready=ready))

    async def load(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Do what `Client.load` does."""
        await self._run(self._operations.load(model, timeout_s=timeout_s))

    async def unload(self, model: str, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Do what `Client.unload` does."""
        await self._run(self._operations.unload(model, timeout_s=timeout_s))

    async def infer(
        self,
        images: Images | Stored,
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = 1,
    ) -> Logits:
        """Do what `Client.infer` does."""
        return await self._run(
            self._operations.infer(
                images, model=model, version=version, batch=batch, options=options, in_flight=in_flight
            )
        )

    async def infer_many(
        self,
        batches: Iterable[Images | Stored],
        *,
        model: str,
        version: Version = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> AsyncIterator[Logits]:
        """Do what `Client.infer_many` does."""
        described = await self.metadata(model, version=version)
        calls = (operations.batch_call(each, described, version=version, options=options) for each in batches)
        async with aclosing(self._in_order(calls, in_flight=in_flight)) as responses:
            async for response in responses:
                yield encoding.logits_of(response)

    async def infer_encoded(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
        in_flight: int = DEFAULT_IN_FLIGHT,
    ) -> Logits:
        """Do what `Client.infer_encoded` does."""
        return await self._run(
            self._operations.infer_encoded(
                images, model=model, version=version, batch=batch, options=options, in_flight=in_flight
            )
        )

    async def classify(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version = None,
        top: int = 1,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> list[list[Prediction]]:
        """Do what `Client.classify` does."""
        return await self._run(
            self._operations.classify(
                images, model=model, version=version, top=top, options=options, in_flight=DEFAULT_IN_FLIGHT
            )
        )

    @asynccontextmanager
    async def shared_memory(
        self,
        *,
        model: str,
        version: Version = None,
        batch: int | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> AsyncIterator[Callable[[Images | Stored], Coroutine[Any, Any, Logits]]]:
        """Do what `Client.shared_memory` does."""
        lane = Lane(self._operations, model=model, version=version, batch=batch, options=options)
        await self._run(lane.open())
        try:
            yield lambda images: self._run(lane.infer(images))
        finally:
            await self._run(lane.close())

    async def submit_audit(self, plan: str) -> audit_pb2.Audit:
        """Do what `Client.submit_audit` does."""
        return await self._run(self._operations.submit_audit(plan))

    async def audit(self, audit_id: str) -> audit_pb2.Audit:
        """Do what `Client.audit` does."""
        return await self._run(self._operations.audit(audit_id))

    async def audits(self, *, limit: int) -> list[audit_pb2.Audit]:
        """Do what `Client.audits` does."""
        return await self._run(self._operations.audits(limit=limit))

    async def watch_audit(self, audit_id: str, *, offset: int = 0) -> AsyncIterator[audit_pb2.AuditProgress]:
        """Do what `Client.watch_audit` does."""
        request = audit_pb2.WatchAuditRequest(id=audit_id, offset=offset)
        try:
            # No deadline: an audit takes what it takes.
            async for event in self._audits.WatchAudit(request, metadata=connection.call_metadata(self._token)):
                yield event
        except grpc.RpcError as error:
            failure = failures.failure_of(error)
            raise failures.as_error(failure, server=self._server, timeout_s=self._timeout) from error

    async def cancel_audit(self, audit_id: str) -> audit_pb2.Audit:
        """Do what `Client.cancel_audit` does."""
        return await self._run(self._operations.cancel_audit(audit_id))

    async def audit_report(self, audit_id: str, *, html: bool = False) -> bytes:
        """Do what `Client.audit_report` does."""
        return await self._run(self._operations.audit_report(audit_id, html=html))

    async def _run(self, steps: Steps[Result]) -> Result:
        """Make an operation's calls, and return what it returns."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._answer(step)
                except ServiceError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as finished:
            result: Result = finished.value
            return result
        finally:
            steps.close()

    async def _answer(self, step: Call | Calls) -> Any:
        if isinstance(step, Call):
            return await self._finish(step)
        return [response async for response in self._in_order(step.calls, in_flight=step.in_flight)]

    async def _in_order(self, calls: Iterable[Call], *, in_flight: int) -> AsyncGenerator[Any]:
        """Yield the responses of calls in their order, while so many are on their way."""
        operations.check_in_flight(in_flight)
        begun: deque[asyncio.Task[Any]] = deque()
        try:
            for call in calls:
                begun.append(asyncio.create_task(self._finish(call)))
                if len(begun) == in_flight:
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            # So that no failure of theirs is reported as one that nobody asked for.
            await asyncio.gather(*begun, return_exceptions=True)

    async def _finish(self, call: Call) -> Any:
        """Return the response of the first attempt that succeeds."""
        attempts = Attempts(
            self._retries,
            server=self._server,
            timeout_s=self._timeout if call.timeout_s is None else call.timeout_s,
            repeatable=call.repeatable,
            generator=self._generator,
        )
        while True:
            metadata = connection.call_metadata(self._token)
            try:
                return await self._method(call)(call.request, timeout=attempts.left_s, metadata=metadata)
            except grpc.RpcError as error:
                wait = attempts.wait_s(error)
            await asyncio.sleep(wait)

    def _method(self, call: Call) -> Any:
        if call.method == "ModelInfer":
            return self._infer
        stub = self._inference if hasattr(self._inference, call.method) else self._audits
        return getattr(stub, call.method)
