"""Reading a request and its tensor: as the server does, and by protobuf alone.

    python benchmarks/wire.py --seconds 0.5 --rounds 5

Both read the same bytes in turns; first with the C library as it is, then with the limits raised above which it gives
memory back to the system (`service.memory`; glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_), as in the
server. glibc raises the first of them by itself once a large block was freed: a server that has just started, or whose
tensors vary in size, loses more than the first half of the table shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.hardware import hardware
from export.manifest import TensorSpec
from protos.inference import open_inference_pb2 as pb
from service import memory
from service.inference import tensors, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# One image of 32 x 32; about where `wire` begins to slice; one, and fifteen, of 224 x 224.
_SHAPES = ((1, 3, 32, 32), (1, 3, 53, 53), (1, 3, 224, 224), (15, 3, 224, 224))

_LARGEST_BATCH = 16

_MICROSECONDS = 1e6  # a second


def request_of(shape: tuple[int, ...]) -> bytes:
    """Return a request for one batch of images, as a client sends it."""
    images = np.ones(shape, "<f4")
    request = pb.ModelInferRequest(model_name="resnet20", id="1", raw_input_contents=[images.tobytes()])
    request.inputs.add(name="images", datatype="FP32", shape=shape)
    request.outputs.add(name="logits")
    return request.SerializeToString()


def by_protobuf(data: bytes) -> None:
    """Read a request in the plainest way, and check nothing."""
    request = pb.ModelInferRequest.FromString(data)
    np.frombuffer(request.raw_input_contents[0], "<f4").reshape(tuple(request.inputs[0].shape))


def by_protobuf_and_tensors(data: bytes, specs: Sequence[TensorSpec]) -> None:
    """Read a request in the plainest way, and check what the server checks."""
    message = pb.ModelInferRequest.FromString(data)
    tensors.decode_inputs(wire.InferRequest(message, [*message.raw_input_contents]), specs, max_batch=_LARGEST_BATCH)


def by_wire_and_tensors(data: bytes, specs: Sequence[TensorSpec]) -> None:
    """Read a request as the server does."""
    tensors.decode_inputs(wire.parse(data), specs, max_batch=_LARGEST_BATCH)


def microseconds(read: Callable[[], object], *, seconds: float) -> float:
    """Return the CPU time that one call takes, on average."""
    calls = 0
    began = time.process_time()
    while (passed := time.process_time() - began) < seconds:
        for _ in range(16):
            read()
        calls += 16
    return passed / calls * _MICROSECONDS


def compare(shape: tuple[int, ...], *, seconds: float, rounds: int) -> None:
    """Print one row of the table: medians of the rounds, and the range of the ratio."""
    data = request_of(shape)
    specs = (TensorSpec(name="images", datatype="FP32", shape=(-1, *shape[1:])),)
    ways: tuple[Callable[[], object], ...] = (
        lambda: by_wire_and_tensors(data, specs),
        lambda: by_protobuf_and_tensors(data, specs),
        lambda: by_protobuf(data),
    )
    times = [[microseconds(way, seconds=seconds) for way in ways] for _ in range(rounds)]
    ratios = [plain / ours for ours, _, plain in times]
    medians = " | ".join(f"{statistics.median(one):.1f}" for one in zip(*times, strict=True))
    print(f"| {len(data):,} | {medians} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


def main() -> None:
    """Print CPU microseconds a request, and how many times as long protobuf takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way and size")
    given = parser.parse_args()
    for malloc in ("as it is", "with raised limits"):
        if malloc != "as it is":
            memory.keep_freed_tensors()
        print(f"\nmalloc {malloc}\n")
        print("| bytes | wire + checks, µs | protobuf + checks, µs | protobuf alone, µs | last / first (range) |")
        print("|---:|---:|---:|---:|---:|")
        for shape in _SHAPES:
            compare(shape, seconds=given.seconds, rounds=given.rounds)
    print(f"\nCPU time; {hardware()}; medians of {given.rounds} rounds of {given.seconds} s")


if __name__ == "__main__":
    main()
