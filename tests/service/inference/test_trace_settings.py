"""Which calls are traced, as clients set it and tracing reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import FailedPrecondition, InvalidArgument
from service.inference.trace_settings import TraceSettings
from service.settings import Tracing

_COLLECTOR = "http://127.0.0.1:4317"


def traced(*, ratio: float = 1.0) -> TraceSettings:
    return TraceSettings(Tracing(endpoint=_COLLECTOR, sample_ratio=ratio))


def test_what_the_server_was_started_with() -> None:
    settings = traced(ratio=0.25)
    assert (settings.enabled, settings.ratio) == (True, 0.25)
    assert settings.read() == {
        "trace_level": "TIMESTAMPS",
        "trace_rate": "4",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_file": "",
        "trace_mode": "opentelemetry",
    }


@pytest.mark.parametrize(("ratio", "rate"), [(1.0, "1"), (0.3, "3"), (0.0, "0"), (5e-324, str(2**31 - 1))])
def test_the_rate_is_the_nearest_to_the_ratio(ratio: float, rate: str) -> None:
    assert traced(ratio=ratio).read()["trace_rate"] == rate


def test_calls_are_traced_from_when_it_is_set_and_as_at_the_start_when_it_is_cleared() -> None:
    settings = traced(ratio=0.5)
    settings.update({"trace_level": ["OFF"], "trace_rate": ["100"]})
    assert (settings.enabled, settings.ratio) == (False, 0.01)
    settings.update({"trace_level": ["TIMESTAMPS"]})
    assert (settings.enabled, settings.ratio) == (True, 0.01)
    settings.update({"trace_rate": []})
    assert (settings.enabled, settings.ratio) == (True, 0.5)
    settings.update({"trace_level": ["OFF"]})
    settings.update({"trace_level": []})
    assert settings.enabled


@given(rate=st.integers(0, 2**31 - 1))
def test_a_rate_is_read_as_it_was_set(rate: int) -> None:
    settings = traced()
    settings.update({"trace_rate": [str(rate)]})
    assert settings.read()["trace_rate"] == str(rate)


def test_a_setting_that_is_refused_changes_none() -> None:
    settings = traced()
    with pytest.raises(InvalidArgument, match="setting 'trace_rate': expected one whole number"):
        settings.update({"trace_level": ["OFF"], "trace_rate": ["2147483648"]})
    assert (settings.enabled, settings.ratio) == (True, 1.0)


def test_without_a_collector_nothing_is_traced() -> None:
    settings = TraceSettings(Tracing())
    assert not settings.enabled
    settings.update({"trace_level": ["OFF"], "trace_rate": ["10"], "trace_count": ["-1"], "trace_file": []})
    with pytest.raises(FailedPrecondition, match=r"setting 'trace_level': expected OFF, .*\[tracing\]"):
        settings.update({"trace_level": ["TIMESTAMPS"]})
    assert not settings.enabled
