"""TOML text -> a frozen, strictly checked value; every mistake is one line that names the key and the way out."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails

Value = TypeVar("Value", bound=BaseModel)

# Of numbers, by pydantic's names for them.
_BOUNDS = {"ge": "at least", "gt": "a number above", "le": "at most", "lt": "a number below"}


def decode(text: str, kind: type[Value], *, source: str) -> Value:
    """Decode TOML into a pydantic model.

    Args:
        text: the TOML document.
        kind: the frozen model that describes it; it must forbid extra keys.
        source: what the text is, for messages: a path, "plan".

    Raises:
        ValueError: not TOML, or not what `kind` describes; one line a mistake, `source: key.path: expected …`.
    """
    return checked(parsed(text, source=source), kind, source=source)


def parsed(text: str, *, source: str) -> dict[str, Any]:
    """Parse TOML; raises ValueError, with the line, if it is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source}: expected TOML: {error}") from None


def checked(document: dict[str, Any], kind: type[Value], *, source: str, unquoted: str | None = None) -> Value:
    """Return a document as a pydantic model; raises ValueError, as `decode` does.

    Args:
        document: as it was parsed.
        kind: the frozen model that describes it.
        source: what it is, for messages.
        unquoted: the table whose values are not told, as they may be secrets.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        lines = [f"{source}: {_line(detail, unquoted=unquoted)}" for detail in _own(error.errors())]
        raise ValueError("\n".join(lines)) from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file; raises ValueError, naming it, if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes; is it the right file?") from None


def _line(detail: ErrorDetails, *, unquoted: str | None) -> str:
    where = _path(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key; remove it or correct its spelling"
        case "missing":
            return f"{where}: expected a value here, found none; add the key"
        case "union_tag_invalid":
            known = detail["ctx"]["expected_tags"].replace("'", "")
            return f"{where}.name: unknown {detail['ctx']['tag']!r}; expected one of {known}"
        case "union_tag_not_found":
            return f"{where}.name: expected a name here, found none; add the key"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
    got = "another value, which may be a secret" if detail["loc"][:1] == (unquoted,) else repr(detail["input"])
    return f"{where}: {_expected(detail)}, got {got}"


def _own(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return the mistakes without those that only follow: a list is too short, for pydantic, without its bad items."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short" or not any(place[:-1] == detail["loc"] for place in places)
    ]


def _expected(detail: ErrorDetails) -> str:
    """Return what was expected, in the words of all our errors."""
    for bound, words in _BOUNDS.items():
        if bound in detail.get("ctx", {}):
            return f"expected {words} {detail['ctx'][bound]}"
    message = detail["msg"].removeprefix("Input should be ")
    return f"expected {message}" if message != detail["msg"] else f"{message[0].lower()}{message[1:]}"


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or "document"
