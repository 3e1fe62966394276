"""The log's level, as clients set it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument
from service.inference.log_settings import LogSettings
from service.settings import Logging

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
logger = logging.getLogger("service.inference.tested")


@pytest.fixture(autouse=True)
def level() -> Iterator[logging.Logger]:
    """The logger whose level is set; it has its own again after the test."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    yield root
    root.setLevel(before)


def given(**values: bool | int | str) -> dict[str, pb.LogSettingsRequest.SettingValue]:
    """Return settings as Triton's client sends them."""
    request = pb.LogSettingsRequest()
    for name, value in values.items():
        setting = request.settings[name]
        if isinstance(value, bool):
            setting.bool_param = value
        elif isinstance(value, int):
            setting.uint32_param = value
        else:
            setting.string_param = value
    return dict(request.settings)


@pytest.mark.parametrize(
    ("values", "logged"),
    [
        ({"log_verbose_level": 1}, ["debug", "info", "warning", "error"]),
        ({"log_verbose_level": 0}, ["info", "warning", "error"]),
        ({"log_info": False}, ["warning", "error"]),
        ({"log_info": False, "log_warning": False}, ["error"]),
        ({"log_info": False, "log_warning": False, "log_error": False}, []),
    ],
)
def test_what_is_logged_is_what_was_set(
    caplog: pytest.LogCaptureFixture, values: dict[str, bool | int], logged: list[str]
) -> None:
    LogSettings(Logging()).update(given(**values))
    for name, number in _LEVELS.items():
        logger.log(number, name)
    assert [record.message for record in caplog.records] == logged


def test_settings_are_read_as_they_are(level: logging.Logger) -> None:
    settings = LogSettings(Logging(form="json"))
    level.setLevel(logging.WARNING)
    assert settings.read() == {
        "log_file": "",
        "log_info": False,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "json",
    }
    # What is as it is may be said again.
    settings.update(given(log_file="", log_format="json", log_warning=True))
    assert level.level == logging.WARNING


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"log_warning": False}, "'log_warning': expected true while 'log_info' is"),
        ({"log_info": False, "log_verbose_level": 1}, "'log_verbose_level': expected 0 while 'log_info' is false"),
        ({"log_file": "server.log"}, "'log_file': expected '', got 'server.log'"),
        ({"log_info": False, "log_loudness": 3}, "'log_loudness': expected one of log_file, log_info"),
    ],
)
def test_what_contradicts_itself_or_is_not_known_changes_nothing(
    level: logging.Logger, values: dict[str, bool | int | str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LogSettings(Logging()).update(given(**values))
    assert level.level == logging.INFO


def test_a_setting_without_a_value_stays_as_it_is(level: logging.Logger) -> None:
    LogSettings(Logging()).update({"log_info": pb.LogSettingsRequest.SettingValue()})
    assert level.level == logging.INFO
