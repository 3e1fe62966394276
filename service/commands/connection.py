"""How commands reach a server: --server, --token-file, --ca, --cert, --key, or the environment -> a client.

`connected(verb)` gives a verb these options in place of its parameter of type `Connection`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.client import Client, Tls
    from service.client.connection import Token

# Instead of a file: what everybody's browser trusts.
_PUBLIC = "public"

ServerOption = Annotated[
    str, typer.Option("--server", envvar="TENET_SERVER", help="HOST:PORT of `tenet serve` or `tenet up`.")
]
TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", envvar="TENET_TOKEN_FILE", help="File of the bearer token to show.")
]
CaOption = Annotated[
    str | None,
    typer.Option(
        "--ca",
        envvar="TENET_CA",
        help="Encrypt, and trust servers that these certificates (PEM) signed; `public`: the public authorities'.",
        metavar="FILE",
    ),
]
CertOption = Annotated[
    Path | None, typer.Option("--cert", envvar="TENET_CERT", help="Certificate (PEM) to show; with --key and --ca.")
]
KeyOption = Annotated[Path | None, typer.Option("--key", envvar="TENET_KEY", help="Its key (PEM).")]


@dataclass(frozen=True)
class Connection:
    """What the options say."""

    server: str = ""
    token_file: Path | None = None
    ca: str | None = None
    cert: Path | None = None
    key: Path | None = None

    def client(self) -> Client:
        """Return a client; it connects at the first call.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is not what it should be, or belongs to another that is not given.
        """
        from service.client import Client

        return Client(self.server, tls=self.tls(), token=self.token())

    def token(self) -> Token | None:
        """Return what gives the bearer token, None without a file; raises as `client`."""
        if self.token_file is None:
            return None
        # Each call reads the token again: whoever issues tokens for a short time replaces the file.
        self._token()
        return self._token

    def tls(self) -> Tls | None:
        """Return the certificates, None where nothing is to be encrypted; raises as `client`."""
        from service.client import Tls

        if self.ca is None:
            if self.cert is not None or self.key is not None:
                raise ValueError("--cert and --key: expected --ca with them, got none; without it nothing is encrypted")
            return None
        return Tls(ca=None if self.ca == _PUBLIC else Path(self.ca), cert=self.cert, key=self.key)

    def _token(self) -> str:
        path = self.token_file
        assert path is not None
        if not path.is_file():
            raise FileNotFoundError(f"--token-file: {path}: expected a file with a token here, found none")
        if not (token := path.read_text(errors="replace").strip()):
            raise ValueError(f"--token-file: {path}: expected a token, the file is empty; write one into it")
        return token


_OPTIONS = {
    "server": (ServerOption, inspect.Parameter.empty),
    "token_file": (TokenFileOption, None),
    "ca": (CaOption, None),
    "cert": (CertOption, None),
    "key": (KeyOption, None),
}


def connected(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that takes the options, and hands the function its `Connection`.

    Args:
        verb: a function that has one parameter of type `Connection`.
    """
    hints = get_type_hints(verb, include_extras=True)
    (name,) = (name for name, hint in hints.items() if hint is Connection)

    @wraps(verb)
    def with_options(**given: Any) -> None:
        options = {option: given.pop(option) for option in _OPTIONS}
        verb(**given, **{name: Connection(**options)})

    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(verb).parameters.values()
        if parameter.name != name
    ]
    added = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for option, (annotation, default) in _OPTIONS.items()
    ]
    parameters = [*own, *added]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # Typer asks both for a function's parameters.
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    # Its own, not the wrapped function's.
    del with_options.__wrapped__
    return with_options
