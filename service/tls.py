"""PEM files -> what a gRPC server listens with, read again at each new connection.

files --read--> checked by OpenSSL --> gRPC's configuration --> connections that are made from then on
                └-- no good: logged once; what was served before is served on
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.settings import Tls

logger = logging.getLogger(__name__)


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Return credentials to listen with; they follow their files.

    Connections that are open stay as they are. gRPC gives the first configuration to the first port only, so each
    port needs credentials of its own.

    Args:
        tls: the files. With `client_ca` a client without a certificate of those authorities is not let in.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not PEM; the key is encrypted, another's, or of a kind that gRPC does not serve.
    """
    files = _Files(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.configuration,
        files.changed,  # type: ignore[arg-type]  # the stubs leave out that None stands for no change
        require_client_authentication=tls.client_ca is not None,
    )


class _Contents(NamedTuple):
    certificate: bytes
    key: bytes
    client_ca: bytes | None


class _Files:
    """What is served, and whether the files have changed since; gRPC asks in threads of its own."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._served = _read(tls)
        self._complaint: str | None = None
        self.configuration = _configuration(tls, self._served)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what new connections get from now on; None while it is the same as before.

        The contents are compared, and not times of modification: files of a few KB are read in a small part of the
        time that a handshake takes, and two changes within a clock tick are seen as well.
        """
        with self._lock:
            try:
                configuration = self._taken(_read(self._tls))
            except (OSError, ValueError) as error:
                self._complain(str(error))
                return None
            self._complaint = None
            return configuration

    def _taken(self, contents: _Contents) -> grpc.ServerCertificateConfiguration | None:
        if contents == self._served:
            return None
        configuration = _configuration(self._tls, contents)
        self._served = contents
        logger.info("%s: has changed; new connections are served with it", self._tls.certificate)
        return configuration

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.error("%s; new connections are served with the files as they were before", complaint)


def _read(tls: Tls) -> _Contents:
    client_ca = None if tls.client_ca is None else _bytes("tls.client_ca", tls.client_ca)
    return _Contents(_bytes("tls.certificate", tls.certificate), _bytes("tls.key", tls.key), client_ca)


def _bytes(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{setting}: {path}: expected a PEM file here, found none") from None
    except OSError as error:
        raise OSError(f"{setting}: {path}: expected a file that can be read: {error.strerror}") from None


def _configuration(tls: Tls, contents: _Contents) -> grpc.ServerCertificateConfiguration:
    """Check the files by OpenSSL, which says what is wrong, and hand them to gRPC, which does not.

    Raises:
        ValueError: they cannot be served.
    """
    certificate = _certificates("tls.certificate", tls.certificate, contents.certificate)
    _check_key(tls.key, contents.key)
    if tls.client_ca is not None and contents.client_ca is not None:
        _certificates("tls.client_ca", tls.client_ca, contents.client_ca)
    objection = _objection(tls, _context(tls, contents), certificate)
    if objection is not None:
        logger.warning("%s: clients will refuse it: %s; put a new certificate there", tls.certificate, objection)
    return grpc.ssl_server_certificate_configuration(
        [(contents.key, contents.certificate)], root_certificates=contents.client_ca
    )


def _certificates(setting: str, path: Path, contents: bytes) -> str:
    try:
        text = contents.decode("ascii", "ignore")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise ValueError(
            f"{setting}: {path}: expected certificates in PEM, '-----BEGIN CERTIFICATE-----', got something else"
        ) from None
    return text


def _check_key(path: Path, contents: bytes) -> None:
    if b"PRIVATE KEY-----" not in contents:
        raise ValueError(f"tls.key: {path}: expected a private key in PEM, '-----BEGIN PRIVATE KEY-----', got none")
    if b"ENCRYPTED" in contents:
        raise ValueError(
            f"tls.key: {path}: expected a key without a passphrase, got an encrypted one; "
            "decrypt it (openssl pkey -in KEY -out NEW_KEY) and let only the server's user read it"
        )


def _context(tls: Tls, contents: _Contents) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _in_memory(contents.certificate + b"\n" + contents.key) as path:
            context.load_cert_chain(path, password="")  # or it would be asked for at the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"tls.key: {tls.key}: expected the key of the first certificate in {tls.certificate}, got another's"
            ) from None
        raise ValueError(
            f"tls.key: {tls.key}: expected a key that can be served with {tls.certificate}, got: {_reason(error)}"
        ) from None
    return context


@contextmanager
def _in_memory(contents: bytes) -> Iterator[str]:
    """Give bytes a path: OpenSSL takes keys from files alone, and these are to be the very bytes that are served."""
    with os.fdopen(os.memfd_create("pem"), "wb") as file:
        file.write(contents)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _objection(tls: Tls, server: ssl.SSLContext, certificate: str) -> str | None:
    """Return what a client that trusts this very certificate has against it: that it has expired, say.

    Raises:
        ValueError: no handshake can be made with it.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = client.wrap_bio(to_client, to_server)
    answers = server.wrap_bio(to_server, to_client, server_side=True)
    try:
        # Hello; the certificate; the client's verdict.
        for end in (asks, answers, asks):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        raise ValueError(
            f"tls.certificate: {tls.certificate}: expected an RSA certificate of 2048 bits or more, or an ECDSA one of "
            f"P-256 or P-384, got one that cannot be served: {_reason(error)}"
        ) from None
    return None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
