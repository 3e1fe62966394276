"""Failures of a runtime: one line that names the model, whatever it said."""

from __future__ import annotations

import pytest

from export.engines.failures import RunFailed, one_line

TRACEBACK = "[ONNXRuntimeError] : 6 : Non-zero status code while running Tile node.\nStacktrace:\n\n  0x7f\x1b[0m"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(TRACEBACK), r"\[ONNXRuntimeError\] : 6 : Non-zero status code while running Tile node\."),
        (MemoryError(), "MemoryError"),
        (ValueError("\n \x1b[31mred"), r"\?\[31mred"),
        (RuntimeError("a" * 10_000), "a+"),
    ],
)
def test_a_failure_is_one_line_that_names_the_model_and_can_be_printed(error: Exception, said: str) -> None:
    with pytest.raises(RunFailed, match=f"^digits: the runtime failed: {said}; take a sm") as told, one_line("digits"):
        raise error
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 600
    assert told.value.__cause__ is error


def test_what_is_one_line_already_stays_as_it_is() -> None:
    with pytest.raises(RunFailed) as told, one_line("outer"), one_line("inner"):
        raise MemoryError
    assert str(told.value).startswith("inner: the runtime failed: MemoryError; ")


def test_a_stop_by_the_user_is_no_failure() -> None:
    with pytest.raises(KeyboardInterrupt), one_line("digits"):
        raise KeyboardInterrupt
