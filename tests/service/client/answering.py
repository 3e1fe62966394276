"""A small real server of the protocol that answers as a test tells it: statuses, push-back, time."""

# ruff: noqa: ARG002 - gRPC dictates the methods' arguments

from __future__ import annotations

import json
import threading
import time
from collections import deque
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from protos.inference import open_inference_pb2 as pb
from protos.inference import open_inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = 3


@dataclass(frozen=True)
class Refusal:
    """One answer that is none."""

    status: grpc.StatusCode
    message: str = "full"
    metadata: tuple[tuple[str, str | bytes], ...] = ()


class Answering(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers ModelInfer with each image's mean in every class, after the refusals that are still to come."""

    def __init__(self) -> None:
        self.refusals: deque[Refusal] = deque()
        # When each ModelInfer came, in seconds.
        self.times: list[float] = []
        self.requests: list[pb.ModelInferRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.descriptions = 0
        self.properties = {"version": "7", "max_batch_size": "4", "class_names": json.dumps(["a", "b", "c"])}
        self.datatype = "FP32"
        # ModelInfer waits for it.
        self.gate = threading.Event()
        self.gate.set()
        # Released for each ModelInfer that has ended for its caller: answered, or given up.
        self.left = threading.Semaphore(0)
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        self._refuse(context)
        return pb.ServerReadyResponse(ready=True)

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        self.descriptions += 1
        shape = (-1, 2, 2, 3) if self.datatype == "UINT8" else (-1, 3, 2, 2)
        response = pb.ModelMetadataResponse(name=request.name, versions=["7"], properties=self.properties)
        response.inputs.add(name="images", datatype=self.datatype, shape=shape)
        response.outputs.add(name="logits", datatype="FP32", shape=(-1, CLASSES))
        return response

    def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        context.add_callback(self.left.release)
        with self._lock:
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.gate.wait(10)
            self._refuse(context)
            return self._answer(request, context)
        finally:
            with self._lock:
                self.running -= 1

    def _answer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        (tensor,) = request.inputs
        if tensor.datatype != self.datatype:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected {self.datatype}, got {tensor.datatype}")
        values = np.frombuffer(request.raw_input_contents[0], "<f4" if self.datatype == "FP32" else "u1")
        means = values.reshape(tensor.shape[0], -1).mean(axis=1, dtype=np.float32)
        response = pb.ModelInferResponse(model_name=request.model_name, model_version="7", id=request.id)
        response.outputs.add(name="logits", datatype="FP32", shape=(len(means), CLASSES))
        response.raw_output_contents.append(np.repeat(means, CLASSES).astype("<f4").tobytes())
        return response

    def _refuse(self, context: Any) -> None:
        with self._lock:
            refusal = self.refusals.popleft() if self.refusals else None
        if refusal is not None:
            context.set_trailing_metadata(refusal.metadata)
            context.abort(refusal.status, refusal.message)


@contextmanager
def serving(
    answering: open_inference_pb2_grpc.GRPCInferenceServiceServicer,
    *,
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[str]:
    """Serve on a free port of this machine while the block runs; yields HOST:PORT."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(16), options=options)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(answering, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
