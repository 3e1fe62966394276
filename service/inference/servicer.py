"""The Open Inference Protocol with Triton's extensions: protobuf in, protobuf out, the models behind it.

ModelInfer, ModelStreamInfer --> inference        Repository… --> model control       SystemSharedMemory… --> regions
ModelMetadata, ModelConfig, ModelStatistics --> models                     LogSettings, TraceSetting --> settings
"""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from export.pictures import MODES
from protos.inference import open_inference_pb2 as pb
from protos.inference import open_inference_pb2_grpc
from service.errors import NotFound, Unimplemented, told
from service.inference import model_config, model_control, wire
from service.inference.inference import Inference
from service.inference.log_settings import LogSettings
from service.inference.pictures import Pictures
from service.inference.shared_memory import Regions
from service.inference.streams import in_order
from service.inference.trace_settings import TraceSettings
from service.version import VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import grpc

    from export.manifest import TensorSpec
    from service.inference.models import Models, ServedVersion
    from service.inference.wire import InferRequest
    from service.settings import Settings

    Context = grpc.aio.ServicerContext[Any, Any]

# What parses the requests of some methods in place of the generated code: it slices tensors instead of copying them.
DESERIALISERS = {"ModelInfer": wire.parse, "ModelStreamInfer": wire.parse}

# Triton's names of the extensions that are served.
_EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "parameters",
    "statistics",
    "trace",
    "logging",
)

# With this metadata an error ends a stream with its status, instead of being one of its answers.
_STATUS_WANTED = ("triton_grpc_error", "true")

# Seconds beyond which nobody waits: thirty years.
_FOR_EVER_S = 1e9


class InferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves the models; every error is one of `service.errors`, made a status at the boundary.

    Args:
        models: that are served.
        settings: of the server.
        tracing: which calls are traced, where something reads it.
    """

    def __init__(self, models: Models, settings: Settings, *, tracing: TraceSettings | None = None) -> None:
        self._models = models
        self._pictures = Pictures(settings.images)
        self._regions = Regions(settings.shared_memory.enabled)
        max_bytes = settings.server.max_message_mib << 20
        self._inference = Inference(models, pictures=self._pictures, regions=self._regions, max_bytes=max_bytes)
        self._log = LogSettings(settings.logging)
        self._tracing = tracing or TraceSettings(settings.tracing)
        self._extensions = (*_EXTENSIONS, *(("system_shared_memory",) if settings.shared_memory.enabled else ()))

    def close(self) -> None:
        """End the threads that decode, and let go of shared memory; the models go on."""
        self._pictures.close()
        self._regions.close()

    # The server

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Answer: who can answer is live."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Answer whether every model that should be served is served."""
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Answer who this is, and which extensions are served."""
        return pb.ServerMetadataResponse(name="tenet", version=VERSION, extensions=self._extensions)

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Context) -> pb.LogSettingsResponse:
        """Set what is logged, and answer with what is."""
        self._log.update(request.settings)
        response = pb.LogSettingsResponse()
        for name, value in self._log.read().items():
            setting = response.settings[name]
            # A bool is an int, too.
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int):
                setting.uint32_param = value
            else:
                setting.string_param = value
        return response

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Context) -> pb.TraceSettingResponse:
        """Set which calls are traced, and answer with which are."""
        if request.model_name:
            self._models.find(request.model_name)
            if request.settings:
                raise Unimplemented(
                    f"model_name {request.model_name!r}: expected none; calls of all models are traced alike"
                )
        self._tracing.update({name: setting.value for name, setting in request.settings.items()})
        response = pb.TraceSettingResponse()
        for name, value in self._tracing.read().items():
            response.settings[name].value.append(value)
        return response

    # Models

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Answer whether a model, or a version of it, answers; an unknown one does not, which is no error."""
        try:
            self._models.find(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._models.retiring)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Describe a model; `properties` tells its engine from every other."""
        version = self._models.find(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=map(str, self._models.versions(request.name)),
            platform=model_config.PLATFORMS[version.manifest.file],
            inputs=[_tensor_metadata(version.input)],
            outputs=[_tensor_metadata(version.output)],
            properties=_properties(version, aliases=self._models.aliases(version)),
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Answer with a model's configuration, as Triton would have it."""
        version = self._models.find(request.name, request.version)
        config = model_config.config_of(version, versions=self._models.versions(request.name))
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Answer with what the versions of one model, or of all, have done."""
        response = pb.ModelStatisticsResponse()
        for version in self._counted(request.name, request.version):
            manifest = version.manifest
            response.model_stats.append(version.statistics.as_message(manifest.model, str(manifest.version)))
        return response

    def _counted(self, name: str, version: str) -> Iterator[ServedVersion]:
        if not name:
            yield from self._models.all()
        elif version or not (versions := self._models.versions(name)):
            # The second raises: no such model, or none of its versions answers.
            yield self._models.find(name, version)
        else:
            yield from (self._models.find(name, str(number)) for number in versions)

    # Inference

    async def ModelInfer(self, request: InferRequest, context: Context) -> pb.ModelInferResponse:  # type: ignore[override]
        """Answer one inference, in the form (raw or typed) in which it was asked."""
        return await self._inference.answer(request, left_s=_left_s(context))

    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[InferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answer inferences in their order; an error is the answer to its request, and the stream goes on."""
        told = _STATUS_WANTED in ((key, value) for key, value in context.invocation_metadata() or ())

        async def answer(request: InferRequest) -> pb.ModelStreamInferResponse:
            try:
                response = await self._inference.answer(request, left_s=_left_s(context))
            except Exception as error:
                if told:
                    raise
                return _error(request.message, error)
            # Each request has one answer: every one is the last.
            response.parameters["triton_final_response"].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=response)

        async with aclosing(in_order(request_iterator, answer)) as answers:
            async for response in answers:
                yield response

    # The repository

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """List every version, its state, and why it is not ready."""
        model_control.check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for entry in await model_control.index(self._models, ready=request.ready):
            response.models.add(
                name=entry.name, version=str(entry.version or ""), state=entry.state, reason=entry.reason
            )
        return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model, or load it again; answer when it answers."""
        model = model_control.model_named(repository_name=request.repository_name, model_name=request.model_name)
        await model_control.load(self._models, model, parameters=request.parameters)
        return pb.RepositoryModelLoadResponse(model_name=model, isLoaded=True)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service; what it is busy with is finished."""
        model = model_control.model_named(repository_name=request.repository_name, model_name=request.model_name)
        await model_control.unload(self._models, model, parameters=request.parameters)
        return pb.RepositoryModelUnloadResponse(model_name=model, isUnloaded=True)

    # Shared memory

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List one region, or all."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._regions.status(request.name):
            response.regions[region.name].CopyFrom(
                pb.SystemSharedMemoryStatusResponse.RegionStatus(
                    name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
                )
            )
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Map a region of this machine's shared memory, so that tensors may lie in it."""
        self._regions.register(request.name, key=request.key, offset=request.offset, byte_size=request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Let go of one region, or all; an unknown one is no error."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    # Shared memory of GPUs: there is none, which its tools want to be told so

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """List no region; a name is one that is not here."""
        if request.name:
            raise NotFound(f"shared memory region {request.name!r}: expected none; GPUs' memory is not shared here")
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refuse."""
        raise Unimplemented("shared memory of GPUs is not served; use system shared memory, or send plain tensors")

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Do nothing: an unknown region is no error."""
        return pb.CudaSharedMemoryUnregisterResponse()


def _left_s(context: Context) -> float | None:
    """Return the seconds that the caller will wait, None for ever; the native front says that in a large number."""
    left_s: float | None = context.time_remaining()
    return None if left_s is None or left_s > _FOR_EVER_S else left_s


def _error(message: pb.ModelInferRequest, error: Exception) -> pb.ModelStreamInferResponse:
    """Return an error as an answer of a stream: Triton's clients tell by its id which request it was."""
    _, text = told(error, "a request of ModelStreamInfer")
    response = pb.ModelStreamInferResponse(error_message=text)
    response.infer_response.id = message.id
    response.infer_response.model_name = message.model_name
    response.infer_response.model_version = message.model_version
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _properties(version: ServedVersion, *, aliases: list[str]) -> dict[str, str]:
    manifest = version.manifest
    encoded = "JPEG, PNG, WebP" if manifest.image_shape[0] in MODES else ""
    return {
        "version": str(manifest.version),
        "sha256": manifest.sha256,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "output": manifest.output,
        "max_batch_size": str(version.max_batch),
        "class_names": json.dumps(manifest.class_names),
        "aliases": json.dumps(aliases),
        # What images that are sent encoded may be, and how they are brought to the model's size.
        "encoded_images": encoded,
        "preprocessing": manifest.preprocessing.model_dump_json(),
    }
