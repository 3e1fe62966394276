"""What Triton's clients read and set of the server's log: LogSettings.

log_info, log_warning, log_error, log_verbose_level <--> the level of the log
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from service.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.inference import open_inference_pb2 as pb
    from service import settings

    Value = bool | int | str

# The settings by Triton's names, each with the field that carries its value.
_FIELDS = {
    "log_file": "string_param",
    "log_info": "bool_param",
    "log_warning": "bool_param",
    "log_error": "bool_param",
    "log_verbose_level": "uint32_param",
    "log_format": "string_param",
}
# What follows from the level, from the fewest lines to the most.
_LEVELS = {"log_error": logging.ERROR, "log_warning": logging.WARNING, "log_info": logging.INFO}


class LogSettings:
    """The log's settings: its level can be set, where it is written and its form only read."""

    def __init__(self, settings: settings.Logging) -> None:
        self._form = settings.form
        self._logger = logging.getLogger()

    def read(self) -> dict[str, Value]:
        """Return the settings by Triton's names; stderr, where the log goes, is the empty `log_file`."""
        level = self._logger.getEffectiveLevel()
        enabled = {name: level <= limit for name, limit in _LEVELS.items()}
        return {
            "log_file": "",
            "log_info": enabled["log_info"],
            "log_warning": enabled["log_warning"],
            "log_error": enabled["log_error"],
            "log_verbose_level": int(level <= logging.DEBUG),
            "log_format": self._form,
        }

    def update(self, given: Mapping[str, pb.LogSettingsRequest.SettingValue]) -> None:
        """Set some of the settings, all or none; one without a value stays as it is.

        Raises:
            InvalidArgument: a setting is unknown, of another type, cannot be set, or contradicts the others.
        """
        now = self.read()
        values = {name: value for name, raw in given.items() if (value := _value(name, raw)) is not None}
        for name in ("log_file", "log_format"):
            if values.get(name, now[name]) != now[name]:
                raise InvalidArgument(
                    f"setting {name!r}: expected {now[name]!r}, got {values[name]!r}; [logging] sets it, at the start"
                )
        if values:
            self._logger.setLevel(_level(now | values))


def _value(name: str, raw: pb.LogSettingsRequest.SettingValue) -> Value | None:
    if name not in _FIELDS:
        raise InvalidArgument(f"setting {name!r}: expected one of {', '.join(_FIELDS)}")
    field = _FIELDS[name]
    given = raw.WhichOneof("parameter_choice")
    if given is None:
        return None
    if given != field:
        raise InvalidArgument(f"setting {name!r}: expected {field}, got {given}")
    value: Value = getattr(raw, field)
    return value


def _level(values: Mapping[str, Value]) -> int:
    """Return the level that says what these values want said; each of them includes those before it."""
    enabled = [name for name in _LEVELS if values[name]]
    if enabled != list(_LEVELS)[: len(enabled)]:
        missing = next(name for name in _LEVELS if not values[name])
        raise InvalidArgument(
            f"setting {missing!r}: expected true while {enabled[-1]!r} is, which says more; set both to false"
        )
    if values["log_verbose_level"]:
        if len(enabled) < len(_LEVELS):
            raise InvalidArgument(
                "setting 'log_verbose_level': expected 0 while 'log_info' is false, which says less; set it to true"
            )
        return logging.DEBUG
    return _LEVELS[enabled[-1]] if enabled else logging.CRITICAL
