"""The boundary between gRPC and the services: what every call passes, whichever core carries it.

    add_…_to_server --> Methods --> Boundary: bytes -> admitted? allowed? parsed --> servicer --> bytes | a status
                                                                                     (fronts serve the result)

Requests are parsed here and not by gRPC, for which bytes that are no message are an internal error.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from service.auth import authorise, role_of
from service.errors import InvalidArgument, ResourceExhausted, Unavailable, abort

if TYPE_CHECKING:
    from collections.abc import Mapping

    import grpc

    from service.auth import Authenticator
    from service.calls import Calls

    Context = grpc.aio.ServicerContext[Any, Any]

Unary = Callable[[bytes, "Context"], Awaitable[bytes]]
UnaryStream = Callable[[bytes, "Context"], AsyncIterator[bytes]]
StreamStream = Callable[[AsyncIterator[bytes], "Context"], AsyncIterator[bytes]]

# Seconds without a call after which none is taken to be on its way: many times what the event loop needs for one.
_QUIET_S = 0.05
# Seconds that callers who do not heed the health service may go on.
_LONGEST_QUIET_S = 1.0
_ENDING = "the server is shutting down; try again, or elsewhere"
# Seconds after which a caller that was one too many is asked to come again.
_TRY_AGAIN_S = 0.1


@dataclass(frozen=True)
class Method:
    """One method of a service, from bytes to bytes.

    Attributes:
        path: /package.Service/Method.
        behaviour: a `Unary`, `UnaryStream` or `StreamStream`, by the two flags.
    """

    path: str
    behaviour: Any
    request_streaming: bool
    response_streaming: bool


class Handlers:
    """What `add_…_to_server` takes for a server: keeps the handlers instead of serving them."""

    def __init__(self) -> None:
        self.by_path: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Keep the handlers of a service."""
        self.by_path |= {f"/{service_name}/{name}": handler for name, handler in method_handlers.items()}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Do nothing: the same handlers come by name, too."""


class Boundary:
    """Lets calls in, and errors out as statuses."""

    def __init__(self, authenticator: Authenticator, calls: Calls, *, max_calls: int, max_bytes: int) -> None:
        self._authenticator = authenticator
        self._told = calls
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._calls = 0
        self._bytes = 0  # of the requests that are in the server
        # Reads of streams' next requests, which end when no more are to be read.
        self._reads: set[asyncio.Task[bytes]] = set()
        self._reading = True
        self._last = 0.0  # the event loop's time at which a call came, seconds

    def around(self, path: str, handler: grpc.RpcMethodHandler[Any, Any], parse: Any) -> Method:
        """Return a method whose calls pass the boundary.

        Args:
            path: /package.Service/Method.
            handler: of coroutines, or of async generators where the response is a stream.
            parse: makes a request of bytes; raises DecodeError or `InvalidArgument`.
        """
        write = handler.response_serializer
        if not handler.response_streaming:
            assert not handler.request_streaming, f"{path}: no service here has such a method"
            behaviour: Any = self._unary(path, handler.unary_unary, parse, write)
        elif handler.request_streaming:
            behaviour = self._streaming(path, handler.stream_stream, self._parsed_one_by_one(path, parse), write)
        else:
            behaviour = self._streaming(path, handler.unary_stream, lambda data, _: _parsed(path, parse, data), write)
        return Method(path, behaviour, handler.request_streaming, handler.response_streaming)

    def end_streams(self) -> None:
        """Read no more requests of any stream: those that were read are answered, then the stream is UNAVAILABLE."""
        self._reading = False
        for read in self._reads:
            read.cancel()

    @property
    def idle_s(self) -> float:
        """Seconds since the last call came."""
        return asyncio.get_running_loop().time() - self._last

    async def quiet(self, *, before: float) -> None:
        """Return when no call has come for a moment; at the time `before`, or after a second, at the latest."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (now := loop.time()) < min(before, began + _LONGEST_QUIET_S):
            if now >= max(self._last, began) + _QUIET_S:
                return
            await asyncio.sleep(_QUIET_S / 5)

    def _unary(self, path: str, behaviour: Any, parse: Any, write: Any) -> Unary:
        assert inspect.iscoroutinefunction(behaviour), f"{path}: expected a coroutine function"
        counted = role_of(path) is not None
        time = asyncio.get_running_loop().time

        async def call(data: bytes, context: Context) -> bytes:
            self._last = time()
            self._calls += counted
            self._bytes += len(data)
            known = self._told.begin(path, context)
            try:
                self._admit(path, context, counted=counted)
                response: bytes = write(await behaviour(_parsed(path, parse, data), context))
            except Exception as error:  # noqa: BLE001 - the boundary: nothing may leave but a status
                known.fail(error)
                await abort(context, error, path)
            else:
                return response
            finally:
                self._calls -= counted
                self._bytes -= len(data)
                self._told.end(known)

        return call

    def _streaming(self, path: str, behaviour: Any, parse: Any, write: Any) -> Any:
        assert inspect.isasyncgenfunction(behaviour), f"{path}: expected an async generator function"
        counted = role_of(path) is not None
        time = asyncio.get_running_loop().time

        async def call(data: Any, context: Context) -> AsyncIterator[bytes]:
            self._last = time()
            self._calls += counted
            held = _Held()
            known = self._told.begin(path, context)
            try:
                self._admit(path, context, counted=counted)
                async with aclosing(behaviour(parse(data, held), context)) as responses:
                    async for response in responses:
                        yield write(response)
                        self._bytes -= held.answered()
            except Exception as error:  # noqa: BLE001 - as above
                known.fail(error)
                await abort(context, error, path)
            finally:
                self._calls -= counted
                self._bytes -= held.left()
                self._told.end(known)

        return call

    def _admit(self, path: str, context: Context, *, counted: bool) -> None:
        if counted and self._calls > self._max_calls:
            raise ResourceExhausted(
                f"the server has {self._max_calls} calls already; try again later, "
                "or raise server.max_concurrent_calls",
                retry_after_s=_TRY_AGAIN_S,
            )
        self._admit_bytes()
        if self._authenticator.required and counted:
            caller = self._authenticator.caller(context.invocation_metadata(), context.auth_context)
            authorise(caller, path)

    def _admit_bytes(self) -> None:
        if self._bytes > self._max_bytes:
            raise ResourceExhausted(
                f"the server's requests have {self._bytes} bytes, of {self._max_bytes} at most; try again later, "
                "or raise server.max_in_flight_mib",
                retry_after_s=_TRY_AGAIN_S,
            )

    def _parsed_one_by_one(self, path: str, parse: Any) -> Callable[[AsyncIterator[bytes], _Held], AsyncIterator[Any]]:
        async def messages(requests: AsyncIterator[bytes], held: _Held) -> AsyncIterator[Any]:
            while (data := await self._next(requests)) is not None:
                held.read(len(data))
                self._bytes += len(data)
                # A stream whose own requests are being answered has what will make room: the next stays in the
                # connection until then. One that has none would wait for others, who may never read their answers.
                while self._bytes > self._max_bytes and held.several:
                    await held.wait()
                self._admit_bytes()
                yield _parsed(path, parse, data)

        return messages

    async def _next(self, requests: AsyncIterator[bytes]) -> bytes | None:
        """Return a stream's next request, None after its last one."""
        if not self._reading:
            raise Unavailable(_ENDING)
        read = asyncio.ensure_future(anext(requests))
        self._reads.add(read)
        try:
            return await read
        except StopAsyncIteration:
            return None
        except asyncio.CancelledError:
            if self._reading:
                raise
            raise Unavailable(_ENDING) from None
        finally:
            self._reads.discard(read)
            self._last = asyncio.get_running_loop().time()


class _Held:
    """The bytes of a stream's requests that have no answer yet, oldest first: each request has one answer."""

    def __init__(self) -> None:
        self._sizes: deque[int] = deque()
        self._fewer = asyncio.Event()

    @property
    def several(self) -> bool:
        """Whether a request waits for its answer beside the last one read."""
        return len(self._sizes) > 1

    def read(self, size: int) -> None:
        """Count a request."""
        self._sizes.append(size)

    def answered(self) -> int:
        """Forget the oldest request, and return its bytes."""
        self._fewer.set()
        return self._sizes.popleft() if self._sizes else 0

    def left(self) -> int:
        """Return the bytes of all requests without an answer."""
        return sum(self._sizes)

    async def wait(self) -> None:
        """Wait until a request has its answer."""
        self._fewer.clear()
        await self._fewer.wait()


def _parsed(path: str, parse: Any, data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise InvalidArgument(
            f"{path}: expected the request's message, got {len(data)} bytes that are none; "
            "is the client's .proto file the protocol's?"
        ) from None
