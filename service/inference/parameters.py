"""Parameters of requests and of their tensors, each of the type that the protocol gives it.

request --priority, timeout--> Options
tensor --shared_memory_region, _byte_size, _offset--> Place
output --classification--> the number of classes wanted
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.inference import open_inference_pb2 as pb

    Parameters = Mapping[str, pb.InferParameter]

_MICROSECONDS = 1e6  # a second


@dataclass(frozen=True, slots=True)
class Options:
    """How a request wants to be queued.

    Attributes:
        priority: 1 is served first; 0 leaves it to the model.
        timeout_s: seconds that it may wait in the queue; None leaves it to the model.
    """

    priority: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where in shared memory a tensor lies.

    Attributes:
        region: the name under which the region was registered.
        offset: bytes from the region's beginning.
        size: bytes.
    """

    region: str
    offset: int
    size: int


_USUAL = Options()


def options_of(parameters: Parameters) -> Options:
    """Return what a request's parameters say; those that the protocol does not know are anybody's.

    Raises:
        InvalidArgument: one is reserved, of another type than the protocol's, or negative.
        Unimplemented: one is a sequence's: models here have no state.
    """
    if not parameters:
        return _USUAL
    owner = "request"
    for name in parameters:
        if name.startswith("triton_") and name != "triton_enable_empty_final_response":
            raise InvalidArgument(
                f"{owner}: parameter {name!r}: names that begin with 'triton_' are reserved; choose another"
            )
        if name.startswith("sequence_"):
            raise Unimplemented(f"{owner}: parameter {name!r}: sequences are not served; leave it out")
    _value(parameters, "triton_enable_empty_final_response", "bool_param", owner=owner)
    priority = _number(parameters, "priority", "int64_param", "uint64_param", least=0, owner=owner) or 0
    timeout = _number(parameters, "timeout", "int64_param", least=0, owner=owner)
    return Options(priority=priority, timeout_s=timeout / _MICROSECONDS if timeout else None)


def place_of(parameters: Parameters, *, owner: str) -> Place | None:
    """Return where in shared memory a tensor lies; None if it does not lie there.

    Args:
        parameters: the tensor's.
        owner: whose they are, for messages.

    Raises:
        InvalidArgument: one is of another type than the protocol's, out of range, or missing beside another.
    """
    region = _value(parameters, "shared_memory_region", "string_param", owner=owner)
    size = _number(parameters, "shared_memory_byte_size", "int64_param", least=1, owner=owner)
    offset = _number(parameters, "shared_memory_offset", "int64_param", least=0, owner=owner)
    if region is None and size is None and offset is None:
        return None
    for name, value in (("shared_memory_region", region), ("shared_memory_byte_size", size)):
        if value is None:
            raise InvalidArgument(
                f"{owner}: parameter {name!r}: expected beside the other parameters of shared memory, got none"
            )
    return Place(region, offset or 0, size)


def classes_of(parameters: Parameters, *, owner: str) -> int | None:
    """Return how many classes are wanted of an output; None if its values are.

    Args:
        parameters: the output's.
        owner: whose they are, for messages.

    Raises:
        InvalidArgument: it is no int64, or below 1.
    """
    classes: int | None = _number(parameters, "classification", "int64_param", least=1, owner=owner)
    return classes


def _number(parameters: Parameters, name: str, *kinds: str, least: int, owner: str) -> Any:
    number = _value(parameters, name, *kinds, owner=owner)
    if number is not None and number < least:
        raise InvalidArgument(f"{owner}: parameter {name!r}: expected {least} or more, got {number}")
    return number


def _value(parameters: Parameters, name: str, *kinds: str, owner: str) -> Any:
    """Return a parameter's value, None if it is not there."""
    # Looked up by name, protobuf's maps would add what they lack.
    if name not in parameters:
        return None
    kind = parameters[name].WhichOneof("parameter_choice")
    if kind not in kinds:
        raise InvalidArgument(f"{owner}: parameter {name!r}: expected {' or '.join(kinds)}, got {kind or 'no value'}")
    return getattr(parameters[name], kind)
