"""Certificates for tests, made when they are needed: an authority signs servers' and clients'."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Tls


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, *, client_ca: bytes | None = None) -> Tls:
        """Write the files of a server, over what is there, and return their settings."""
        from service.settings import Tls

        (folder / "server.pem").write_bytes(self.certificate)
        (folder / "server.key").write_bytes(self.key)
        if client_ca is not None:
            (folder / "clients.pem").write_bytes(client_ca)
        return Tls(
            certificate=folder / "server.pem",
            key=folder / "server.key",
            client_ca=None if client_ca is None else folder / "clients.pem",
        )


class Authority:
    """Signs certificates.

    Attributes:
        certificate: its own, in PEM: what those have who trust it.
    """

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        # Of two authorities with one name, clients would find a bad signature where others find a stranger.
        self._name = _named(f"tests {x509.random_serial_number()}")
        certificate = _unsigned(self._name, self._key.public_key(), ca=True).issuer_name(self._name)
        self.certificate = certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(
        self,
        *,
        ended: bool = False,
        passphrase: bytes | None = None,
        traditional: bool = False,
        curve: ec.EllipticCurve | None = None,
    ) -> Pair:
        """Sign the certificate of a server on this machine.

        Args:
            ended: whether its time is over.
            passphrase: encrypts the key.
            traditional: whether the key has the older form of PEM, "EC PRIVATE KEY".
            curve: the key's; P-256 by default.
        """
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self._issue("a server", names, ended=ended, passphrase=passphrase, traditional=traditional, curve=curve)

    def client(self, common_name: str, *, dns: tuple[str, ...] = (), uris: tuple[str, ...] = ()) -> Pair:
        """Sign the certificate of a client."""
        names = [*map(x509.DNSName, dns), *map(x509.UniformResourceIdentifier, uris)]
        return self._issue(common_name, names)

    def _issue(
        self,
        common_name: str,
        names: list[x509.GeneralName],
        *,
        ended: bool = False,
        passphrase: bytes | None = None,
        traditional: bool = False,
        curve: ec.EllipticCurve | None = None,
    ) -> Pair:
        key = ec.generate_private_key(curve or ec.SECP256R1())
        certificate = _unsigned(_named(common_name), key.public_key(), ca=False, ended=ended).issuer_name(self._name)
        if names:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(names), critical=False)
        form = serialization.PrivateFormat.TraditionalOpenSSL if traditional else serialization.PrivateFormat.PKCS8
        return Pair(
            certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, form, _encryption(passphrase)),
        )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _unsigned(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool, ended: bool = False
) -> x509.CertificateBuilder:
    end = datetime.now(UTC) + timedelta(hours=-1 if ended else 1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )


def _encryption(passphrase: bytes | None) -> serialization.KeySerializationEncryption:
    if passphrase is None:
        return serialization.NoEncryption()
    return serialization.BestAvailableEncryption(passphrase)
