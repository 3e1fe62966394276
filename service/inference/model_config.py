"""A model's configuration, as Triton's clients and perf_analyzer read it.

manifest, settings --> pb.ModelConfig
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.engines.places import placed
from export.triton import LABELS
from protos.inference import model_config_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.manifest import Manifest, TensorSpec
    from service import settings
    from service.inference.models import ServedVersion

# The field's names for what runs a file: the platform, and the backend behind it.
PLATFORMS = {"model.onnx": "onnxruntime_onnx", "model.plan": "tensorrt_plan"}
_BACKENDS = {"model.onnx": "onnxruntime", "model.plan": "tensorrt"}

_MICROSECONDS_A_MS = 1000

# What the message's fields hold; nobody has more versions, or requests that wait.
_LARGEST_UINT32 = (1 << 32) - 1

# Dimensions of an image with its batch.
_IMAGE_DIMENSIONS = 4


def config_of(version: ServedVersion, *, versions: Sequence[int]) -> pb.ModelConfig:
    """Return the configuration of a version.

    Args:
        version: that answers.
        versions: those of its model that answer, ascending.
    """
    manifest, settings = version.manifest, version.settings
    return pb.ModelConfig(
        name=manifest.model,
        platform=PLATFORMS[manifest.file],
        backend=_BACKENDS[manifest.file],
        default_model_filename=manifest.file,
        version_policy=_version_policy(settings.models, versions),
        max_batch_size=version.max_batch,
        input=[_input(version.input)],
        output=[_output(version.output)],
        instance_group=[_instances(manifest, settings.engine)],
        dynamic_batching=_dynamic_batching(settings.batching, max_batch=version.max_batch),
        parameters={name: pb.ModelParameter(string_value=value) for name, value in _parameters(manifest).items()},
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        response_cache=pb.ModelResponseCache(enable=settings.cache.enabled),
    )


def _version_policy(settings: settings.Models, versions: Sequence[int]) -> pb.ModelVersionPolicy:
    if settings.versions == "latest":
        return pb.ModelVersionPolicy(
            latest=pb.ModelVersionPolicy.Latest(num_versions=min(settings.latest, _LARGEST_UINT32))
        )
    if settings.versions == "all":
        return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=versions))


def _data_type(datatype: str) -> pb.DataType.ValueType:
    return pb.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def _input(spec: TensorSpec) -> pb.ModelInput:
    layout = pb.ModelInput.FORMAT_NONE
    if len(spec.shape) == _IMAGE_DIMENSIONS:
        layout = pb.ModelInput.FORMAT_NHWC if spec.datatype == "UINT8" else pb.ModelInput.FORMAT_NCHW
    return pb.ModelInput(name=spec.name, data_type=_data_type(spec.datatype), format=layout, dims=spec.shape[1:])


def _output(spec: TensorSpec) -> pb.ModelOutput:
    data_type = _data_type(spec.datatype)
    return pb.ModelOutput(name=spec.name, data_type=data_type, dims=spec.shape[1:], label_filename=LABELS)


def _instances(manifest: Manifest, engine: settings.Engine) -> pb.ModelInstanceGroup:
    group = pb.ModelInstanceGroup(name=manifest.model, count=engine.instances, kind=pb.ModelInstanceGroup.KIND_CPU)
    place = placed(device=engine.device, provider=engine.provider)
    # Plans run on a GPU, the first one where none is named.
    if manifest.file == "model.plan" or place.provider != "cpu":
        group.kind = pb.ModelInstanceGroup.KIND_GPU
        group.gpus.append(place.ordinal)
    return group


def _dynamic_batching(batching: settings.Batching, *, max_batch: int) -> pb.ModelDynamicBatching:
    # One level is no levels: Triton's word for that is 0.
    levels = batching.priority_levels if batching.priority_levels > 1 else 0
    return pb.ModelDynamicBatching(
        preferred_batch_size=[size for size in batching.preferred_batch_sizes if size <= max_batch],
        max_queue_delay_microseconds=round(batching.max_queue_delay_ms * _MICROSECONDS_A_MS),
        priority_levels=levels,
        default_priority_level=batching.usual_priority if levels else 0,
        default_queue_policy=pb.ModelQueuePolicy(
            timeout_action=pb.ModelQueuePolicy.REJECT,
            default_timeout_microseconds=round((batching.default_timeout_ms or 0) * _MICROSECONDS_A_MS),
            allow_timeout_override=batching.allow_timeout_override,
            max_queue_size=min(batching.max_queue_size, _LARGEST_UINT32),
        ),
    )


def _parameters(manifest: Manifest) -> dict[str, str]:
    return {"precision": manifest.precision, "runtime": manifest.runtime, "sha256": manifest.sha256}
