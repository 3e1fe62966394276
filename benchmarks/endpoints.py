"""Where a server answers: one request to it, and h2load's load of that request.

image --request--> Endpoint: path, headers, body --ask--> logits
                                                 --load--> requests a second, 99th percentile of their time
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import grpc
import numpy as np

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from export.engines.base import Images, Logits

MODEL = "model"

# Seconds of load before it is measured, whole ones for h2load: connections are opened, threads and caches warmed up.
_WARM_UP_S = 1
# Seconds that one request may take: hundreds of times what the slowest server needs.
_PATIENCE_S = 10

# How an image travels: by the Open Inference Protocol, as plain bytes by HTTP, or as base64 in JSON.
Wire = Literal["grpc", "bytes", "json"]

_CONTENT_TYPES: dict[Wire, str] = {
    "grpc": "application/grpc",
    "bytes": "application/octet-stream",
    "json": "application/json",
}


class Speed(NamedTuple):
    """What a load found: requests a second, and the 99th percentile of their time in milliseconds."""

    rate: float
    p99: float


@dataclass(frozen=True)
class Endpoint:
    """A server on this machine.

    Attributes:
        path: of the method, for HTTP.
        region: the shared memory that the image lies in and was registered by; sent in the request if there is none.
    """

    port: int
    wire: Wire = "grpc"
    path: str = "/inference.GRPCInferenceService/ModelInfer"
    region: str | None = None

    def ask(self, image: Images) -> Logits:
        """Ask once, and return the answer.

        Raises:
            grpc.RpcError, OSError: no answer, as long as the server starts.
        """
        return self._ask_by_grpc(image) if self.wire == "grpc" else self._ask_by_http(image)

    def load(self, image: Images, *, flight: int, seconds: int) -> Speed:
        """Keep `flight` requests in flight: one connection of as many HTTP/2 streams, or HTTP/1.1 connections.

        Raises:
            RuntimeError: requests failed, or were answered by less than logits.
        """
        with tempfile.TemporaryDirectory() as folder:
            body, log = Path(folder, "body"), Path(folder, "log")
            body.write_bytes(self._framed(image))
            streams = ["-c1", f"-m{flight}"] if self.wire == "grpc" else ["--h1", f"-c{flight}"]
            headers = [part for line in self._headers.items() for part in ("-H", ": ".join(line))]
            time = [f"-D{seconds}", f"--warm-up-time={_WARM_UP_S}"]
            command = ["h2load", "-t1", *streams, *time, *headers, f"-d{body}", f"--log-file={log}"]
            url = f"http://127.0.0.1:{self.port}{self.path}"
            done = subprocess.run([*command, url], capture_output=True, text=True, check=False)
            rate = _rate(done.stdout + done.stderr)
            times = np.loadtxt(io.StringIO(log.read_text()), usecols=2)  # microseconds
        return Speed(rate, float(np.percentile(times, 99)) / 1000)

    @property
    def _headers(self) -> dict[str, str]:
        trailers = {"te": "trailers"} if self.wire == "grpc" else {}
        return {"content-type": _CONTENT_TYPES[self.wire], **trailers}

    def _framed(self, image: Images) -> bytes:
        if self.wire == "grpc":
            message = self._request(image).SerializeToString()
            return b"\0" + len(message).to_bytes(4, "big") + message
        if self.wire == "json":
            return json.dumps({"images": [base64.b64encode(image.tobytes()).decode()]}).encode()
        return image.tobytes()

    def _request(self, image: Images) -> pb.ModelInferRequest:
        request = pb.ModelInferRequest(model_name=MODEL)
        request.outputs.add(name="logits")
        tensor = request.inputs.add(name="images", datatype="FP32", shape=image.shape)
        if self.region is None:
            request.raw_input_contents.append(image.tobytes())
        else:
            tensor.parameters["shared_memory_region"].string_param = self.region
            tensor.parameters["shared_memory_byte_size"].int64_param = image.nbytes
        return request

    def _ask_by_grpc(self, image: Images) -> Logits:
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            response = GRPCInferenceServiceStub(channel).ModelInfer(self._request(image), timeout=_PATIENCE_S)
        if response.raw_output_contents:
            return np.frombuffer(response.raw_output_contents[0], np.float32)
        return np.array(response.outputs[0].contents.fp32_contents, np.float32)

    def _ask_by_http(self, image: Images) -> Logits:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("POST", self.path, self._framed(image), self._headers)
            response = connection.getresponse()
            content = response.read()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"expected status 200, got {response.status}: {content[:200]!r}")
        if self.wire == "json":
            return np.array(json.loads(content), np.float32).ravel()
        return np.frombuffer(content, np.float32)


def _rate(output: str) -> float:
    """Return requests a second out of what h2load says; a gRPC error has status 200, and no data."""
    rate = re.search(r"([\d.]+) req/s", output)
    counts = re.search(r"(\d+) succeeded, 0 failed, 0 errored", output)
    data = re.search(r"\((\d+)\) data", output)
    if rate is None or counts is None or data is None or int(data.group(1)) < int(counts.group(1)):
        raise RuntimeError(f"expected h2load to see every request answered, got: {output[-800:]}")
    return float(rate.group(1))
