"""Who a caller is, and which role each method needs.

metadata: a bearer token --┐
TLS: a client certificate -+--Authenticator--> Caller(name, roles) --authorise(method)--> served | a status
neither ------------------┘
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from typing import TYPE_CHECKING

from service.errors import PermissionDenied, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from service.settings import Auth, Role, Settings

    # What gRPC knows of a connection's other end: properties and their values, the names of its certificate among them.
    AuthContext = Mapping[str, Iterable[bytes]]

_ALL_ROLES: frozenset[Role] = frozenset({"predict", "audit", "admin"})

# The role that each method needs; None: everybody is answered, because load balancers and kubelets ask without a
# token, and command-line clients look the methods up before they send one. A method that is not here needs `admin`.
_ROLES: dict[str, dict[Role | None, tuple[str, ...]]] = {
    "inference.GRPCInferenceService": {
        None: ("ServerLive", "ServerReady", "ModelReady"),
        "predict": (
            "ServerMetadata",
            "ModelMetadata",
            "ModelConfig",
            "ModelStatistics",
            "ModelInfer",
            "ModelStreamInfer",
            "RepositoryIndex",
            # Regions are how a caller on this machine hands its tensors over, each under a name that it chooses.
            "SystemSharedMemoryStatus",
            "SystemSharedMemoryRegister",
            "SystemSharedMemoryUnregister",
            "CudaSharedMemoryStatus",
            "CudaSharedMemoryRegister",
            "CudaSharedMemoryUnregister",
        ),
        # The last two read as well as set, and what they read are the server's own affairs.
        "admin": ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"),
    },
    "inference.model_repository.ModelRepositoryService": {
        "predict": ("RepositoryIndex",),
        "admin": ("RepositoryModelLoad", "RepositoryModelUnload"),
    },
    "tenet.audit.v1.AuditService": {
        "audit": ("SubmitAudit", "GetAudit", "ListAudits", "WatchAudit", "CancelAudit", "GetReport"),
    },
    "grpc.health.v1.Health": {None: ("Check", "List", "Watch")},
    "grpc.reflection.v1.ServerReflection": {None: ("ServerReflectionInfo",)},
    "grpc.reflection.v1alpha.ServerReflection": {None: ("ServerReflectionInfo",)},
}
_ROLE_OF: dict[str, Role | None] = {
    f"/{service}/{name}": role for service, roles in _ROLES.items() for role, names in roles.items() for name in names
}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: that of its token or certificate in the settings; for logs.
        roles: what it may do.
        known: whether it has shown a token or a certificate.
    """

    name: str
    roles: frozenset[Role]
    known: bool = True


class Authenticator:
    """Tells who a caller is by what it shows.

    Raises:
        ValueError: two tokens are the same, or two certificates have one name.
    """

    def __init__(self, auth: Auth | None) -> None:
        # Whether anybody is asked who they are.
        self.required = auth is not None and auth.required
        roles: Iterable[Role] = _ALL_ROLES if auth is None else auth.anonymous
        self._anonymous = Caller("anonymous", _implied(roles), known=False)
        tokens = () if auth is None else auth.tokens
        certificates = () if auth is None else auth.certificates
        _check_unique("auth.tokens", "sha256", [token.sha256 for token in tokens])
        _check_unique("auth.certificates", "name", [certificate.name for certificate in certificates])
        self._tokens = [(bytes.fromhex(token.sha256), Caller(token.name, _implied(token.roles))) for token in tokens]
        # The callers of tokens that have been shown, by their sha256: never more than there are tokens.
        self._shown: dict[bytes, Caller] = {}
        self._certificates = {each.name.encode(): Caller(each.name, _implied(each.roles)) for each in certificates}

    def caller(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, auth_context: Callable[[], AuthContext] | None = None
    ) -> Caller:
        """Return who calls: by its token; if it sends none, by its certificate; if it shows none, nobody known.

        Args:
            metadata: of the call.
            auth_context: gRPC's, of the connection; asked only where a certificate may decide.

        Raises:
            Unauthenticated: `authorization` is there, and is no bearer token or an unknown one.
        """
        if not self.required:
            return self._anonymous
        header = None
        for key, value in metadata or ():
            if key == "authorization":
                if header is not None:
                    raise Unauthenticated("authorization: expected it once, got it twice; send one token")
                header = value
        if header is not None:
            return self._of_token(header)
        if auth_context is not None and self._certificates:
            return self._of_certificate(auth_context())
        return self._anonymous

    def _of_token(self, header: str | bytes) -> Caller:
        text = header if isinstance(header, str) else header.decode("latin-1")
        scheme, _, token = text.partition(" ")
        token = token.strip(" ")
        # Neither of these messages quotes the header: it may be a secret, and statuses end in logs.
        if scheme.lower() != "bearer" or not token or " " in token:
            raise Unauthenticated(
                "authorization: expected 'Bearer TOKEN', got something else; send the token like that"
            )
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        # What a lookup's time tells of a sha256 that is here helps nobody to find a token.
        caller = self._shown.get(digest)
        if caller is None:
            caller = self._shown[digest] = self._of_digest(digest)
        return caller

    def _of_digest(self, digest: bytes) -> Caller:
        found = None
        for known, caller in self._tokens:
            # All are compared, whichever fits, so that the time tells nothing.
            if compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthenticated(
                "authorization: expected a token that the server knows, got another; ask for a new one"
            )
        return found

    def _of_certificate(self, auth_context: AuthContext) -> Caller:
        names = _names(auth_context)
        callers = [self._certificates[name] for name in names if name in self._certificates]
        if len(callers) == 1:
            return callers[0]
        if callers:
            return Caller(callers[0].name, frozenset(role for caller in callers for role in caller.roles))
        if names:
            return Caller(names[0].decode(errors="backslashreplace"), self._anonymous.roles)
        return self._anonymous


def role_of(method: str) -> Role | None:
    """Return the role that a method needs; None: everybody is answered. Methods that nobody has decided on need admin.

    Args:
        method: /package.Service/Method.
    """
    return _ROLE_OF.get(method, "admin")


def authorise(caller: Caller, method: str) -> None:
    """Return if a caller may call a method.

    Args:
        caller: who.
        method: /package.Service/Method.

    Raises:
        Unauthenticated: it has not the role, and has not said who it is.
        PermissionDenied: it has not the role.
    """
    role = _ROLE_OF.get(method, "admin")
    if role is None or role in caller.roles:
        return
    if not caller.known:
        raise Unauthenticated(
            f"{method}: expected a caller with the role {role!r}, got one who has not said who it is; "
            "send 'authorization: Bearer TOKEN', or show a client certificate that the server's settings name"
        )
    roles = ", ".join(sorted(caller.roles)) or "none"
    raise PermissionDenied(
        f"{method}: expected a caller with the role {role!r}, got {caller.name!r}, whose roles are: {roles}; "
        "ask those who run the server for it"
    )


def concerns(settings: Settings) -> list[str]:
    """Return what those who start a server should be told about who can reach it; one line each."""
    if _only_this_machine(settings.server.host):
        return []
    host, auth = settings.server.host, settings.auth
    # Whether or not some of them show a token: who shows none is anonymous.
    if auth is None or "admin" in auth.anonymous:
        return [f"whoever reaches {host} may do everything, admin's part too; say who may do what in [auth]"]
    if settings.tls is None and auth.tokens:
        return [f"tokens that are sent to {host} can be read on their way; set [tls]"]
    return []


def _names(auth_context: AuthContext) -> list[bytes]:
    """Return the names that a certificate may be listed by: DNS names and URIs; the common name if it has no other."""
    names = [*auth_context.get("peer_dns", ()), *auth_context.get("peer_uri", ())]
    if "x509_subject_alternative_name" not in auth_context:
        names.extend(auth_context.get("x509_common_name", ()))
    return names


def _implied(roles: Iterable[Role]) -> frozenset[Role]:
    """Return the roles with all that come with them: with `admin`, every one."""
    given = frozenset(roles)
    return _ALL_ROLES if "admin" in given else given


def _check_unique(table: str, key: str, values: Iterable[str]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ValueError(
                f"{table}: expected each {key} once, got {value!r} {count} times; give its roles in one place"
            )


def _only_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
