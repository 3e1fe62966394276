"""What is tried again, when, and what is not: against a real server that refuses as it is told."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from service.client import NO_RETRIES, Client, RequestOptions, Retries
from service.client.failures import pushback_s
from service.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, ServiceError, Unavailable
from tests.service.client.answering import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.service.client.answering import Answering

    Ask = Callable[..., Any]

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
GONE = grpc.StatusCode.UNAVAILABLE

IMAGES = np.zeros((2, 3, 2, 2), np.float32)
QUICK = Retries(attempts=4, initial_s=0.01, max_s=0.02)


def infer(ask: Ask, address: str, *, retries: Retries = QUICK, timeout: float = 10, images: Any = IMAGES) -> Any:
    return ask(address, "infer", images, model="m", client={"retries": retries, "timeout": timeout})


def rich(seconds: int = 0, nanos: int = 0) -> tuple[tuple[str, bytes], ...]:
    packed = Packed()
    packed.Pack(RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos)))
    return (("grpc-status-details-bin", Status(code=8, message="full", details=[packed]).SerializeToString()),)


def pushback(milliseconds: str) -> tuple[tuple[str, str], ...]:
    return (("grpc-retry-pushback-ms", milliseconds),)


@pytest.mark.parametrize("status", [FULL, GONE])
@pytest.mark.parametrize("refusals", [1, 3])
def test_what_is_refused_is_tried_again(
    ask: Ask, address: str, answering: Answering, status: grpc.StatusCode, refusals: int
) -> None:
    answering.refusals.extend([Refusal(status)] * refusals)
    assert infer(ask, address).shape == (2, 3)
    assert len(answering.times) == refusals + 1


def test_no_attempt_follows_the_last(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.extend([Refusal(FULL, "the queue is full")] * 9)
    with pytest.raises(ResourceExhausted, match=r"^the queue is full$"):
        infer(ask, address)
    assert len(answering.times) == QUICK.attempts


def test_without_retries_the_first_failure_is_told(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.append(Refusal(FULL))
    with pytest.raises(ResourceExhausted):
        infer(ask, address, retries=NO_RETRIES)
    assert len(answering.times) == 1


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    ask: Ask, address: str, answering: Answering, status: grpc.StatusCode
) -> None:
    answering.refusals.append(Refusal(status, "no", pushback("1")))
    with pytest.raises(ServiceError, match=r"^no$"):
        infer(ask, address)
    assert len(answering.times) == 1


def test_a_message_that_is_too_large_is_not_sent_again(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.append(Refusal(FULL, "SERVER: Received message larger than max (5 vs. 4)"))
    with pytest.raises(ResourceExhausted, match="larger than max"):
        infer(ask, address)
    assert len(answering.times) == 1


@pytest.mark.parametrize("said", [pushback("300"), rich(nanos=300_000_000)], ids=["pushback-ms", "RetryInfo"])
def test_the_server_says_when_to_come_again(
    ask: Ask, address: str, answering: Answering, said: tuple[tuple[str, str | bytes], ...]
) -> None:
    answering.refusals.append(Refusal(FULL, metadata=said))
    infer(ask, address)
    first, second = answering.times
    assert second - first >= 0.3


def test_large_requests_are_tried_again_too(ask: Ask, address: str, answering: Answering) -> None:
    """gRPC's own retries keep 256 KiB of a request, and give up on the others."""
    answering.refusals.append(Refusal(FULL, metadata=pushback("10")))
    images = np.zeros((4, 3, 200, 200), np.float32)
    assert infer(ask, address, images=images).shape == (4, 3)
    assert len(answering.times) == 2


@pytest.mark.parametrize("said", ["-1", "-300", "soon", "1.5", "", "99999999999999999999"])
def test_a_server_that_says_never_is_heeded(ask: Ask, address: str, answering: Answering, said: str) -> None:
    answering.refusals.append(Refusal(FULL, metadata=pushback(said)))
    with pytest.raises(ResourceExhausted):
        infer(ask, address)
    assert len(answering.times) == 1


# Short enough that a wait that is begun all the same is a failure, and no test that hangs.
@pytest.mark.parametrize("said", [pushback("8000"), rich(seconds=8)], ids=["pushback-ms", "RetryInfo"])
def test_a_wait_beyond_the_deadline_is_not_begun(
    ask: Ask, address: str, answering: Answering, said: tuple[tuple[str, str | bytes], ...]
) -> None:
    answering.refusals.append(Refusal(FULL, metadata=said))
    began = time.monotonic()
    with pytest.raises(ResourceExhausted) as raised:
        infer(ask, address, timeout=5)
    assert time.monotonic() - began < 4
    assert len(answering.times) == 1
    assert raised.value.retry_after_s == 8


def test_all_attempts_together_have_the_time_of_the_call(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.extend([Refusal(FULL)] * 1000)
    began = time.monotonic()
    with pytest.raises(ResourceExhausted):
        infer(ask, address, retries=Retries(attempts=1000, initial_s=0.05, max_s=0.05), timeout=0.5)
    assert time.monotonic() - began < 0.5 + 0.3
    assert 3 < len(answering.times) < 30


def test_waits_grow_to_their_limit(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.extend([Refusal(FULL)] * 4)
    infer(ask, address, retries=Retries(attempts=5, initial_s=0.1, multiplier=4, max_s=0.2))
    waits = [later - earlier for earlier, later in pairwise(answering.times)]
    # Give or take half, and what a busy machine adds.
    assert 0.05 <= waits[0] < 0.15 + 0.2
    assert all(0.1 <= wait < 0.3 + 0.2 for wait in waits[1:])


def test_no_answer_is_not_waited_for_twice(ask: Ask, address: str, answering: Answering) -> None:
    answering.gate.clear()
    with pytest.raises(DeadlineExceeded, match=rf"^{address} did not answer within 0\.3 s$"):
        infer(ask, address, timeout=0.3)
    answering.gate.set()
    assert len(answering.times) == 1


def test_what_a_server_says_of_a_deadline_is_told(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.append(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "it waited 5 ms in the queue"))
    with pytest.raises(DeadlineExceeded, match=r"^it waited 5 ms in the queue$"):
        infer(ask, address)


def test_requests_in_flight_are_tried_again_in_their_place(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.extend([Refusal(FULL)] * 3)
    batches = [np.full((1, 3, 2, 2), number / 16, np.float32) for number in range(16)]
    answers = ask(address, "infer_many", batches, model="m", in_flight=4, client={"retries": QUICK})
    assert [float(answer[0, 0]) for answer in answers] == [number / 16 for number in range(16)]
    assert len(answering.times) == 19


def test_the_time_that_a_caller_takes_between_answers_is_not_that_of_its_calls(
    address: str, answering: Answering
) -> None:
    timeout_s = 1.0

    def batches() -> Iterator[Any]:
        yield IMAGES
        while answering.running or not answering.times:
            pass
        # The first has been answered: the second is refused.
        answering.refusals.append(Refusal(FULL, metadata=pushback("100")))
        yield IMAGES

    with Client(address, timeout=timeout_s) as client:
        for _ in client.infer_many(batches(), model="m", in_flight=2):
            time.sleep(1.2 * timeout_s)  # what the caller does with an answer
    first, refused, again = answering.times
    assert first < refused < again
    assert again - refused > timeout_s


def test_calls_other_than_inference_are_tried_again(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.append(Refusal(GONE))
    assert ask(address, "ready", client={"retries": QUICK}) is True


def test_a_caller_s_mistake_is_told_once(ask: Ask, address: str, answering: Answering) -> None:
    answering.refusals.append(Refusal(grpc.StatusCode.INVALID_ARGUMENT, "priority: expected 1"))
    with pytest.raises(InvalidArgument, match="priority"):
        infer(ask, address)
    assert len(answering.times) == 1


def test_a_call_has_a_time_of_its_own(ask: Ask, address: str, answering: Answering) -> None:
    answering.gate.clear()
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        ask(address, "infer", IMAGES, model="m", options=RequestOptions(timeout_s=0.2))
    answering.gate.set()


def test_a_server_that_is_not_there_is_tried_again_and_named(ask: Ask) -> None:
    with pytest.raises(Unavailable, match=r"^cannot reach 127\.0\.0\.1:1; is `tenet serve` running there\?$"):
        ask("127.0.0.1:1", "ready", client={"retries": QUICK})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"attempts": 0}, "attempts: expected 1 or more, got 0"),
        ({"initial_s": -1}, "0 <= initial_s <= max_s"),
        ({"initial_s": 9, "max_s": 5}, "0 <= initial_s <= max_s"),
        ({"max_s": float("inf")}, "0 <= initial_s <= max_s"),
        ({"multiplier": 0.5}, "multiplier: expected 1 or more"),
    ],
)
def test_retries_that_make_no_sense_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Retries(**arguments)


@given(st.integers(1, 10**6), st.floats(0, 10), st.floats(0, 10), st.floats(1, 100))
def test_back_off_grows_and_never_beyond_its_limit(made: int, one: float, other: float, multiplier: float) -> None:
    retries = Retries(initial_s=min(one, other), max_s=max(one, other), multiplier=multiplier)
    assert retries.initial_s <= retries.backoff_s(made) <= retries.backoff_s(made + 1) <= retries.max_s


@given(st.binary(max_size=200))
def test_details_that_are_none_say_nothing_and_break_nothing(details: bytes) -> None:
    said = pushback_s({"grpc-status-details-bin": details})
    assert said is None or said >= 0


@given(st.text(max_size=30))
def test_whatever_a_server_pushes_back_is_a_number_of_seconds(said: str) -> None:
    seconds = pushback_s({"grpc-retry-pushback-ms": said})
    assert seconds is not None
    assert seconds == (int(said) / 1000 if said.isascii() and said.isdigit() and len(said) < 10 else float("-inf"))
