"""Where a client connects to, and who it says it is: address, certificates, token -> a gRPC channel and metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos.inference import open_inference_pb2 as pb
from service.version import VERSION

# A bearer token, or what returns the present one: it is asked at every call, for tokens that are replaced.
Token = str | Callable[[], str]

Metadata = tuple[tuple[str, str | bytes], ...]

# Milliseconds between attempts to connect, at first and at most: a server that starts again is found soon. gRPC's
# own are 1,000 and 120,000.
_RECONNECT_MS = (100, 5000)

_OPTIONS: list[tuple[str, str | int]] = [
    # Servers have limits; a client that has its own fails on answers that it asked for.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS[0]),
    ("grpc.min_reconnect_backoff_ms", _RECONNECT_MS[0]),
    ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS[1]),
    ("grpc.primary_user_agent", f"tenet/{VERSION}"),
]


@dataclass(frozen=True)
class Tls:
    """The PEM files of an encrypted connection.

    Attributes:
        ca: certificates of the authorities that may have signed the server's; the public ones without it.
        cert: this client's certificate, for servers that ask for one, with its key in `key`.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise ValueError(f"{missing}: expected a file, as there is a {given}, got none; give both, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            FileNotFoundError: one is not there.
            ValueError: one is no PEM file.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_pem("ca", self.ca), private_key=_pem("key", self.key),
            certificate_chain=_pem("cert", self.cert),
        )  # fmt: skip


def blocking_channel(server: str, *, tls: Tls | None) -> grpc.Channel:
    """Return a channel to HOST:PORT; it connects at the first call."""
    if tls is None:
        return grpc.insecure_channel(server, options=_OPTIONS)
    return grpc.secure_channel(server, tls.credentials(), options=_OPTIONS)


def asynchronous_channel(server: str, *, tls: Tls | None) -> grpc.aio.Channel:
    """Return a channel to HOST:PORT for the running event loop; it connects at the first call."""
    if tls is None:
        return grpc.aio.insecure_channel(server, options=_OPTIONS)
    return grpc.aio.secure_channel(server, tls.credentials(), options=_OPTIONS)


def infer_method(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    """Return ModelInfer for requests that are serialised already."""
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString
    )


def call_metadata(token: Token | None) -> Metadata | None:
    """Return the metadata that says who calls.

    Raises:
        ValueError: the token cannot travel in a header.
    """
    if token is None:
        return None
    value = token() if callable(token) else token
    if not (value and value.isascii() and value.isprintable() and " " not in value):
        # Not the value itself: it is a secret.
        raise ValueError(f"token: expected printable ASCII without spaces, got {len(value)} characters with others")
    return (("authorization", f"Bearer {value}"),)


def _pem(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {path}: expected a PEM file here, found none")
    content = path.read_bytes()
    if b"-----BEGIN " not in content:
        raise ValueError(f"{name}: {path}: expected a PEM file, with a line -----BEGIN ...-----, got another")
    return content
