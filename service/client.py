"""A client of the service, and of every other server that speaks the Open Inference Protocol.

images --as the model takes them, batches--> ModelInfer --> logits
a status --> the error of `service.errors` that it stands for
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import numpy as np

from export.engines.base import Images, Inputs, Logits, Stored, as_stored
from protos.audit.v1 import audit_pb2, audit_pb2_grpc
from protos.inference import open_inference_pb2 as pb
from protos.inference import open_inference_pb2_grpc
from service.errors import DeadlineExceeded, Unavailable, error_from_status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

# Seconds a call may take; audits of large images on a busy CPU stay well below it.
DEFAULT_TIMEOUT = 60.0

# Images a request, where neither caller nor server says: large enough to fill an engine, small enough to be fair.
_DEFAULT_BATCH = 64

# Bytes of images a request. Servers take 64 MiB or more; a sixteenth of a second on a gigabit network.
_REQUEST_BYTES = 8 << 20

# How the datatypes that models take lie in a request.
_WIRE = {"FP32": "<f4", "UINT8": "u1"}

# gRPC has one status for "no server there" and "the server says that it is unavailable"; only its words differ.
_NOT_REACHED = ("failed to connect", "errors resolving", "DNS resolution failed", "Socket closed", "Connection reset")


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor of a model: its name, protocol datatype, and shape with -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelMetadata:
    """A model as its server describes it; other servers than ours may give no properties."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    properties: dict[str, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; empty if the server does not tell."""
        return tuple(json.loads(self.properties.get("class_names", "[]")))

    @property
    def channels_last(self) -> bool:
        """Whether the model takes images as they are stored, uint8 NHWC; otherwise float32 NCHW in [0, 1]."""
        return self.inputs[0].datatype == "UINT8"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, whatever order the model takes it in; -1 for any size."""
        if self.channels_last:
            _, height, width, channels = self.inputs[0].shape
        else:
            _, channels, height, width = self.inputs[0].shape
        return channels, height, width

    @property
    def answers_probabilities(self) -> bool:
        """Whether the model applies softmax itself; a server that does not tell is judged by its output's name."""
        return self.properties.get("output", self.outputs[0].name) == "probabilities"


class Client:
    """A connection to one server, synchronous; use it in a `with` block.

    Every call raises `Unavailable` if the server cannot be reached, `DeadlineExceeded` if it does not answer in
    time, and otherwise the error of `service.errors` that the server answered with.
    """

    def __init__(self, server: str, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Connect at the first call.

        Args:
            server: HOST:PORT.
            timeout: seconds that each call may take.
        """
        self._server = server
        self._timeout = timeout
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(server, options=unlimited)
        self._inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._audits = audit_pb2_grpc.AuditServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def ready(self, model: str | None = None, *, version: int | None = None) -> bool:
        """Return whether the server serves all that it should; or whether it serves this model or version."""
        with self._errors():
            if model is None:
                return self._inference.ServerReady(pb.ServerReadyRequest(), timeout=self._timeout).ready
            request = pb.ModelReadyRequest(name=model, version=_version(version))
            return self._inference.ModelReady(request, timeout=self._timeout).ready

    def metadata(self, model: str, *, version: int | None = None) -> ModelMetadata:
        """Return how the server describes a model, in its latest version if none is named."""
        request = pb.ModelMetadataRequest(name=model, version=_version(version))
        with self._errors():
            response = self._inference.ModelMetadata(request, timeout=self._timeout)
        return ModelMetadata(
            name=response.name,
            versions=tuple(response.versions),
            platform=response.platform,
            inputs=tuple(TensorMetadata(each.name, each.datatype, tuple(each.shape)) for each in response.inputs),
            outputs=tuple(TensorMetadata(each.name, each.datatype, tuple(each.shape)) for each in response.outputs),
            properties=dict(response.properties),
        )

    def infer(
        self, images: Images | Stored, *, model: str, version: int | None = None, batch: int | None = None
    ) -> Logits:
        """Return the answers to any number of images, all of them from one version.

        Args:
            images: (N, C, H, W) float32 in [0, 1], N >= 1, for every model: one that takes uint8 is sent each value
                times 255, rounded half to even. Or, for such a model alone, what it takes: (N, H, W, C) uint8.
            model: its name on the server.
            version: its version; the latest when the call begins if None.
            batch: images a request; as many as the server takes, 64 at most, if None.

        Returns:
            (N, classes): logits, or probabilities where the model applies softmax (`ModelMetadata`).

        Raises:
            ValueError: the images are not of that form.
        """
        if images.ndim != 4 or images.dtype not in {np.dtype(np.float32), np.dtype(np.uint8)} or images.size == 0:
            raise ValueError(
                f"expected float32 images of shape (N, C, H, W), or uint8 ones of shape (N, H, W, C) for a model that "
                f"takes them, got {images.dtype} {images.shape}"
            )
        described = self.metadata(model, version=version)
        inputs = _inputs(images, described)
        name = _version(version) or described.properties.get("version", "")
        size = batch or _batch_size(described, inputs)
        parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        return np.concatenate([self._infer_batch(part, described, version=name) for part in parts])

    def submit_audit(self, plan: str) -> audit_pb2.Audit:
        """Submit an audit plan (TOML); raises `InvalidArgument` naming the key that cannot be used."""
        with self._errors():
            return self._audits.SubmitAudit(audit_pb2.SubmitAuditRequest(plan=plan), timeout=self._timeout)

    def audit(self, audit_id: str) -> audit_pb2.Audit:
        """Return one audit as it stands; raises `NotFound`."""
        with self._errors():
            return self._audits.GetAudit(audit_pb2.GetAuditRequest(id=audit_id), timeout=self._timeout)

    def audits(self, *, limit: int) -> list[audit_pb2.Audit]:
        """Return the newest audits, at most `limit` of them."""
        found: list[audit_pb2.Audit] = []
        token = ""
        while len(found) < limit:
            request = audit_pb2.ListAuditsRequest(page_size=min(limit - len(found), 1000), page_token=token)
            with self._errors():
                response = self._audits.ListAudits(request, timeout=self._timeout)
            found.extend(response.audits)
            if not (token := response.next_page_token):
                break
        return found

    def watch_audit(self, audit_id: str, *, offset: int = 0) -> Iterator[audit_pb2.AuditProgress]:
        """Yield an audit's progress from event `offset` on, as it happens, until it has ended; raises `NotFound`."""
        with self._errors():
            # No deadline: an audit takes what it takes.
            yield from self._audits.WatchAudit(audit_pb2.WatchAuditRequest(id=audit_id, offset=offset))

    def cancel_audit(self, audit_id: str) -> audit_pb2.Audit:
        """Cancel an audit; raises `NotFound`, or `FailedPrecondition` if it has ended."""
        with self._errors():
            return self._audits.CancelAudit(audit_pb2.CancelAuditRequest(id=audit_id), timeout=self._timeout)

    def audit_report(self, audit_id: str, *, html: bool = False) -> bytes:
        """Return an audit's report, JSON or HTML; raises `NotFound`, or `FailedPrecondition` if it has none (yet)."""
        kind = audit_pb2.REPORT_FORMAT_HTML if html else audit_pb2.REPORT_FORMAT_JSON
        with self._errors():
            response = self._audits.GetReport(
                audit_pb2.GetReportRequest(id=audit_id, format=kind), timeout=self._timeout
            )
        return response.content

    def _infer_batch(self, inputs: Inputs, described: ModelMetadata, *, version: str) -> Logits:
        (spec,) = described.inputs
        request = pb.ModelInferRequest(model_name=described.name, model_version=version)
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=inputs.shape)
        request.outputs.add(name=described.outputs[0].name)
        request.raw_input_contents.append(inputs.astype(_WIRE[spec.datatype], copy=False).tobytes())
        with self._errors():
            response = self._inference.ModelInfer(request, timeout=self._timeout)
        return _logits(response)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn gRPC's errors into ours."""
        try:
            yield
        except grpc.RpcError as error:
            # The stubs' errors are calls, too: that is where status and message are.
            status, message = error.code(), error.details() or ""
            if status is grpc.StatusCode.UNAVAILABLE and message.startswith(_NOT_REACHED):
                raise Unavailable(f"cannot reach {self._server}; is `tenet serve` running there?") from error
            if status is grpc.StatusCode.CANCELLED:
                # Not by us: a server that ends drops what comes in its last moment, or outlasts its grace period.
                raise Unavailable(
                    f"{self._server} dropped the call, as a server that shuts down may; try again"
                ) from error
            if status is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"{self._server} did not answer within {self._timeout:g} s") from error
            raise error_from_status(status, message) from error


def _version(version: int | None) -> str:
    return "" if version is None else str(version)


def _inputs(images: Images | Stored, described: ModelMetadata) -> Inputs:
    """Return images as the model takes them."""
    datatype = described.inputs[0].datatype
    if datatype not in _WIRE:
        raise ValueError(f"{described.name}: expected a model that takes FP32 or UINT8, got one that takes {datatype}")
    if images.dtype == np.float32:
        return as_stored(images) if described.channels_last else images
    if not described.channels_last:
        raise ValueError(
            f"{described.name}: expected float32 images in [0, 1] of shape (N, C, H, W), got uint8 {images.shape}; "
            "the model takes FP32: divide by 255 and put the channels first"
        )
    return images


def _batch_size(described: ModelMetadata, inputs: Inputs) -> int:
    taken = int(described.properties.get("max_batch_size", _DEFAULT_BATCH))
    fitting: int = _REQUEST_BYTES // inputs[0].nbytes
    return max(1, min(taken, _DEFAULT_BATCH, fitting))


def _logits(response: pb.ModelInferResponse) -> Logits:
    (tensor,) = response.outputs
    if tensor.datatype != "FP32":
        raise ValueError(f"output {tensor.name!r}: expected datatype FP32, got {tensor.datatype}")
    if response.raw_output_contents:
        values = np.frombuffer(response.raw_output_contents[0], "<f4")
    else:
        values = np.array(tensor.contents.fp32_contents, "<f4")
    return values.reshape(tuple(tensor.shape))
