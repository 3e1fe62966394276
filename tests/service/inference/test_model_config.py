"""A model's configuration: what perf_analyzer and Triton's example clients read of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from export.engines.base import FakeEngine
from export.manifest import Manifest, Parity, Requirements, TensorSpec
from protos.inference import model_config_pb2 as pb
from service.inference.model_config import config_of
from service.inference.serving import ServedVersion
from service.inference.statistics import Statistics
from service.settings import Settings
from tests.service.conftest import CLASSES, weights_of

if TYPE_CHECKING:
    from pathlib import Path

    from tritonclient.grpc import InferenceServerClient as Triton

    from tests.service.conftest import Start


def manifest_of(**changes: Any) -> Manifest:
    return Manifest(
        **{
            "model": "linear",
            "version": 3,
            "file": "model.onnx",
            "sha256": "0" * 64,
            "runtime": "onnxruntime",
            "precision": "fp16",
            "inputs": (TensorSpec(name="images", datatype="FP32", shape=(-1, 3, 4, 4)),),
            "outputs": (TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES)),),
            "class_names": ("plane", "car", "bird", "cat", "deer"),
            "max_batch": 8,
            "requires": Requirements(runtime=">=1.27"),
            "parity": Parity(status="passed", reference="numpy"),
        }
        | changes
    )


async def config(manifest: Manifest, settings: dict[str, Any] | None = None) -> pb.ModelConfig:
    chosen = Settings.model_validate(settings or {}).of(manifest.model)
    engine = FakeEngine(manifest, weights=weights_of(0))
    version = ServedVersion([engine], settings=chosen, statistics=Statistics(manifest.max_batch))
    try:
        return config_of(version, versions=(1, 3))
    finally:
        await version.close()


async def test_what_a_model_takes_and_answers() -> None:
    told = await config(manifest_of())
    assert (told.name, told.platform, told.backend) == ("linear", "onnxruntime_onnx", "onnxruntime")
    assert told.default_model_filename == "model.onnx"
    assert told.max_batch_size == 8
    (taken,) = told.input
    assert (taken.name, taken.data_type, taken.format) == ("images", pb.TYPE_FP32, pb.ModelInput.FORMAT_NCHW)
    assert list(taken.dims) == [3, 4, 4]
    (answer,) = told.output
    assert (answer.name, answer.data_type, list(answer.dims)) == ("logits", pb.TYPE_FP32, [5])
    assert answer.label_filename == "labels.txt"
    assert not told.model_transaction_policy.decoupled
    assert not told.response_cache.enable
    assert told.parameters["precision"].string_value == "fp16"


async def test_stored_images_are_nhwc() -> None:
    spec = TensorSpec(name="images", datatype="UINT8", shape=(-1, 4, 4, 3))
    (taken,) = (await config(manifest_of(inputs=(spec,)))).input
    assert (taken.data_type, taken.format, list(taken.dims)) == (
        pb.TYPE_UINT8,
        pb.ModelInput.FORMAT_NHWC,
        [4, 4, 3],
    )


async def test_batching_as_it_is_set() -> None:
    batching = {
        "max_batch_size": 4,
        "preferred_batch_sizes": [2, 4, 6],
        "max_queue_delay_ms": 1.5,
        "max_queue_size": 77,
        "priority_levels": 3,
        "default_priority": 2,
        "default_timeout_ms": 250.0,
        "allow_timeout_override": False,
    }
    told = await config(manifest_of(), {"batching": batching})
    assert told.max_batch_size == 4
    dynamic = told.dynamic_batching
    # No batch has 6 images here.
    assert list(dynamic.preferred_batch_size) == [2, 4]
    assert dynamic.max_queue_delay_microseconds == 1500
    assert (dynamic.priority_levels, dynamic.default_priority_level) == (3, 2)
    policy = dynamic.default_queue_policy
    assert (policy.timeout_action, policy.default_timeout_microseconds) == (pb.ModelQueuePolicy.REJECT, 250_000)
    assert not policy.allow_timeout_override
    assert policy.max_queue_size == 77


async def test_settings_of_the_model_itself_are_told() -> None:
    settings = {"model": {"linear": {"cache": {"enabled": True}, "engine": {"instances": 3}}}}
    told = await config(manifest_of(), settings)
    assert told.response_cache.enable
    assert told.instance_group[0].count == 3


async def test_the_largest_settings_fit_the_message() -> None:
    settings = {"batching": {"max_queue_size": 10**12}, "models": {"versions": "latest", "latest": 10**12}}
    told = await config(manifest_of(), settings)
    assert told.dynamic_batching.default_queue_policy.max_queue_size == 2**32 - 1
    assert told.version_policy.latest.num_versions == 2**32 - 1


@pytest.mark.parametrize(
    ("models", "policy"),
    [
        ({}, pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())),
        (
            {"versions": "latest", "latest": 2},
            pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=2)),
        ),
        (
            {"versions": "aliased"},
            pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=[1, 3])),
        ),
    ],
)
async def test_which_versions_are_served(models: dict[str, Any], policy: pb.ModelVersionPolicy) -> None:
    assert (await config(manifest_of(), {"models": models})).version_policy == policy


@pytest.mark.parametrize(
    ("file", "engine", "kind", "gpus"),
    [
        ("model.onnx", {}, pb.ModelInstanceGroup.KIND_CPU, []),
        ("model.onnx", {"provider": "cuda"}, pb.ModelInstanceGroup.KIND_GPU, [0]),
        ("model.onnx", {"device": "cuda:2"}, pb.ModelInstanceGroup.KIND_GPU, [2]),
        ("model.plan", {}, pb.ModelInstanceGroup.KIND_GPU, [0]),
        ("model.plan", {"device": "cuda:1"}, pb.ModelInstanceGroup.KIND_GPU, [1]),
    ],
)
async def test_where_instances_run(file: str, engine: dict[str, Any], kind: int, gpus: list[int]) -> None:
    told = await config(manifest_of(file=file), {"engine": engine})
    (group,) = told.instance_group
    assert (group.kind, list(group.gpus), group.count) == (kind, gpus, 1)
    assert told.platform == ("tensorrt_plan" if file == "model.plan" else "onnxruntime_onnx")


def test_triton_client_reads_the_configuration(triton: Triton) -> None:
    told = triton.get_model_config("linear", as_json=True)["config"]
    assert told["name"] == "linear"
    assert told["max_batch_size"] == 8
    assert told["input"] == [
        {"name": "images", "data_type": "TYPE_FP32", "format": "FORMAT_NCHW", "dims": ["3", "4", "4"]}
    ]
    assert told["output"] == [
        {"name": "logits", "data_type": "TYPE_FP32", "dims": ["5"], "label_filename": "labels.txt"}
    ]
    assert told["instance_group"] == [{"name": "linear", "count": 1, "kind": "KIND_CPU"}]
    assert "all" in told["version_policy"]


def test_each_version_has_its_own(start: Start, repository: Path) -> None:
    from tritonclient.grpc import InferenceServerClient

    serving = start(repository)
    with InferenceServerClient(serving.address) as client:
        first = client.get_model_config("linear", "1").config.parameters["sha256"].string_value
        second = client.get_model_config("linear", "2").config.parameters["sha256"].string_value
    assert first != second
