"""TLS: who gets in, what they are shown, and what those who start the server are told."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from service import tls
from tests.service.certificates import Authority, Pair

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Tls

_ECHO = "/tests.Echo/Echo"

# Seconds; a call that is let in takes milliseconds.
_TIMEOUT_S = 20


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


async def _echo(request: bytes, context: object) -> bytes:
    del context
    return request


@asynccontextmanager
async def _server(*settings: Tls) -> AsyncIterator[list[int]]:
    """A server that echoes, with a port for each of these settings."""
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_echo)
    server.add_registered_method_handlers("tests.Echo", {"Echo": handler})
    ports = [server.add_secure_port("127.0.0.1:0", tls.server_credentials(each)) for each in settings]
    await server.start()
    try:
        yield ports
    finally:
        await server.stop(None)


def _connected(port: int, *, trusted: Authority | None, pair: Pair | None = None) -> grpc.aio.Channel:
    """A client with a connection of its own; `trusted` None: without TLS."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if trusted is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
    shown = (None, None) if pair is None else (pair.key, pair.certificate)
    credentials = grpc.ssl_channel_credentials(trusted.certificate, *shown)
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options)


async def _call(channel: grpc.aio.Channel) -> bytes:
    call: Callable[..., grpc.aio.UnaryUnaryCall[bytes, bytes]] = channel.unary_unary(_ECHO)
    return await call(b"hello", timeout=_TIMEOUT_S)


async def _answer(port: int, *, trusted: Authority | None, pair: Pair | None = None) -> bytes:
    async with _connected(port, trusted=trusted, pair=pair) as channel:
        return await _call(channel)


async def _refusal(port: int, *, trusted: Authority | None, pair: Pair | None = None) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _answer(port, trusted=trusted, pair=pair)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    return refused.value.details() or ""


async def _shown(port: int) -> str:
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))


async def test_clients_who_trust_the_authority_are_served_and_others_turn_away(
    authority: Authority, tmp_path: Path
) -> None:
    async with _server(authority.server().write(tmp_path)) as [port]:
        assert await _answer(port, trusted=authority) == b"hello"
        assert "CERTIFICATE_VERIFY_FAILED" in await _refusal(port, trusted=Authority())


async def test_a_client_without_tls_is_refused_and_one_with_tls_sees_that_a_server_has_none(
    authority: Authority, tmp_path: Path
) -> None:
    async with _server(authority.server().write(tmp_path)) as [port]:
        assert "Socket closed" in await _refusal(port, trusted=None)
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert "WRONG_VERSION_NUMBER" in await _refusal(port, trusted=authority)
    finally:
        await server.stop(None)


async def test_with_client_ca_only_certificates_of_its_authorities_get_in(authority: Authority, tmp_path: Path) -> None:
    async with _server(authority.server().write(tmp_path, client_ca=authority.certificate)) as [port]:
        assert await _answer(port, trusted=authority, pair=authority.client("a camera")) == b"hello"
        await _refusal(port, trusted=authority)
        await _refusal(port, trusted=authority, pair=Authority().client("a camera"))


async def test_a_new_certificate_is_shown_to_new_clients_and_open_connections_go_on(
    authority: Authority, tmp_path: Path
) -> None:
    old, successor = authority.server(), Authority()
    async with (
        _server(old.write(tmp_path)) as [port],
        _connected(port, trusted=authority) as connected,
    ):
        assert await _call(connected) == b"hello"
        assert (await _shown(port)).encode() == old.certificate
        new = successor.server()
        new.write(tmp_path)
        assert await _answer(port, trusted=successor) == b"hello"
        assert (await _shown(port)).encode() == new.certificate
        assert "CERTIFICATE_VERIFY_FAILED" in await _refusal(port, trusted=authority)
        assert await _call(connected) == b"hello"


async def test_the_old_certificate_can_be_put_back(authority: Authority, tmp_path: Path) -> None:
    old, new = authority.server(), authority.server()
    async with _server(old.write(tmp_path)) as [port]:
        for pair in (new, old, new):
            pair.write(tmp_path)
            assert (await _shown(port)).encode() == pair.certificate


async def test_new_authorities_of_clients_count_for_new_clients(authority: Authority, tmp_path: Path) -> None:
    server, successor = authority.server(), Authority()
    before, after = authority.client("a camera"), successor.client("a camera")
    async with _server(server.write(tmp_path, client_ca=authority.certificate)) as [port]:
        await _refusal(port, trusted=authority, pair=after)
        server.write(tmp_path, client_ca=successor.certificate)
        assert await _answer(port, trusted=authority, pair=after) == b"hello"
        await _refusal(port, trusted=authority, pair=before)


async def test_each_port_follows_its_files(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path)
    async with _server(settings, settings) as ports:
        successor = Authority()
        successor.server().write(tmp_path)
        assert [await _answer(port, trusted=successor) for port in ports] == [b"hello", b"hello"]


async def test_files_that_cannot_be_served_are_logged_once_and_the_ones_before_are_served(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = authority.server()
    settings = old.write(tmp_path)
    async with _server(settings) as [port]:
        settings.certificate.write_bytes(authority.server().certificate)
        assert [await _answer(port, trusted=authority) for _ in range(3)] == [b"hello"] * 3
        assert (await _shown(port)).encode() == old.certificate
        [record] = caplog.records
        assert record.levelno == logging.ERROR
        assert f"tls.key: {settings.key}: expected the key of the first certificate in" in record.getMessage()

        settings.key.unlink()
        assert [await _answer(port, trusted=authority) for _ in range(3)] == [b"hello"] * 3
        [_, record] = caplog.records
        assert f"tls.key: {settings.key}: expected a PEM file here, found none" in record.getMessage()

        mended = Authority()
        mended.server().write(tmp_path)
        assert await _answer(port, trusted=mended) == b"hello"


async def test_a_mistake_that_was_mended_and_is_made_again_is_logged_again(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, other = authority.server(), authority.server()
    settings = old.write(tmp_path)
    async with _server(settings) as [port]:
        for certificate in (other.certificate, old.certificate, other.certificate):
            settings.certificate.write_bytes(certificate)
            assert await _answer(port, trusted=authority) == b"hello"
    assert len(caplog.records) == 2


async def test_a_key_in_the_older_form_of_pem_is_served(authority: Authority, tmp_path: Path) -> None:
    async with _server(authority.server(traditional=True).write(tmp_path)) as [port]:
        assert await _answer(port, trusted=authority) == b"hello"


async def test_what_stands_around_a_certificate_is_no_matter(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path)
    settings.certificate.write_bytes("subject: Müller\n".encode() + settings.certificate.read_bytes())
    async with _server(settings) as [port]:
        assert await _answer(port, trusted=authority) == b"hello"


async def test_a_certificate_whose_time_is_over_is_warned_of(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = authority.server(ended=True).write(tmp_path)
    async with _server(settings) as [port]:
        assert "CERTIFICATE_VERIFY_FAILED" in await _refusal(port, trusted=authority)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{settings.certificate}: clients will refuse it: certificate has expired;")


def test_a_good_certificate_is_not_warned_of(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls.server_credentials(authority.server().write(tmp_path, client_ca=authority.certificate))
    assert not caplog.records


@pytest.mark.parametrize(("file", "setting"), [("server.pem", "certificate"), ("server.key", "key")])
def test_a_missing_file_is_named(file: str, setting: str, authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError) as missing:
        tls.server_credentials(settings)
    assert str(missing.value) == f"tls.{setting}: {tmp_path / file}: expected a PEM file here, found none"


def test_a_folder_in_the_place_of_a_file_is_named(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path)
    settings.key.unlink()
    settings.key.mkdir()
    with pytest.raises(OSError, match=r"^tls\.key: .*server\.key: expected a file that can be read: Is a directory$"):
        tls.server_credentials(settings)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("server.pem", b"", r"tls\.certificate: .*server\.pem: expected certificates in PEM"),
        ("server.pem", b"\x30\x82\x01\x00\xff", r"tls\.certificate: .*server\.pem: expected certificates in PEM"),
        (
            "server.pem",
            b"-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n",
            r"tls\.certificate: .*server\.pem: expected certificates in PEM",
        ),
        ("clients.pem", b"hello", r"tls\.client_ca: .*clients\.pem: expected certificates in PEM"),
        ("server.key", b"", r"tls\.key: .*server\.key: expected a private key in PEM"),
        (
            "server.key",
            b"-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n",
            r"tls\.key: .*server\.key: expected a key that can be served with .*server\.pem, got: ",
        ),
    ],
)
def test_a_file_that_is_not_pem_is_named(
    file: str, contents: bytes, message: str, authority: Authority, tmp_path: Path
) -> None:
    settings = authority.server().write(tmp_path, client_ca=authority.certificate)
    (tmp_path / file).write_bytes(contents)
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        tls.server_credentials(settings)
    assert "\n" not in str(refused.value)


def test_a_key_of_another_certificate_is_an_error(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path)
    settings.key.write_bytes(authority.server().key)
    with pytest.raises(
        ValueError, match=r"^tls\.key: .*: expected the key of the first certificate in .*, got another"
    ):
        tls.server_credentials(settings)


def test_a_key_of_a_kind_that_grpc_does_not_serve_is_an_error(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server(curve=ec.SECP224R1()).write(tmp_path)
    with pytest.raises(
        ValueError, match=r"^tls\.certificate: .*: expected an RSA certificate of 2048 bits or more, or "
    ):
        tls.server_credentials(settings)


@pytest.mark.parametrize("traditional", [False, True], ids=["ENCRYPTED PRIVATE KEY", "EC PRIVATE KEY"])
def test_an_encrypted_key_is_an_error_that_says_how_to_decrypt_it(
    traditional: bool,  # noqa: FBT001 - pytest's
    authority: Authority,
    tmp_path: Path,
) -> None:
    settings = authority.server(passphrase=b"secret", traditional=traditional).write(tmp_path)
    with pytest.raises(ValueError, match=r"^tls\.key: .*got an encrypted one; decrypt it \(openssl pkey "):
        tls.server_credentials(settings)
