"""Logs: what the server says on stderr, a line for people or a JSON object for machines.

    any logger --record, and what is known of the call that is served--> text | JSON --> stderr

Nothing here sees a tensor or a token: a line has its message, and of the call its ids, model and status.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from service import calls

if TYPE_CHECKING:
    from service import settings

# What a caller may have put into a message, such as the end of a line that it then goes on as one of ours. Tabs stay.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029)} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
}


def configure(chosen: settings.Logging) -> None:
    """Log to stderr from now on, and nowhere else; called again, it replaces what it did before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if chosen.form == "json" else Text())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger().setLevel(chosen.level.upper())
    # It tells of every migration of its own database.
    logging.getLogger("dbos").setLevel(logging.WARNING)
    # At debug it tells of every event loop that it looks up.
    logging.getLogger("grpc").setLevel(logging.WARNING)


class Text(logging.Formatter):
    """A line for people: time, level, logger, message, and key=value of what is known of the call."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback's where there is one."""
        message = record.getMessage().translate(_CONTROL)
        said = "".join(f" {key}={_value(value)}" for key, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname:<7} {record.name}: {message}{said}"
        traceback = _traceback(self, record)
        # Indented, so that no line of it can be taken for one of the log's.
        return f"{line}\n{textwrap.indent(traceback, '  ')}" if traceback else line


class Json(logging.Formatter):
    """A JSON object: `time`, `level`, `logger`, `message`, what is known of the call, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, on one line."""
        said: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if traceback := _traceback(self, record):
            said["exception"] = traceback
        return json.dumps(said, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    call = calls.current()
    return {**getattr(record, "fields", {}), **(call.fields() if call is not None else {})}


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


def _value(value: object) -> str:
    """Return what does not look like two fields or two lines."""
    text = str(value)
    plain = text.isprintable() and not set(text) & set(' ="')
    return text if plain else json.dumps(text)


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z"
