"""How a server runs: one TOML file -> one frozen value; every key has a default, so that no file is a server too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from export.engines.places import ordinal_of, placed
from service.decoding import decode, read_text

_LAST_PORT = 65535


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Server(_Table):
    """The table `[server]`: where to listen, and how to end."""

    # Only this machine, until somebody says otherwise: there is no authentication yet.
    host: str = Field(default="127.0.0.1", min_length=1)
    # 0 takes a free one. 8001 is where the field's clients look for gRPC.
    port: int = Field(default=8001, ge=0, le=_LAST_PORT)
    # MiB a request or response may have; 64 holds 64 float32 images of 3 x 224 x 224 with room to spare.
    max_message_mib: int = Field(default=64, ge=1, le=2047)
    # Seconds that calls in flight may take to finish once the server has been told to stop.
    shutdown_grace_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)


class Batching(_Table):
    """The table `[batching]`: how the requests for one model share calls of its engine."""

    # Images a call of the engine, and so a request, may have; never above the manifest's own, the default.
    max_batch_size: int | None = Field(default=None, ge=1)
    # Requests that may wait for one model; the next is refused at once.
    max_queue_size: int = Field(default=1024, ge=1)
    # Milliseconds that a batch waits to be filled. 0 is greedy: whatever waits when the engine is free.
    max_queue_delay_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)


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


class Settings(_Table):
    """All settings of a server."""

    server: Server = Server()
    batching: Batching = Batching()
    engine: Engine = Engine()

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


def read(path: Path) -> Settings:
    """Read settings.

    Raises:
        FileNotFoundError: no file there.
        ValueError: not settings; one line a mistake, with the key's path.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a settings file here, found none")
    return decode(read_text(path), Settings, source=str(path))
