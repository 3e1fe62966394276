"""What Triton's clients read and set of tracing: TraceSetting.

trace_level, trace_rate <--> which calls are traced --read by--> tracing, at each call
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service import settings

_OFF, _ON = "OFF", "TIMESTAMPS"

# What Triton's own setting holds.
_LARGEST_RATE = (1 << 31) - 1

# Triton's other settings, and the one value that each has here: traces have no number, go to the collector, and are
# OpenTelemetry's.
_FIXED = {"trace_count": "-1", "log_frequency": "0", "trace_file": "", "trace_mode": "opentelemetry"}
_NAMES = ("trace_level", "trace_rate", *_FIXED)


class TraceSettings:
    """Which calls are traced; tracing reads it at each call.

    Attributes:
        enabled: whether any is, the callers' own traces among them.
        ratio: the share of calls, 0 to 1, that are traced where the caller has not decided.
    """

    __slots__ = ("_possible", "_start", "enabled", "ratio")

    def __init__(self, settings: settings.Tracing) -> None:
        self._possible = settings.endpoint is not None
        self._start = (self._possible, settings.sample_ratio)
        self.enabled, self.ratio = self._start

    @property
    def rate(self) -> int:
        """Of how many calls one is traced, as Triton says it; 0 is only those whose callers trace them."""
        return round(min(1 / self.ratio, _LARGEST_RATE)) if self.ratio else 0

    def read(self) -> dict[str, str]:
        """Return the settings by Triton's names."""
        return {"trace_level": _ON if self.enabled else _OFF, "trace_rate": str(self.rate)} | _FIXED

    def update(self, given: Mapping[str, Sequence[str]]) -> None:
        """Set some of the settings, all or none; one without a value is set to what it was at the start.

        Raises:
            InvalidArgument: a setting is unknown, or its value is none that it may have.
            FailedPrecondition: there is no collector to which traces could go.
        """
        enabled, ratio = self.enabled, self.ratio
        for name, values in given.items():
            if name == "trace_level":
                enabled = self._level(values)
            elif name == "trace_rate":
                ratio = self._ratio(values)
            else:
                _check_fixed(name, values)
        if enabled and not self._possible:
            raise FailedPrecondition(
                "setting 'trace_level': expected OFF, since traces have nowhere to go; start the server with an "
                "endpoint in [tracing]"
            )
        self.enabled, self.ratio = enabled, ratio

    def _level(self, values: Sequence[str]) -> bool:
        if not values:
            return self._start[0]
        if set(values) not in ({_OFF}, {_ON}):
            raise InvalidArgument(f"setting 'trace_level': expected {_OFF} or {_ON}, got {', '.join(values)!r}")
        return values[0] == _ON

    def _ratio(self, values: Sequence[str]) -> float:
        if not values:
            return self._start[1]
        text = values[0]
        digits = text.isascii() and text.isdecimal() and len(text) <= len(str(_LARGEST_RATE))
        if len(values) > 1 or not digits or int(text) > _LARGEST_RATE:
            raise InvalidArgument(
                f"setting 'trace_rate': expected one whole number, 0 to {_LARGEST_RATE}, got {', '.join(values)!r}"
            )
        return 1 / int(text) if int(text) else 0.0


def _check_fixed(name: str, values: Sequence[str]) -> None:
    if name not in _FIXED:
        raise InvalidArgument(f"setting {name!r}: expected one of {', '.join(_NAMES)}")
    if values and list(values) != [_FIXED[name]]:
        raise InvalidArgument(
            f"setting {name!r}: expected {_FIXED[name]!r}, got {', '.join(values)!r}; it cannot be changed here"
        )
