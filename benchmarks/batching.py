"""Throughput with dynamic batching and without it (batches of one), side by side in one run.

    python benchmarks/batching.py --seconds 3 --rounds 5 --concurrency 32

Both servers run at once, and are asked in turns: what else the machine does meets both alike. Last comes what batching
itself costs: requests a second to an engine that does nothing, without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.hardware import hardware
from benchmarks.startup import CLASSES, IMAGE, MAX_BATCH, convolutional, publish, server
from export.engines.base import Inputs, Logits
from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from service.inference.batching import Batcher, Execution, Rejection
from service.settings import Batching

_HIDDEN = 1024  # units; weights of 16 MB, more than a core's own caches hold


def dense() -> onnx.GraphProto:
    """Return a classifier of three dense layers with random weights: one image is as much memory traffic as many."""
    generator = np.random.default_rng(0)
    sizes = (int(np.prod(IMAGE)), _HIDDEN, _HIDDEN, CLASSES)
    nodes, weights, last = [helper.make_node("Flatten", ["images"], ["flat"])], [], "flat"
    for layer, (before, after) in enumerate(pairwise(sizes)):
        matrix = generator.standard_normal((before, after)).astype(np.float32) / before
        weights.append(numpy_helper.from_array(matrix, f"matrix{layer}"))
        output = "logits" if after == CLASSES else f"units{layer}"
        nodes.append(helper.make_node("Gemm", [last, f"matrix{layer}"], [output]))
        last = output
        if after != CLASSES:
            nodes.append(helper.make_node("Relu", [output], [f"active{layer}"]))
            last = f"active{layer}"
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *IMAGE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    return helper.make_graph(nodes, "dense", [images], [logits], weights)


async def images_per_second(address: str, model: str, *, concurrency: int, seconds: float) -> float:
    """Ask for one image at a time from `concurrency` callers; return the images answered a second."""
    image = np.random.default_rng(0).random((1, *IMAGE), dtype=np.float32)
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[image.tobytes()])
    request.inputs.add(name="images", datatype="FP32", shape=image.shape)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(request)
        began = time.perf_counter()

        async def ask() -> int:
            answered = 0
            while time.perf_counter() - began < seconds:
                await stub.ModelInfer(request)
                answered += 1
            return answered

        answered = sum(await asyncio.gather(*(ask() for _ in range(concurrency))))
        return answered / (time.perf_counter() - began)


class _Nobody:
    """An observer that counts nothing."""

    def executed(self, execution: Execution) -> None:
        pass

    def rejected(self, reason: Rejection) -> None:
        pass


async def submits_per_second(*, concurrency: int, seconds: float) -> float:
    """Submit one image at a time from `concurrency` callers to an engine that does nothing; return answers a second."""
    batcher = Batcher([_nothing], name="nothing", max_batch=MAX_BATCH, settings=Batching(), observer=_Nobody())
    image = np.zeros((1, *IMAGE), np.float32)
    began = time.perf_counter()

    async def ask() -> int:
        answered = 0
        while time.perf_counter() - began < seconds:
            await batcher.submit(image)
            answered += 1
        return answered

    answered = sum(await asyncio.gather(*(ask() for _ in range(concurrency))))
    rate = answered / (time.perf_counter() - began)
    await batcher.close()
    return rate


def _nothing(images: Inputs) -> Logits:
    return images[:, 0, 0, :CLASSES]


def main() -> None:
    """Print images a second with and without batching, and their ratio, for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each server and model")
    parser.add_argument("--concurrency", type=int, default=32, help="callers that wait for one answer each")
    given = parser.parse_args()
    models = {"convolutional": convolutional(width=32, depth=4), "dense": dense()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        repository, single = Path(folder) / "models", Path(folder) / "single.toml"
        for name, graph in models.items():
            publish(repository, name, graph)
        single.write_text("[batching]\nmax_batch_size = 1\n")
        addresses = (
            stack.enter_context(server(repository)),
            stack.enter_context(server(repository, settings=single)),
        )
        print(f"images a second, {given.concurrency} callers, one image a request, n = {given.rounds} rounds")
        print(f"{'model':<14} {'batched':>9} {'single':>9} {'ratio, median (lowest to highest)':>36}")
        for name in models:
            rounds = [
                [
                    asyncio.run(images_per_second(address, name, concurrency=given.concurrency, seconds=given.seconds))
                    for address in addresses
                ]
                for _ in range(given.rounds)
            ]
            _print_row(name, rounds)
    for concurrency in (1, 8, given.concurrency):
        rates = [
            asyncio.run(submits_per_second(concurrency=concurrency, seconds=given.seconds)) for _ in range(given.rounds)
        ]
        print(f"batching alone, {concurrency} callers: {statistics.median(rates):.0f} requests/s (median)")
    print(f"on {hardware()}, callers on the same cores")


def _print_row(name: str, rounds: list[list[float]]) -> None:
    batched, single = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = sorted(with_batching / without for with_batching, without in rounds)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{name:<14} {batched:>9.0f} {single:>9.0f} {spread:>36}")


if __name__ == "__main__":
    main()
