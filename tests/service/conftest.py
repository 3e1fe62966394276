"""A small real model, published by the real repository, behind a real server on a loopback port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import manifest as manifests
from export.engines.base import FakeEngine, Images, Inputs, Logits
from export.manifest import Manifest, Parity, Requirements, TensorSpec
from export.repository import Repository, Version
from service.client import Client
from service.inference import loading
from service.inference.models import Models
from service.server import Service, Serving, running
from service.settings import Settings

if TYPE_CHECKING:
    import tritonclient.grpc

CHANNELS, HEIGHT, WIDTH, CLASSES = 3, 4, 4, 5
PIXELS = CHANNELS * HEIGHT * WIDTH
MAX_BATCH = 8

Output = Literal["logits", "probabilities"]
Start = Callable[..., Serving]
Publish = Callable[..., Version]
Loaded = Callable[..., AbstractAsyncContextManager[Models]]


def small_onnx(
    weights: np.ndarray[tuple[int, int], np.dtype[np.float32]], *, stored: bool, output: Output
) -> onnx.ModelProto:
    """Return a linear classifier; `stored`: of uint8 NHWC, otherwise of float32 NCHW."""
    nodes, last = [], "images"
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array(255, "f4"), "scale")]
    if stored:
        nodes.append(helper.make_node("Cast", ["images"], ["cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Transpose", ["cast"], ["turned"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Div", ["turned", "scale"], ["scaled"]))
        last = "scaled"
    nodes.append(helper.make_node("Flatten", [last], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "weights"], ["logits"]))
    if output == "probabilities":
        nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"]))
    element = TensorProto.UINT8 if stored else TensorProto.FLOAT
    images = helper.make_tensor_value_info("images", element, ["batch", *input_shape(stored=stored)])
    answers = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "linear", [images], [answers], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def input_shape(*, stored: bool) -> tuple[int, int, int]:
    return (HEIGHT, WIDTH, CHANNELS) if stored else (CHANNELS, HEIGHT, WIDTH)


def weights_of(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((PIXELS, CLASSES)).astype(np.float32)


@pytest.fixture(scope="session")
def publish() -> Publish:
    """Publish a linear model whose weights are those of its seed."""

    def publish(
        repository: Path,
        model: str,
        *,
        seed: int = 0,
        parity: Literal["passed", "failed", "not run"] = "passed",
        max_batch: int = MAX_BATCH,
        stored: bool = False,
        output: Output = "logits",
    ) -> Version:
        target = Repository(repository)
        with target.draft(model) as draft:
            path = draft.folder / "model.onnx"
            onnx.save(small_onnx(weights_of(seed), stored=stored, output=output), path)
            datatype = "UINT8" if stored else "FP32"
            draft.describe(
                Manifest(
                    model=draft.model,
                    version=draft.version,
                    file="model.onnx",
                    sha256=manifests.sha256_of(path),
                    runtime="onnxruntime",
                    precision="fp32",
                    inputs=(TensorSpec(name="images", datatype=datatype, shape=(-1, *input_shape(stored=stored))),),
                    outputs=(TensorSpec(name=output, datatype="FP32", shape=(-1, CLASSES)),),
                    output=output,
                    class_names=("plane", "car", "bird", "cat", "deer"),
                    max_batch=max_batch,
                    requires=Requirements(runtime=">=1.27"),
                    parity=Parity(status=parity, reference="numpy", explanation="a test wanted it so"),
                )
            )
        return target.find(model)

    return publish


@pytest.fixture(scope="session")
def weights() -> Callable[[int], np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    """The weights of a model published with a seed."""
    return weights_of


@pytest.fixture(scope="session")
def images() -> Images:
    """More images than a batch of the model holds."""
    shape = (3 * MAX_BATCH + 1, CHANNELS, HEIGHT, WIDTH)
    return np.random.default_rng(1).random(shape, dtype=np.float32)


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One event loop in a thread of its own for all servers: synchronous clients run in the test's thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="servers")
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Servers:
    """Starts servers on the loop, each on a free port, and ends them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: list[AbstractAsyncContextManager[Serving]] = []

    def start(
        self, repository: Path, settings: Settings | None = None, *, services: tuple[Service, ...] = ()
    ) -> Serving:
        settings = (settings or Settings()).listening(port=0)
        context = running(repository, settings, services=services)
        serving = asyncio.run_coroutine_threadsafe(context.__aenter__(), self._loop).result(30)
        self._open.append(context)
        return serving

    def stop(self) -> None:
        for context in reversed(self._open):
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), self._loop).result(30)
        self._open.clear()


@pytest.fixture
def start(loop: asyncio.AbstractEventLoop) -> Iterator[Start]:
    """Start a server that ends with the test."""
    servers = Servers(loop)
    yield servers.start
    servers.stop()


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """Load the models of a repository without a server, in the test's own event loop."""

    @asynccontextmanager
    async def loaded(location: str | Path, settings: Settings | None = None) -> AsyncIterator[Models]:
        models = Models(location, settings or Settings())
        try:
            await models.start()
            yield models
        finally:
            await models.close()

    return loaded


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, publish: Publish) -> Path:
    """Models of all kinds.

    `linear`: version 1 (seed 0) and version 2 (seed 1); `unproven`, whose proof of parity has not run; `stored`, which
    takes uint8 (seed 0); `shares`, which answers with probabilities (seed 0).
    """
    folder = tmp_path_factory.mktemp("models")
    publish(folder, "linear", seed=0)
    publish(folder, "linear", seed=1)
    publish(folder, "unproven", parity="not run")
    publish(folder, "stored", stored=True)
    publish(folder, "shares", output="probabilities")
    return folder


@pytest.fixture(scope="session")
def serving(loop: asyncio.AbstractEventLoop, repository: Path) -> Iterator[Serving]:
    """One server of `repository` for all tests that only ask it."""
    servers = Servers(loop)
    yield servers.start(repository)
    servers.stop()


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    """Our client of `serving`."""
    with Client(serving.address, timeout=20) as client:
        yield client


@pytest.fixture
def triton(serving: Serving) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """Triton's client of `serving`."""
    from tritonclient.grpc import InferenceServerClient

    client = InferenceServerClient(serving.address)
    yield client
    client.close()


class GatedEngine(FakeEngine):
    """A linear classifier that answers when its gate is open, and keeps count; its warm-up passes the gate.

    `batches`: images of each call; `warmed_up`: of those of the warm-up, before somebody was served.
    """

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest, weights=weights_of(0))
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.closed = threading.Event()
        self.batches: list[int] = []
        self.warmed_up: list[int] = []

    def _run(self, inputs: Inputs) -> Logits:
        if threading.current_thread().name.startswith("loading"):
            self.warmed_up.append(len(inputs))
            return super()._run(inputs)
        self.batches.append(len(inputs))
        self.entered.set()
        if not self.gate.wait(20):
            raise TimeoutError("nobody opened the gate")
        return super()._run(inputs)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[GatedEngine]:
    """Make servers that start later serve gated engines; they are kept here, by model and version."""
    opened: list[GatedEngine] = []
    opening = threading.Lock()

    def open_gated(folder: Path, **options: object) -> GatedEngine:
        del options
        with opening:
            opened.append(engine := GatedEngine(manifests.verify(folder)))
            opened.sort(key=lambda each: (each.manifest.model, each.manifest.version))
        return engine

    monkeypatch.setattr(loading, "open_engine", open_gated)
    return opened
