"""Who a caller is, and what it may do."""

from __future__ import annotations

import importlib
import pkgutil
from hashlib import sha256
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

import protos
from service import auth, tls
from service.auth import Authenticator, Caller, authorise, role_of
from service.errors import PermissionDenied, ServiceError, Unauthenticated
from service.settings import Auth, ClientCertificate, Server, Settings, Tls, Token
from tests.service.certificates import Authority, Pair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from google.protobuf.descriptor import FileDescriptor

    from service.settings import Role

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
_SUBMIT = "/tenet.audit.v1.AuditService/SubmitAudit"
_READY = "/inference.GRPCInferenceService/ServerReady"
_CHECK = "/grpc.health.v1.Health/Check"


def _token(name: str, *roles: Role) -> Token:
    """The token "<name>'s secret"."""
    return Token(name=name, sha256=sha256(f"{name}'s-secret".encode()).hexdigest(), roles=roles)


def _bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "tests"), ("authorization", f"Bearer {name}'s-secret"))


def _allowed(caller: Caller) -> set[str]:
    """Which of a few methods a caller may call."""
    allowed = set()
    for method in (_READY, _INFER, _SUBMIT, _LOAD):
        try:
            authorise(caller, method)
        except (PermissionDenied, Unauthenticated):
            continue
        allowed.add(method)
    return allowed


def _files() -> Iterator[FileDescriptor]:
    for module in pkgutil.walk_packages(protos.__path__, "protos."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name).DESCRIPTOR
    yield from (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)


def test_every_method_that_is_served_has_a_role_that_somebody_decided_on() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in _files()
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {_INFER, _LOAD, _SUBMIT, _CHECK} <= methods
    undecided = methods - auth._ROLE_OF.keys()  # what is not there needs `admin`, which may not be what was meant
    assert not undecided, f"say in service/auth.py who may call {sorted(undecided)}"


def test_a_method_that_nobody_decided_on_needs_admin() -> None:
    assert role_of("/inference.GRPCInferenceService/Invented") == "admin"


def test_without_settings_everybody_may_do_everything() -> None:
    authenticator = Authenticator(None)
    assert not authenticator.required
    assert _allowed(authenticator.caller(None)) == {_READY, _INFER, _SUBMIT, _LOAD}


def test_an_open_server_does_not_read_what_callers_send() -> None:
    open_to_all = Authenticator(Auth(anonymous=("admin",)))
    assert _allowed(open_to_all.caller([("authorization", "nonsense")])) == {_READY, _INFER, _SUBMIT, _LOAD}


@pytest.mark.parametrize(
    ("roles", "allowed"),
    [
        ((), {_READY}),
        (("predict",), {_READY, _INFER}),
        (("audit",), {_READY, _SUBMIT}),
        (("predict", "audit"), {_READY, _INFER, _SUBMIT}),
        (("admin",), {_READY, _INFER, _SUBMIT, _LOAD}),
    ],
)
def test_roles_allow_their_own_methods(roles: tuple[Role, ...], allowed: set[str]) -> None:
    authenticator = Authenticator(Auth(tokens=(_token("other", "admin"), _token("app", *roles))))
    for _ in range(2):  # the second time it is known
        caller = authenticator.caller(_bearer("app"))
        assert (caller.name, _allowed(caller)) == ("app", allowed)


def test_what_anonymous_callers_may_do_is_a_setting() -> None:
    authenticator = Authenticator(Auth(tokens=(_token("ci", "admin"),), anonymous=("predict",)))
    assert _allowed(authenticator.caller(())) == {_READY, _INFER}
    assert _allowed(authenticator.caller(_bearer("ci"))) == {_READY, _INFER, _SUBMIT, _LOAD}


@pytest.mark.parametrize(
    "header",
    ["Bearer app's-secret", "bearer app's-secret", "BEARER   app's-secret ", b"Bearer app's-secret"],
)
def test_the_scheme_is_read_as_http_says(header: str | bytes) -> None:
    authenticator = Authenticator(Auth(tokens=(_token("app", "predict"),)))
    assert authenticator.caller([("authorization", header)]).name == "app"


@pytest.mark.parametrize(
    "header",
    ["", " ", "app's-secret", "Bearer", "Bearer ", "Basic YXBwOnNlY3JldA==", "Bearer app's-secret app's-secret"],
)
def test_a_header_that_is_no_bearer_token_is_told_so_and_not_repeated(header: str) -> None:
    authenticator = Authenticator(Auth(tokens=(_token("app", "predict"),), anonymous=("predict",)))
    with pytest.raises(
        Unauthenticated, match=r"^authorization: expected 'Bearer TOKEN', got something else"
    ) as refused:
        authenticator.caller([("authorization", header)])
    assert "secret" not in str(refused.value)


def test_two_headers_are_one_too_many() -> None:
    authenticator = Authenticator(Auth(tokens=(_token("app", "predict"), _token("ci", "admin"))))
    with pytest.raises(Unauthenticated, match=r"^authorization: expected it once, got it twice"):
        authenticator.caller([*_bearer("app"), *_bearer("ci")])


@given(st.text() | st.binary())
def test_nothing_but_a_token_is_taken_for_one(header: str | bytes) -> None:
    authenticator = Authenticator(Auth(tokens=(_token("app", "predict"),)))
    with pytest.raises(Unauthenticated):
        authenticator.caller([("authorization", header)])
    prefix = "Bearer " if isinstance(header, str) else b"Bearer "
    with pytest.raises(Unauthenticated):
        authenticator.caller([("authorization", prefix + header)])  # type: ignore[operator]


def test_an_unknown_token_is_refused_again_and_again_even_where_anonymous_callers_are_served() -> None:
    authenticator = Authenticator(Auth(tokens=(_token("app", "predict"),), anonymous=("predict",)))
    for _ in range(2):
        with pytest.raises(Unauthenticated, match=r"^authorization: expected a token that the server knows") as refused:
            authenticator.caller(_bearer("mallory"))
        assert "mallory" not in str(refused.value)


def test_the_hash_of_a_token_is_not_a_token() -> None:
    token = _token("app", "predict")
    with pytest.raises(Unauthenticated):
        Authenticator(Auth(tokens=(token,))).caller([("authorization", f"Bearer {token.sha256}")])


def test_a_caller_with_too_few_roles_is_told_which_one_it_needs() -> None:
    with pytest.raises(PermissionDenied) as denied:
        authorise(Caller("app", frozenset({"predict"})), _LOAD)
    assert str(denied.value) == (
        f"{_LOAD}: expected a caller with the role 'admin', got 'app', whose roles are: predict; "
        "ask those who run the server for it"
    )


def test_a_caller_who_shows_nothing_is_told_to() -> None:
    caller = Authenticator(Auth(tokens=(_token("app", "predict"),))).caller(())
    with pytest.raises(Unauthenticated, match=r"the role 'predict'.*; send 'authorization: Bearer TOKEN'"):
        authorise(caller, _INFER)
    authorise(caller, _READY)


def test_one_token_for_two_callers_is_an_error() -> None:
    twice = _token("app", "predict"), _token("app", "admin")
    with pytest.raises(ValueError, match=r"^auth\.tokens: expected each sha256 once, got '[0-9a-f]{64}' 2 times"):
        Authenticator(Auth(tokens=twice))


def test_one_certificate_with_two_sets_of_roles_is_an_error() -> None:
    twice = ClientCertificate(name="app", roles=("predict",)), ClientCertificate(name="app", roles=("admin",))
    with pytest.raises(ValueError, match=r"^auth\.certificates: expected each name once, got 'app' 2 times"):
        Authenticator(Auth(certificates=twice))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


_CERTIFICATES = Auth(
    tokens=(_token("ci", "admin"),),
    certificates=(
        ClientCertificate(name="camera.example.org", roles=("predict",)),
        ClientCertificate(name="spiffe://example.org/auditor", roles=("audit",)),
        ClientCertificate(name="old camera", roles=("predict",)),
        ClientCertificate(name="10.0.0.1", roles=("admin",)),
    ),
)


async def _seen(
    settings: Tls,
    authenticator: Authenticator,
    *,
    trusted: Authority,
    pair: Pair,
    metadata: tuple[tuple[str, str], ...],
) -> Caller:
    """Who a real server takes a client with this certificate for."""
    seen: list[Caller | ServiceError] = []

    async def look(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            seen.append(authenticator.caller(context.invocation_metadata(), context.auth_context))
        except ServiceError as error:
            seen.append(error)
        return request

    server = grpc.aio.server()
    server.add_registered_method_handlers("tests.Who", {"Am": grpc.unary_unary_rpc_method_handler(look)})
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(settings))
    await server.start()
    credentials = grpc.ssl_channel_credentials(trusted.certificate, pair.key, pair.certificate)
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/tests.Who/Am")
            await call(b"I", metadata=metadata, timeout=20)
    finally:
        await server.stop(None)
    [who] = seen
    if isinstance(who, ServiceError):
        raise who
    return who


@pytest.mark.parametrize(
    ("shown", "name", "allowed"),
    [
        (("anything", ("camera.example.org",), ()), "camera.example.org", {_READY, _INFER}),
        (("anything", (), ("spiffe://example.org/auditor",)), "spiffe://example.org/auditor", {_READY, _SUBMIT}),
        (
            ("anything", ("other.example.org", "camera.example.org"), ("spiffe://example.org/auditor",)),
            "camera.example.org",
            {_READY, _INFER, _SUBMIT},
        ),
        (("old camera", (), ()), "old camera", {_READY, _INFER}),
        # With alternative names the common name says nothing.
        (("old camera", ("other.example.org",), ()), "other.example.org", {_READY}),
        (("stranger", (), ()), "stranger", {_READY}),
    ],
    ids=["DNS name", "URI", "several", "common name", "common name beside others", "not listed"],
)
async def test_a_certificate_tells_who_calls(
    shown: tuple[str, tuple[str, ...], tuple[str, ...]],
    name: str,
    allowed: set[str],
    authority: Authority,
    tmp_path: Path,
) -> None:
    common_name, dns, uris = shown
    settings = authority.server().write(tmp_path, client_ca=authority.certificate)
    pair = authority.client(common_name, dns=dns, uris=uris)
    caller = await _seen(settings, Authenticator(_CERTIFICATES), trusted=authority, pair=pair, metadata=())
    assert (caller.name, _allowed(caller)) == (name, allowed)


async def test_a_token_counts_before_a_certificate(authority: Authority, tmp_path: Path) -> None:
    settings = authority.server().write(tmp_path, client_ca=authority.certificate)
    pair = authority.client("old camera")
    authenticator = Authenticator(_CERTIFICATES)
    caller = await _seen(settings, authenticator, trusted=authority, pair=pair, metadata=_bearer("ci"))
    assert caller.name == "ci"
    with pytest.raises(Unauthenticated):
        await _seen(settings, authenticator, trusted=authority, pair=pair, metadata=_bearer("mallory"))


def test_a_certificate_that_is_not_listed_is_denied_by_its_name() -> None:
    def stranger() -> dict[str, list[bytes]]:
        return {"x509_common_name": [b"stranger\xff"]}

    caller = Authenticator(_CERTIFICATES).caller((), stranger)
    with pytest.raises(PermissionDenied, match=r"the role 'predict', got 'stranger.*', whose roles are: none"):
        authorise(caller, _INFER)


def test_an_address_in_a_certificate_is_not_a_name() -> None:
    def addressed() -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": [b"10.0.0.1"], "peer_ip": [b"10.0.0.1"]}

    assert not Authenticator(_CERTIFICATES).caller((), addressed).roles


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_nothing_is_of_concern_on_this_machine_alone(host: str) -> None:
    assert auth.concerns(Settings(server=Server(host=host))) == []


@pytest.mark.parametrize(
    "auth_settings",
    [None, Auth(anonymous=("admin",)), Auth(anonymous=("admin",), tokens=(_token("app", "predict"),))],
)
def test_a_server_that_others_reach_and_asks_nobody_says_so(auth_settings: Auth | None) -> None:
    [line] = auth.concerns(Settings(server=Server(host="0.0.0.0"), auth=auth_settings))
    assert line == "whoever reaches 0.0.0.0 may do everything, admin's part too; say who may do what in [auth]"


def test_tokens_in_the_clear_are_said_to_be(tmp_path: Path) -> None:
    settings = Settings(server=Server(host="::"), auth=Auth(tokens=(_token("app", "predict"),)))
    [line] = auth.concerns(settings)
    assert line == "tokens that are sent to :: can be read on their way; set [tls]"
    encrypted = Tls(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    assert auth.concerns(settings.model_copy(update={"tls": encrypted})) == []
