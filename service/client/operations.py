"""What can be asked of a server, written once for both clients: each operation yields calls and is sent the answers.

operation --Call | Calls--> Client or AsyncClient --gRPC--> server
          <--response, or the error of `service.errors`--
          --returns--> what the caller asked for
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from protos.audit.v1 import audit_pb2
from protos.inference import open_inference_pb2 as pb
from service.client import description, encoding
from service.client.encoding import DEFAULT_OPTIONS
from service.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from export.engines.base import Images, Logits, Stored
    from protos.inference.model_config_pb2 import ModelConfig
    from service.client.description import IndexEntry, ModelMetadata, ModelStatistics, Prediction, ServerMetadata
    from service.client.encoding import RequestOptions

# A number, or an alias.
Version = int | str | None

# Audits a page: as many as the server gives at once.
_PAGE = 1000

# Seconds a call may take; audits of large images on a busy CPU stay well below it.
DEFAULT_TIMEOUT_S = 60.0

# Requests at once where a caller has many: enough to hide the way to the server and back, and to feed its instances.
DEFAULT_IN_FLIGHT = 4

# Seconds that loading may take: an engine that is built anew for this machine takes minutes.
LOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        method: its name, of the inference service or the audit service.
        request: its message; serialised already for ModelInfer, so that what is sent again is what was sent.
        timeout_s: seconds that it may take; the client's own if None.
        repeatable: whether a second one does no harm if the first has arrived.
    """

    method: str
    request: Message | bytes
    timeout_s: float | None = None
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls one after another, `in_flight` of them at once; answered by the list of their responses, in their order."""

    calls: Iterable[Call]
    in_flight: int


Result = TypeVar("Result")
Steps: TypeAlias = Generator[Call | Calls, Any, Result]


class Operations:
    """The operations; one instance a client, as it keeps what it knows of models."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], ModelMetadata] = {}

    def ready(self, model: str | None, *, version: Version) -> Steps[bool]:
        """Ask whether a server, or one of its models, is ready."""
        if model is None:
            return bool((yield Call("ServerReady", pb.ServerReadyRequest())).ready)
        return bool((yield Call("ModelReady", pb.ModelReadyRequest(name=model, version=_name(version)))).ready)

    def server_metadata(self) -> Steps[ServerMetadata]:
        """Ask who the server is."""
        response: pb.ServerMetadataResponse = yield Call("ServerMetadata", pb.ServerMetadataRequest())
        return description.ServerMetadata(response.name, response.version, tuple(response.extensions))

    def metadata(self, model: str, *, version: Version) -> Steps[ModelMetadata]:
        """Ask what a model is."""
        request = pb.ModelMetadataRequest(name=model, version=_name(version))
        described = description.model_metadata((yield Call("ModelMetadata", request)))
        self._known[model, _name(version)] = described
        return described

    def config(self, model: str, *, version: Version) -> Steps[ModelConfig]:
        """Ask for a model's configuration."""
        request = pb.ModelConfigRequest(name=model, version=_name(version))
        response: pb.ModelConfigResponse = yield Call("ModelConfig", request)
        return response.config

    def statistics(self, model: str, *, version: Version) -> Steps[list[ModelStatistics]]:
        """Ask what versions have done."""
        request = pb.ModelStatisticsRequest(name=model, version=_name(version))
        response: pb.ModelStatisticsResponse = yield Call("ModelStatistics", request)
        return [description.model_statistics(each) for each in response.model_stats]

    def index(self, *, ready: bool) -> Steps[list[IndexEntry]]:
        """Ask for the repository's index."""
        response: pb.RepositoryIndexResponse = yield Call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))
        return [description.IndexEntry(each.name, each.version, each.state, each.reason) for each in response.models]

    def load(self, model: str, *, timeout_s: float) -> Steps[None]:
        """Have a model loaded."""
        yield Call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=model), timeout_s=timeout_s)

    def unload(self, model: str, *, timeout_s: float) -> Steps[None]:
        """Have a model unloaded."""
        yield Call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=model), timeout_s=timeout_s)

    def infer(
        self,
        images: Images | Stored,
        *,
        model: str,
        version: Version,
        batch: int | None,
        options: RequestOptions,
        in_flight: int,
    ) -> Steps[Logits]:
        """Have images classified."""
        encoding.check_images(images)
        known = self._known.get((model, _name(version)))
        failed: Exception | None = None
        if known is not None and len(images) <= (batch or encoding.batch_size(known, images)):
            try:
                inputs = encoding.as_inputs(images, known)
                request = encoding.with_images(inputs, known, version=_name(version), options=options)
                return encoding.logits_of((yield _inference(request, options)))
            except (ValueError, InvalidArgument, NotFound) as error:
                # The model may be another since it was described: ask again, then say what is wrong with the images.
                failed = error
        described = yield from self.metadata(model, version=version)
        if failed is not None and described == known:
            raise failed
        inputs = encoding.as_inputs(images, described)
        pinned = pinned_version(described, version)
        size = batch or encoding.batch_size(described, inputs)
        requests = (
            encoding.with_images(inputs[start : start + size], described, version=pinned, options=options)
            for start in range(0, len(inputs), size)
        )
        return (yield from _answers(requests, options=options, in_flight=in_flight))

    def infer_encoded(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version,
        batch: int | None,
        options: RequestOptions,
        in_flight: int,
    ) -> Steps[Logits]:
        """Have encoded images classified."""
        described = yield from self.metadata(model, version=version)
        return (
            yield from _encoded(images, described, version=version, batch=batch, options=options, in_flight=in_flight)
        )

    def classify(
        self,
        images: Iterable[bytes],
        *,
        model: str,
        version: Version,
        top: int,
        options: RequestOptions,
        in_flight: int,
    ) -> Steps[list[list[Prediction]]]:
        """Have encoded images classified, and name the classes."""
        described = yield from self.metadata(model, version=version)
        answers = yield from _encoded(
            images, described, version=version, batch=None, options=options, in_flight=in_flight
        )
        # By the description that the images were sent with: the model may be known by another since.
        return described.predictions(answers, top=top)

    def submit_audit(self, plan: str) -> Steps[audit_pb2.Audit]:
        """Submit an audit: a second one would be a second audit."""
        request = audit_pb2.SubmitAuditRequest(plan=plan)
        submitted: audit_pb2.Audit = yield Call("SubmitAudit", request, repeatable=False)
        return submitted

    def audit(self, audit_id: str) -> Steps[audit_pb2.Audit]:
        """Ask for one audit."""
        found: audit_pb2.Audit = yield Call("GetAudit", audit_pb2.GetAuditRequest(id=audit_id))
        return found

    def audits(self, *, limit: int) -> Steps[list[audit_pb2.Audit]]:
        """Ask for the newest audits, page by page."""
        found: list[audit_pb2.Audit] = []
        token = ""
        while len(found) < limit:
            request = audit_pb2.ListAuditsRequest(page_size=min(limit - len(found), _PAGE), page_token=token)
            response: audit_pb2.ListAuditsResponse = yield Call("ListAudits", request)
            found.extend(response.audits)
            if not (token := response.next_page_token):
                break
        return found

    def cancel_audit(self, audit_id: str) -> Steps[audit_pb2.Audit]:
        """Cancel an audit: the second time, it has ended."""
        request = audit_pb2.CancelAuditRequest(id=audit_id)
        cancelled: audit_pb2.Audit = yield Call("CancelAudit", request, repeatable=False)
        return cancelled

    def audit_report(self, audit_id: str, *, html: bool) -> Steps[bytes]:
        """Ask for an audit's report."""
        kind = audit_pb2.REPORT_FORMAT_HTML if html else audit_pb2.REPORT_FORMAT_JSON
        request = audit_pb2.GetReportRequest(id=audit_id, format=kind)
        response: audit_pb2.Report = yield Call("GetReport", request)
        return response.content


def batch_call(
    images: Images | Stored, described: ModelMetadata, *, version: Version, options: RequestOptions = DEFAULT_OPTIONS
) -> Call:
    """Return the call for one batch of a model that has been described."""
    inputs = encoding.as_inputs(images, described)
    pinned = pinned_version(described, version)
    return _inference(encoding.with_images(inputs, described, version=pinned, options=options), options)


def check_in_flight(in_flight: int) -> None:
    """Raise ValueError unless it is a number of requests that may be on their way at once."""
    if in_flight < 1:
        raise ValueError(f"in_flight: expected 1 request on its way, or more, got {in_flight}")


def pinned_version(described: ModelMetadata, version: Version) -> str:
    """Return the version that was described: what an alias, or no version, means may change between two calls."""
    return described.properties.get("version") or _name(version)


def _encoded(
    images: Iterable[bytes],
    described: ModelMetadata,
    *,
    version: Version,
    batch: int | None,
    options: RequestOptions,
    in_flight: int,
) -> Steps[Logits]:
    pinned = pinned_version(described, version)
    requests = (
        encoding.with_encoded(part, described, version=pinned, options=options)
        for part in encoding.parts_of(images, described, batch=batch)
    )
    return (yield from _answers(requests, options=options, in_flight=in_flight))


def _answers(requests: Iterable[bytes], *, options: RequestOptions, in_flight: int) -> Steps[Logits]:
    responses = yield Calls((_inference(request, options) for request in requests), in_flight)
    if not responses:
        raise ValueError("expected at least 1 image, got none")
    return np.concatenate([encoding.logits_of(response) for response in responses])


def _inference(request: bytes, options: RequestOptions) -> Call:
    return Call("ModelInfer", request, timeout_s=options.timeout_s)


def _name(version: Version) -> str:
    return "" if version is None else str(version)
