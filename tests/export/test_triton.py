"""config.pbtxt, read as Triton reads it: by the definition of its messages."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from export import triton
from export.manifest import LARGEST_BATCH, Build, Images, Manifest, Parity, Quantization, Requirements, TensorSpec

_IMAGES = Images(description="noise", n=8, sha256="0" * 64, seed=0)


def _manifest(
    version: int = 1,
    *,
    status: Literal["passed", "failed", "not run"] = "passed",
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"] = "onnxruntime",
    **changes: object,
) -> Manifest:
    record: dict[str, object] = {
        "model": "pets",
        "version": version,
        "file": "model.onnx" if runtime == "onnxruntime" else "model.plan",
        "sha256": "0" * 64,
        "runtime": runtime,
        "precision": "fp32",
        "inputs": (TensorSpec(name="images", datatype="FP32", shape=(-1, 3, 8, 6)),),
        "outputs": (TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),),
        "class_names": ("cat", "dog"),
        "max_batch": 16,
        "requires": Requirements(runtime=">=1.27"),
        "parity": Parity(status=status, reference="none", images=_IMAGES),
        **changes,
    }
    return Manifest.model_validate(record)


def _parsed(*manifests: Manifest, model: str = "pets") -> Any:
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(triton.config_of(model, manifests), model_config_pb2.ModelConfig())


def test_triton_is_told_of_tensors_batches_and_labels() -> None:
    config = _parsed(_manifest())
    assert (config.name, config.platform, config.default_model_filename) == ("pets", "onnxruntime_onnx", "model.onnx")
    assert config.max_batch_size == 16
    (images,), (logits,) = config.input, config.output
    assert (images.name, images.data_type, list(images.dims)) == ("images", _type("TYPE_FP32"), [3, 8, 6])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", _type("TYPE_FP32"), [2])
    assert logits.label_filename == "labels.txt"
    assert triton.files_of("pets", [_manifest()])["labels.txt"] == b"cat\ndog\n"


def _type(name: str) -> int:
    from tritonclient.grpc import model_config_pb2

    return int(model_config_pb2.DataType.Value(name))


def test_an_input_of_bytes_has_its_channels_last() -> None:
    inputs = (TensorSpec(name="images", datatype="UINT8", shape=(-1, 8, 6, 3)),)
    (images,) = _parsed(_manifest(inputs=inputs)).input
    assert (images.data_type, list(images.dims)) == (_type("TYPE_UINT8"), [8, 6, 3])


@pytest.mark.parametrize(
    ("max_batch", "preferred"), [(1, [1]), (3, [3]), (4, [4]), (6, [4, 6]), (64, [4, 8, 16, 32, 64])]
)
def test_batches_fit_the_engine(max_batch: int, preferred: list[int]) -> None:
    config = _parsed(_manifest(max_batch=max_batch))
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds < 1000


def test_an_engine_runs_where_it_is_fast() -> None:
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    quantised = Quantization(target="cpu", method="minmax", images=_IMAGES)
    for manifest, kind in (
        (_manifest(), ModelInstanceGroup.KIND_AUTO),
        (_manifest(precision="int8", quantization=quantised), ModelInstanceGroup.KIND_CPU),
        (
            _manifest(precision="int8", quantization=quantised.model_copy(update={"target": "tensorrt"})),
            ModelInstanceGroup.KIND_AUTO,
        ),
        (_manifest(runtime="tensorrt"), ModelInstanceGroup.KIND_GPU),
    ):
        assert [group.kind for group in _parsed(manifest).instance_group] == [kind]


def test_a_plan_is_served_by_the_backend_for_plans() -> None:
    config = _parsed(_manifest(runtime="tensorrt"))
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert list(config.version_policy.specific.versions) == [1]


def test_a_plan_s_instances_may_use_all_of_its_profiles() -> None:
    """Without their names Triton takes the first alone: that of single images."""
    two = Build(options={"profiles": [[1, 1, 1], [1, 16, 16]]})
    (group,) = _parsed(_manifest(runtime="tensorrt", build=two)).instance_group
    assert list(group.profile) == ["0", "1"]
    (group,) = _parsed(_manifest(build=two)).instance_group
    assert list(group.profile) == []
    one = Build(options={"profiles": [[1, 16, 16]]})
    older, newer = _manifest(1, runtime="tensorrt", build=one), _manifest(2, runtime="tensorrt", build=two)
    # A version without a second profile would fail to load under a configuration that names it.
    assert list(_parsed(older, newer).version_policy.specific.versions) == [2]


def test_the_largest_batch_is_one_that_triton_takes() -> None:
    assert _parsed(_manifest(max_batch=LARGEST_BATCH)).max_batch_size == LARGEST_BATCH


def test_only_proved_versions_are_listed() -> None:
    manifests = [_manifest(1), _manifest(2, status="failed"), _manifest(3), _manifest(4, status="not run")]
    assert list(_parsed(*manifests).version_policy.specific.versions) == [1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch": 8},
        {"class_names": ("dog", "cat")},
        {"inputs": (TensorSpec(name="images", datatype="UINT8", shape=(-1, 8, 6, 3)),)},
        {"output": "probabilities"},
        {"runtime": "tensorrt"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_version_that_differs_from_the_newest_servable_one_is_not_listed(change: dict[str, Any]) -> None:
    newest, other = _manifest(3), _manifest(2, **change)
    config = _parsed(_manifest(1), other, newest, _manifest(4, status="failed", **change))
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert config.max_batch_size == 16


@pytest.mark.parametrize(
    "manifests",
    [(), (_manifest(status="not run"),), (_manifest(status="failed"),), (_manifest(runtime="tensorrt_rtx"),)],
    ids=["none", "unproven", "blocked", "rtx"],
)
def test_triton_refuses_a_model_without_a_version_for_it(manifests: tuple[Manifest, ...]) -> None:
    config = _parsed(*manifests)
    # A policy that is there and names none; where there is no policy, Triton serves the newest version.
    assert config.version_policy.WhichOneof("policy_choice") == "specific"
    assert list(config.version_policy.specific.versions) == []


def test_a_plan_for_rtx_says_why_triton_does_not_serve_it() -> None:
    text = triton.config_of("pets", [_manifest(runtime="tensorrt_rtx")])
    assert "# No version is listed" in text
    assert "TensorRT-RTX" in text
    assert "`tenet models verify`" in triton.config_of("pets", [_manifest(status="not run")])


@given(st.text(min_size=1))
def test_any_name_comes_out_as_it_went_in(name: str) -> None:
    outputs = (TensorSpec(name=name, datatype="FP32", shape=(-1, 2)),)
    try:
        name.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON cannot hold either
        return
    assert _parsed(_manifest(outputs=outputs)).output[0].name == name


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_labels_are_read_back_by_lines_or_left_out(names: list[str]) -> None:
    manifest = _manifest(class_names=tuple(names))
    labels = triton.files_of("pets", [manifest]).get("labels.txt")
    label_filename = _parsed(manifest).output[0].label_filename
    if labels is None:
        assert label_filename == ""
        assert any(set(name) & {"\n", "\r"} for name in names)
    else:
        assert label_filename == "labels.txt"
        assert labels.decode().removesuffix("\n").split("\n") == names


def test_labels_are_exchanged_without_a_moment_of_another_version_s_labels() -> None:
    files = triton.files_of("pets", [_manifest(class_names=("dog", "cat"))])
    steps = triton.steps_to(files, labels=b"cat\ndog\n")
    assert [name for name, _ in steps] == ["config.pbtxt", "labels.txt", "config.pbtxt"]
    assert b"label_filename" not in (steps[0][1] or b"")
    assert dict(steps) == files
    assert [name for name, _ in triton.steps_to(files, labels=files["labels.txt"])] == ["config.pbtxt"]
    unlabelled = triton.files_of("pets", [_manifest(class_names=("a\nb", "c"))])
    assert triton.steps_to(unlabelled, labels=b"cat\n") == [*unlabelled.items(), ("labels.txt", None)]
