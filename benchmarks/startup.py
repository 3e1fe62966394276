"""Seconds from the start of the server's process to its first answered ModelReady, for a small model.

python benchmarks/startup.py --runs 10
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.hardware import hardware
from export import manifest as manifests
from export.manifest import Manifest, Parity, Requirements, TensorSpec
from export.repository import Repository
from service.client import Client

CLASSES = 10
IMAGE = (3, 32, 32)
MAX_BATCH = 32

# Far more than a start takes; a server that hangs is to end the benchmark.
_SECONDS = 60


def publish(repository: Path, name: str, graph: onnx.GraphProto) -> None:
    """Publish a graph from `images` to `logits` as a model."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with Repository(repository).draft(name) as draft:
        path = draft.folder / "model.onnx"
        onnx.save(model, path)
        draft.describe(
            Manifest(
                model=name,
                version=draft.version,
                file="model.onnx",
                sha256=manifests.sha256_of(path),
                runtime="onnxruntime",
                precision="fp32",
                inputs=(TensorSpec(name="images", datatype="FP32", shape=(-1, *IMAGE)),),
                outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES)),),
                class_names=tuple(f"class{index}" for index in range(CLASSES)),
                max_batch=MAX_BATCH,
                requires=Requirements(runtime=">=1.27"),
                parity=Parity(status="passed", reference="none", explanation="made for a benchmark"),
            )
        )


def convolutional(*, width: int, depth: int) -> onnx.GraphProto:
    """Return a plain convolutional classifier with random weights: `depth` 3 x 3 layers, half the size after each."""
    generator = np.random.default_rng(0)
    nodes, weights, last, channels = [], [], "images", IMAGE[0]
    for layer in range(depth):
        kernel = generator.standard_normal((width, channels, 3, 3)).astype(np.float32) / channels
        weights.append(numpy_helper.from_array(kernel, f"kernel{layer}"))
        strides, inputs = [1, 1] if layer == 0 else [2, 2], [last, f"kernel{layer}"]
        nodes.append(helper.make_node("Conv", inputs, [f"maps{layer}"], pads=[1, 1, 1, 1], strides=strides))
        nodes.append(helper.make_node("Relu", [f"maps{layer}"], [f"active{layer}"]))
        last, channels = f"active{layer}", width
    head = generator.standard_normal((width, CLASSES)).astype(np.float32)
    weights.append(numpy_helper.from_array(head, "head"))
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "head"], ["logits"]))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *IMAGE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    return helper.make_graph(nodes, "convolutional", [images], [logits], weights)


@contextmanager
def server(repository: Path, *, settings: Path | None = None) -> Iterator[str]:
    """Start `tenet serve` on a free port; yields HOST:PORT and ends it."""
    command = [sys.executable, "-m", "service", "serve", "--repository", str(repository), "--port", "0"]
    if settings is not None:
        command += ["--settings", str(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            match = re.search(r" on (\S+:\d+)", line)
            if match is None:
                raise RuntimeError(f"expected `serving N models on HOST:PORT`, got {line!r}")
            yield match.group(1)
        finally:
            process.terminate()
            process.communicate()


def _seconds_to_ready(repository: Path) -> float:
    began = time.perf_counter()
    with server(repository) as address, Client(address, timeout=_SECONDS) as client:
        if not client.ready("small"):
            raise RuntimeError("expected the model to be ready")
        return time.perf_counter() - began


def main() -> None:
    """Print the runs, their median and spread, and the hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="measured starts, after one that warms the disk's cache")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder), "small", convolutional(width=16, depth=3))
        _seconds_to_ready(Path(folder))
        seconds = sorted(_seconds_to_ready(Path(folder)) for _ in range(runs))
    print(f"process start to first answered ModelReady, n = {runs}")
    print(f"  median {statistics.median(seconds):.2f} s, from {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    print(f"on {hardware()}")


if __name__ == "__main__":
    main()
