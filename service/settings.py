"""How a server runs: one TOML file, and the environment over it -> one frozen value.

Every key has a default, so that no file is a server too.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from export.engines.places import ordinal_of, placed
from service.decoding import checked, parsed, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAST_PORT = 65535

# What variables of the environment that are settings begin with, and what stands between the parts of a key's path.
_PREFIX = "TENET_"
_SEPARATOR = "__"

Role = Literal["predict", "audit", "admin"]
_File = Annotated[Path, Field(strict=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Server(_Table):
    """The table `[server]`: where to listen, how much to take at once, and how to end."""

    # Only this machine, until somebody says otherwise: without `[auth]` whoever reaches the port is served.
    host: str = Field(default="127.0.0.1", min_length=1)
    # 0 takes a free one. 8001 is where the field's clients look for gRPC.
    port: int = Field(default=8001, ge=0, le=_LAST_PORT)
    # Where the repository, logging, tracing and audit services are served instead of on `port`; 0 takes a free one.
    admin_port: int | None = Field(default=None, ge=0, le=_LAST_PORT)
    # The gRPC core: Python's own, or the faster and younger one of `pip install tenet[native]`, which has no TLS.
    front: Literal["grpc", "native"] = "grpc"
    # Processes that share the port, each with engines of its own; above 1 the kernel spreads connections among them.
    processes: int = Field(default=1, ge=1, le=64)
    # MiB a request or response may have; 64 holds 64 float32 images of 3 x 224 x 224 with room to spare.
    max_message_mib: int = Field(default=64, ge=1, le=2047)
    # Calls that may be in the server at once, streams among them; the next is refused at once.
    max_concurrent_calls: int = Field(default=4096, ge=1)
    # MiB that the requests in the server may have together; the next is refused at once, or waits in its stream.
    max_in_flight_mib: int = Field(default=1024, ge=1)
    # Connections that may be open at once; the next is closed at once. No limit by default.
    max_connections: int | None = Field(default=None, ge=1)
    # Calls that one connection may have open at once; more wait in the client.
    max_calls_per_connection: int = Field(default=1024, ge=1)
    # Seconds after which a connection is asked to close and open anew, so that new servers get their share; no limit
    # by default.
    max_connection_age_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # Seconds that the server goes on serving once it has said that it will end, so that load balancers can turn away.
    drain_delay_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    # Seconds that calls in flight may take to finish after that.
    shutdown_grace_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)


class Tls(_Table):
    """The table `[tls]`: PEM files, read again when they change; without it connections are not encrypted."""

    certificate: _File
    key: _File
    # Certificates of the authorities that sign clients' certificates; with them every client must show one.
    client_ca: _File | None = None


class Token(_Table):
    """One of `[[auth.tokens]]`: who sends `authorization: Bearer ...` with a token of this hash."""

    # Who it is, in logs.
    name: str = Field(min_length=1)
    # sha256 of the token, in hexadecimal: `printf %s TOKEN | sha256sum`.
    sha256: str
    roles: tuple[Role, ...] = Field(strict=False)

    @field_validator("sha256")
    @classmethod
    def _a_hash(cls, sha256: str) -> str:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            # Without what was given, which may be the token itself.
            raise ValueError(
                "expected 64 hexadecimal digits, letters in lower case, got something else; "
                "`printf %s TOKEN | sha256sum` prints them"
            )
        return sha256


class ClientCertificate(_Table):
    """One of `[[auth.certificates]]`: who shows a certificate with this name."""

    # A DNS name or URI of its subject's alternative names, or its common name where it has none.
    name: str = Field(min_length=1)
    roles: tuple[Role, ...] = Field(strict=False)


class Auth(_Table):
    """The table `[auth]`: who may do what; without it everybody may do everything.

    `predict`: inference, metadata and statistics; `audit`: the audit service; `admin`: everything. Whether the server
    is live and ready, its health and reflection are told to everybody.
    """

    tokens: tuple[Token, ...] = Field(default=(), strict=False)
    certificates: tuple[ClientCertificate, ...] = Field(default=(), strict=False)
    # What callers may do who show neither.
    anonymous: tuple[Role, ...] = Field(default=(), strict=False)

    @property
    def required(self) -> bool:
        """Whether anybody is asked who they are."""
        return bool(self.tokens or self.certificates or "admin" not in self.anonymous)


class Batching(_Table):
    """The table `[batching]`: how the requests for one model share calls of its engine."""

    # Images a call of the engine, and so a request, may have; never above the manifest's own, the default.
    max_batch_size: int | None = Field(default=None, ge=1)
    # Sizes at which a batch that waits for more (`max_queue_delay_ms`) is closed early.
    preferred_batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    # Milliseconds that a batch waits to be filled. 0 is greedy: whatever waits when the engine is free.
    max_queue_delay_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    # Requests that may wait for one version, each of its priority levels counted for itself; the next is refused.
    max_queue_size: int = Field(default=1024, ge=1)
    # Priorities 1 (first) to this one; requests without, or with 0, get the default one: the last unless it is set.
    priority_levels: int = Field(default=1, ge=1, le=100)
    default_priority: int | None = Field(default=None, ge=1)
    # Milliseconds that a request may wait in the queue; without it, for ever.
    default_timeout_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    # Whether a request's own `timeout` may be shorter or longer than that.
    allow_timeout_override: bool = True
    # The status of a full queue: RESOURCE_EXHAUSTED says what it is; UNAVAILABLE is what Triton answers.
    full_queue: Literal["RESOURCE_EXHAUSTED", "UNAVAILABLE"] = "RESOURCE_EXHAUSTED"

    @model_validator(mode="after")
    def _priorities(self) -> Batching:
        if self.default_priority is not None and self.default_priority > self.priority_levels:
            raise ValueError(
                f"default_priority: expected 1 to priority_levels = {self.priority_levels}, got {self.default_priority}"
            )
        return self

    @property
    def usual_priority(self) -> int:
        """The priority of requests that name none."""
        return self.default_priority or self.priority_levels


class Models(_Table):
    """The table `[models]`: which models and versions are served, and when the repository is looked at again."""

    # none: as it is at the start. poll: again and again. explicit: what `load` names, and what clients load and unload.
    mode: Literal["none", "poll", "explicit"] = "none"
    poll_interval_s: float = Field(default=5.0, ge=0.1, allow_inf_nan=False)
    # Models to load at the start in the mode `explicit`; "*" loads all.
    load: tuple[str, ...] = Field(default=(), strict=False)
    # Which versions of a model: every servable one, the newest ones, or those that aliases point at.
    versions: Literal["all", "latest", "aliased"] = "all"
    # How many, where the newest ones are served.
    latest: int = Field(default=1, ge=1)
    # The alias that answers where no version is named; the newest version that is ready without one.
    default_alias: str | None = None
    # Batch sizes that are run before a version is served: every one, powers of two and the largest, or only one.
    warm_up: Literal["all", "powers", "one"] = "all"


class Images(_Table):
    """The table `[images]`: limits of images that are sent encoded (JPEG, PNG, WebP)."""

    # MiB that one encoded image may have.
    max_mib: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    # Pixels that one image may have once it is decoded, which takes up to 16 bytes each in each thread (WebP).
    max_pixels: int = Field(default=40_000_000, ge=1)
    # Threads that decode.
    threads: int = Field(default=2, ge=1)


class Cache(_Table):
    """The table `[cache]`: answers that are kept and given again to the same bytes."""

    enabled: bool = False
    # MiB that one version's answers may take.
    max_mib: float = Field(default=64.0, gt=0, allow_inf_nan=False)


class SharedMemory(_Table):
    """The table `[shared_memory]`: tensors in system shared memory, for clients on this machine."""

    enabled: bool = False


class Metrics(_Table):
    """The table `[metrics]`: Prometheus's page, http://host:port/metrics; none without a port."""

    host: str = Field(default="127.0.0.1", min_length=1)
    # 0 takes a free one. Triton's is 8002.
    port: int | None = Field(default=None, ge=0, le=_LAST_PORT)


class Tracing(_Table):
    """The table `[tracing]`: OpenTelemetry traces, of `pip install tenet[tracing]`; none without an endpoint."""

    # Where an OpenTelemetry collector takes OTLP by gRPC: http://host:4317.
    endpoint: str | None = None
    # The share of calls that are traced where the caller has not decided.
    sample_ratio: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)


class Logging(_Table):
    """The table `[logging]`: what the server says on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    # Lines for people, or a JSON object a line.
    form: Literal["text", "json"] = "text"
    # Whether each call is logged, with its request id, model, status and time.
    calls: bool = False


class Engine(_Table):
    """The table `[engine]`: where engines run."""

    # "cpu", "cuda", or "cuda:N" for GPU N counted from 0. Without it ONNX files run on the CPU, plans on the first GPU.
    device: str | None = None
    # What runs ONNX files: the device's own by default. TensorRT, as a provider, builds its engines at the start.
    provider: Literal["cpu", "cuda", "tensorrt", "nv_tensorrt_rtx"] | None = None
    # CPU threads that one call of an engine may use; without it, the process's share of the CPUs divided by instances.
    threads: int | None = Field(default=None, ge=1)
    # Copies of each engine: calls that run at once.
    instances: int = Field(default=1, ge=1)
    # Whether a plan that was made for another machine is built again from the ONNX file beside it, at the start.
    rebuild: Literal["never", "auto"] = "never"
    # Where rebuilt plans, and engines of TensorRT providers, are kept; ~/.cache/tenet/engines without it.
    cache: Annotated[Path, Field(strict=False)] | None = None

    @field_validator("device")
    @classmethod
    def _a_device(cls, device: str | None) -> str | None:
        if device is not None:
            ordinal_of(device)
        return device

    @model_validator(mode="after")
    def _placed(self) -> Engine:
        placed(device=self.device, provider=self.provider)
        return self


class PerModel(_Table):
    """One of `[model.NAME]`: tables that replace the general ones for one model, whole."""

    batching: Batching | None = None
    engine: Engine | None = None
    cache: Cache | None = None


class Settings(_Table):
    """All settings of a server."""

    server: Server = Server()
    tls: Tls | None = None
    auth: Auth | None = None
    models: Models = Models()
    batching: Batching = Batching()
    engine: Engine = Engine()
    images: Images = Images()
    cache: Cache = Cache()
    shared_memory: SharedMemory = SharedMemory()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
    logging: Logging = Logging()
    # What differs for one model: [model.NAME.batching], [model.NAME.engine], [model.NAME.cache].
    model: dict[str, PerModel] = {}

    @model_validator(mode="after")
    def _certificates(self) -> Settings:
        if self.auth and self.auth.certificates and not (self.tls and self.tls.client_ca):
            raise ValueError("auth.certificates: expected tls.client_ca, without which no client shows a certificate")
        return self

    @model_validator(mode="after")
    def _native(self) -> Settings:
        where = self.server
        if where.front == "native" and (self.tls or where.max_connection_age_s or where.max_connections):
            raise ValueError(
                'server.front: expected "grpc" with [tls], max_connections or max_connection_age_s, got "native", '
                "which has none of them; remove one"
            )
        return self

    def of(self, model: str) -> Settings:
        """Return these settings with what differs for one model."""
        differing = self.model.get(model, PerModel())
        tables = {name: getattr(differing, name) for name in ("batching", "engine", "cache")}
        return self.model_copy(update={name: table for name, table in tables.items() if table is not None})

    def for_process(self, index: int) -> Settings:
        """Return the settings of one of a server's processes: each has a page of metrics on a port of its own."""
        if not self.metrics.port:
            return self
        metrics = self.metrics.model_copy(update={"port": self.metrics.port + index})
        return self.model_copy(update={"metrics": metrics})

    def listening(self, *, host: str | None = None, port: int | None = None) -> Settings:
        """Return these settings with another address; None keeps what is there.

        Raises:
            ValueError: the port is none.
        """
        if port is not None and not 0 <= port <= _LAST_PORT:
            raise ValueError(f"port {port}: expected 0 to {_LAST_PORT}; 0 takes a free one")
        given = {key: value for key, value in {"host": host, "port": port}.items() if value is not None}
        server = Server.model_validate(self.server.model_dump() | given)
        return self.model_copy(update={"server": server})


def read(path: Path | None = None, *, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read settings: the file, if there is one, and over it variables of the environment.

    `TENET_SERVER__PORT=9000` is `[server] port`: `TENET_`, then the key's path with two underscores between its parts,
    in capitals or not; the name of a model is as it is. Values are TOML; what is no TOML is a string.

    Args:
        path: of a TOML file; None is none.
        environment: variables; those that begin otherwise, or have no two underscores, are not settings.

    Raises:
        FileNotFoundError: no file there.
        ValueError: not settings; one line a mistake, with the key's path.
    """
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path}: expected a settings file here, found none")
    document = {} if path is None else parsed(read_text(path), source=str(path))
    names = [name for name in environment if name.startswith(_PREFIX) and _SEPARATOR in name]
    for name in sorted(names):
        _overlay(document, name, environment[name])
    sources = [*([str(path)] if path else []), *(["environment"] if names else [])]
    return checked(document, Settings, source=" + ".join(sources) or "settings", unquoted="auth")


def _overlay(document: dict[str, Any], name: str, value: str) -> None:
    written = name.removeprefix(_PREFIX).split(_SEPARATOR)
    lowered = [part.lower() for part in written]
    if lowered[0] == "model":
        lowered[1] = written[1]
    *tables, key = lowered
    for table in tables:
        document = document.setdefault(table, {})
        if not isinstance(document, dict):
            raise ValueError(f"{name}: expected the path of a setting, such as TENET_SERVER__PORT; {table} is no table")
    try:
        given = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        given = {"value": value}
    if given.keys() != {"value"}:
        raise ValueError(f"{name}: expected one TOML value, got others in further lines; give each key a variable")
    document[key] = given["value"]
