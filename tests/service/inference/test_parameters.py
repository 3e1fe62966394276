"""Parameters of requests: those of the protocol mean what they mean to Triton, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from protos.inference import open_inference_pb2 as pb
from service.errors import InvalidArgument, Unimplemented
from service.inference.parameters import Options, options_of


def options(**parameters: Any) -> Options:
    request = pb.ModelInferRequest()
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(pb.InferParameter(**value))
    return options_of(request.parameters)


def test_options_of_a_request() -> None:
    assert options() == Options(priority=0, timeout_s=None)
    assert options(priority={"int64_param": 2}, timeout={"int64_param": 1500}) == Options(priority=2, timeout_s=0.0015)
    assert options(priority={"uint64_param": 2**64 - 1}).priority == 2**64 - 1
    # As in Triton: no time at all is the model's own.
    assert options(timeout={"int64_param": 0}).timeout_s is None
    assert options(mine={"string_param": "x"}, triton_enable_empty_final_response={"bool_param": True}) == Options()


BAD_OPTIONS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "negative priority": ("priority", {"int64_param": -1}, InvalidArgument, "'priority': expected 0 or more, got -1"),
    "priority in words": (
        "priority",
        {"string_param": "high"},
        InvalidArgument,
        "request: parameter 'priority': expected int64_param or uint64_param, got string_param",
    ),
    "negative timeout": ("timeout", {"int64_param": -5}, InvalidArgument, "'timeout': expected 0 or more, got -5"),
    "timeout in seconds": ("timeout", {"double_param": 0.5}, InvalidArgument, "expected int64_param, got double_param"),
    "unsigned timeout": ("timeout", {"uint64_param": 5}, InvalidArgument, "expected int64_param, got uint64_param"),
    "no value": ("timeout", {}, InvalidArgument, "'timeout': expected int64_param, got no value"),
    "reserved": ("triton_x", {"int64_param": 1}, InvalidArgument, "'triton_x': names that begin with 'triton_'"),
    "final response": (
        "triton_enable_empty_final_response",
        {"int64_param": 1},
        InvalidArgument,
        "expected bool_param, got int64_param",
    ),
    "sequence": ("sequence_id", {"int64_param": 1}, Unimplemented, "'sequence_id': sequences are not served"),
}


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_told_what_is_wrong(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        options(**{name: value})
    assert message in str(caught.value)
